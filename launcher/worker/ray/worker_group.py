"""A group: workers that Ray Train started together, and which of them train, hang or are lost."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from launcher.clusters.check_results import MachineReport, with_differences
from launcher.errors import Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import fit_workers
from launcher.plan.quantities import format_count
from launcher.worker.ranks.watchdog import DUMP_S, Beat, StallLimits, describe, is_loading, judge_ranks
from launcher.worker.ray.messages import Member, RankSign, Verdict

# Workers send several heartbeats a second. One that is silent for this long is cut off, or its machine hangs. If the limit for
# a stalled rank is shorter, it applies to workers too.
SILENT_S = 60.0
# A worker's heartbeat counts as evidence for this long, or for this share of the stall limit if that is less.
_FRESH_S, _FRESH_SHARE = 10.0, 0.2
# How long to wait for a killed rank: one that hangs in the kernel does not end.
_KILLED_S = 15.0


@dataclass
class Group:
    """`members` is keyed by rank in the group; `training_ranks` lists the members that train, in rank order; the others idle.

    `reports` come from the workers that check their nodes; `problems` are those of all nodes. Times are of time.monotonic().
    `saves` is False for a cancel request without a save.
    """

    id: str
    size: int
    liveness: GroupLiveness
    members: dict[int, Member] = field(default_factory=dict)
    training_ranks: tuple[int, ...] = ()
    # The group's nodes that failed a check in an earlier attempt.
    unfit: set[str] = field(default_factory=set)
    plan_path: str = ""
    marker: str = ""
    tried_at: float = -math.inf
    opened_at: float | None = None
    reports: dict[int, MachineReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    hung: dict[int, str] = field(default_factory=dict)
    hung_at: float = math.inf
    failed_at: float | None = None
    draining: bool = False
    resizing: bool = False
    cancelled_at: float | None = None
    saves: bool = True
    verdict: Verdict | None = None
    created_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def is_complete(self) -> bool:
        return len(self.members) == self.size

    @property
    def training(self) -> list[Member]:
        """The workers that train, in rank order."""
        return [self.members[rank] for rank in self.training_ranks]

    @property
    def heads(self) -> list[Member]:
        """The first training worker of each node, which checks the node."""
        first: dict[str, Member] = {}
        for member in self.training:
            first.setdefault(member.node_id, member)
        return list(first.values())

    def choose_training_ranks(self, planned: LaunchPlan, unfit: Collection[str]) -> LaunchPlan:
        """Choose the workers that train, as many as the global batch divides over, and return their plan.

        Workers on `unfit` nodes are excluded if enough others are left; otherwise they stay, since a failed check may be
        temporary.

        Raises:
            ConfigError: if the batch divides over no number of workers.
        """
        self.unfit = {member.node for member in self.members.values()} & set(unfit)
        fit = [rank for rank, member in sorted(self.members.items()) if member.node not in self.unfit]
        has_enough = len(fit) >= (planned.config.cluster.fewest_workers or 1)
        candidates = fit if has_enough else [*fit, *sorted(self.members.keys() - set(fit))]
        per_node = Counter(self.members[rank].node_id for rank in candidates)
        plan = fit_workers(planned, per_node.total(), max(per_node.values()))
        self.training_ranks = tuple(sorted(candidates[: plan.topology.world_size]))
        return plan

    def add_report(self, rank: int, report: MachineReport) -> None:
        """Add a node's report on itself; the last one completes the problems of all nodes and their differences."""
        self.reports[rank] = report
        if len(self.reports) < len(self.heads):
            return
        reports = [report for _, report in sorted(self.reports.items())]
        # A node without the run directory would differ in everything.
        fit = with_differences([report for report in reports if not report.problems])
        self.problems = [problem for report in (*reports, *fit) for problem in report.problems]

    def look_for_hangs(self) -> list[str]:
        """Find workers that send no heartbeats, and ranks that stopped training; return the alerts."""
        running, now = self._running, time.monotonic()
        silence_s = self.liveness.find_silent(running)
        names = {rank: f"the worker of rank {self.training_ranks.index(rank)} on {self.members[rank].node}" for rank in silence_s}
        alerts = [
            f"no heartbeat for {silence_s[rank]:.0f} s from {names[rank]}: it hangs or is cut off from the network"
            for rank in silence_s.keys() - self.silent
        ]
        self.silent = set(silence_s)
        others = running - self.silent
        # While the other ranks progress, so does the silent worker's rank.
        if self.silent and others and self.liveness.have_stopped(others):
            self.failed_at = now
            alerts.append(f"the other ranks wait for {' and '.join(names.values())}: the attempt ends")
        if self.hung:
            # The other ranks wait for the killed one and are not judged.
            if (remaining := sorted(self.hung.keys() & running)) and now - self.hung_at > _KILLED_S:
                self.failed_at = now
                ranks = " and ".join(f"rank {self.training_ranks.index(rank)} on {self.members[rank].node}" for rank in remaining)
                alerts.append(f"{ranks} was killed and does not end (it hangs in the kernel): the attempt ends")
            return alerts
        for rank, (beat, seconds, reason) in self.liveness.find_hung(running).items():
            self.hung_at = now
            self.hung[rank] = describe(beat, seconds, reason, self.members[rank].node)
            alerts.append(self.hung[rank])
        return alerts

    @property
    def is_over(self) -> bool:
        """True if every training rank has ended, or if the workers of those that have not were silent for too long."""
        return not self._running or (self._running <= self.silent and self.liveness.have_stopped(self._running))

    @property
    def phases(self) -> set[str]:
        """The phases of running ranks whose workers send heartbeats."""
        return self.liveness.phases(self._running - self.liveness.find_silent(self._running).keys())

    def describe_composition(self, attempt: int) -> tuple[str, str]:
        """Describe which workers train and which idle; returns an event's kind and text."""
        ranks, idle = len(self.training_ranks), self.size - len(self.training_ranks)
        text = f"attempt {attempt} begins with {format_count(ranks, 'rank')}"
        text += f", {format_count(idle, 'worker')} idle" if idle else ""
        text += f" on {', '.join(dict.fromkeys(member.node for member in self.training))}"
        readmitted = self.unfit & {member.node for member in self.training}
        for nodes, how in ((self.unfit - readmitted, "without"), (readmitted, "still with")):
            if nodes:
                text += f", {how} {', '.join(sorted(nodes))}, which failed the node checks before: "
                text += "repair it, or remove it with `ray drain-node`"
        text += "; the run saves first" if self.unfit else ""
        return "alert" if self.unfit else "info", text

    @property
    def _running(self) -> set[int]:
        return set(self.training_ranks) - self.ended


