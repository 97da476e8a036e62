"""A group: workers that Ray Train started together, and which of them train, hang or are lost."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from launcher.clusters import network
from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import fit_workers
from launcher.plan.quantities import format_count
from launcher.worker.ranks.watchdog import describe
from launcher.worker.ray.messages import Member, Verdict
from launcher.worker.ray.node_checks import Checks
from launcher.worker.ray.watchdog import GroupLiveness

# How long to wait for a killed rank: one that hangs in the kernel does not end.
_KILLED_S = 15.0


@dataclass
class Group:
    """`members` is keyed by rank in the group; `training_ranks` lists the members that train, in rank order; the others idle.

    Times are of time.monotonic(). `saves` is False for a cancel request without a save.
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
    checks: Checks = field(default_factory=Checks)
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

    def choose(self, planned: LaunchPlan, unfit: Collection[str]) -> LaunchPlan:
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

    def look_for_hangs(self) -> list[str]:
        """Find workers that send no heartbeats, and ranks that stopped training; return the alerts."""
        running, now = self._running, time.monotonic()
        silence_s = self.liveness.silent(running)
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
        for rank, (beat, seconds, reason) in self.liveness.hung(running).items():
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
        return self.liveness.phases(self._running - self.liveness.silent(self._running).keys())

    def composition(self, attempt: int) -> tuple[str, str]:
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


def require_private(head: Member) -> None:
    """Reject a public address for the ranks' rendezvous.

    Raises:
        ConfigError: with the node and its address.
    """
    if network.is_public(head.address):
        endpoint = f"{head.node} at {head.address}"
        raise ConfigError(f"the ranks would connect to each other over a public address: {endpoint}; set cluster.interface")