class GroupLiveness:
    """The coordinator's side: the last heartbeat of each worker, keyed by its rank in the group, and of the rank it runs."""

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits
        self._silent_s = min(limits.stall_s or SILENT_S, SILENT_S)
        self._gap_s = self._silent_s / 2
        self._heard: dict[int, float] = {}
        self._beats: dict[int, Beat] = {}
        self._states: dict[int, str] = {}
        self._stuck: dict[int, float] = {}
        self._dumped: set[int] = set()
        self._called = self._since = time.monotonic()

    def hear(self, rank: int, sign: RankSign | None = None) -> None:
        now = time.monotonic()
        if now - self._called > self._gap_s:
            # The coordinator itself was blocked, for example by slow storage.
            self._since = now
        self._called = self._heard[rank] = now
        if sign is not None:
            self._beats[rank] = replace(sign.beat, at=now - sign.silent_s)
            self._states[rank] = sign.process_state

    def find_silent(self, ranks: Collection[int]) -> dict[int, float]:
        """Return the `ranks` whose workers have been silent for too long, with the seconds; includes workers never heard from."""
        now = time.monotonic()
        seconds = {rank: now - max(self._heard.get(rank, self._since), self._since) for rank in ranks}
        return {rank: silence for rank, silence in seconds.items() if silence > self._silent_s}

    def have_stopped(self, ranks: Collection[int]) -> bool:
        """Return whether all of `ranks` are loading or have trained, and none has progressed within its limit: they wait or hang.

        Finishing has no limit.
        """
        if self._limits.stall_s <= 0:
            return False
        now, beats = time.monotonic(), [self._beats.get(rank) for rank in ranks]
        return all(
            b is not None and (b.trained or is_loading(b)) and now - max(b.at, self._since) > self._limits.of(b) for b in beats
        )

    def phases(self, ranks: Collection[int]) -> set[str]:
        """Return the phases of `ranks` at their last heartbeats."""
        return {self._beats[rank].phase for rank in ranks if rank in self._beats}

    def find_hung(self, ranks: Collection[int]) -> dict[int, tuple[Beat, float, str]]:
        """Return the `ranks` to kill, each with its last heartbeat, the seconds since then, and the reason.

        No rank is judged while any worker is silent: the silent worker's rank may be the culprit, or may have progressed.
        """
        now, fresh_s = time.monotonic(), min(_FRESH_S, _FRESH_SHARE * self._limits.stall_s)
        if self._limits.stall_s <= 0 or any(now - self._heard.get(rank, self._since) > fresh_s for rank in ranks):
            return {}
        beats = {rank: self._beats[rank] for rank in ranks if rank in self._beats}
        # Nothing is known about a rank whose worker is still importing; imports have their own deadline.
        others_at = -math.inf if len(beats) == len(ranks) else math.inf
        verdict = judge_ranks(beats, self._states, now, self._limits, self._since, others_at, "of the run")
        self._stuck = {rank: self._stuck.get(rank, now) for rank in verdict.stalled}
        if not self._stuck:
            self._dumped.clear()
        if any(now - self._stuck[rank] < DUMP_S for rank in verdict.kill):
            return {}
        return {rank: (beats[rank], verdict.stalled[rank], reason) for rank, reason in verdict.kill.items()}

    def wants_stacks(self, rank: int) -> bool:
        """Return True once for each rank while any rank is stalled.

        Logs and flight recorders must show where all ranks wait before any rank is killed, and a rank that waits for a stalled
        one may become late only after that.
        """
        if not self._stuck or rank in self._dumped:
            return False
        self._dumped.add(rank)
        return True
