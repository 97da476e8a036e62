"""What the workers of a run on Ray agree on: which attempt they are, whether their nodes are fit, when to stop, what follows.

One object in an actor of its own, asked by every worker and by the driver. Ray Train places the workers, finds those that
are lost and starts the next group; each group of workers is an attempt here. Nothing blocks: workers ask again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import run_records, run_store
from launcher.config.ray import RaySection
from launcher.errors import ConfigError, LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.ray import node_checks
from launcher.worker.ray.attempts import Attempts
from launcher.worker.ray.committed import Committed
from launcher.worker.ray.watchdog import SILENT_S, Liveness
from launcher.worker.ray.worker_group import Group, Member
from launcher.worker.watchdog import Limits

# How often the disk and Ray are looked at, however many workers ask.
_LOOK_S = 0.5
_DRAIN_LOOK_S = 2.0
# How long storage that cannot be read now is waited for before an attempt.
_OPEN_DEADLINE_S = 600.0
# Groups whose workers could not even say who they are, one after the other: then it is no accident.
_MOST_EARLY_FAILURES = 10
_SAME_FAILURE_S = 30.0
# From the first failure to the end of the others, which are sent away.
_LAST_WORDS_S = 30.0


class Coordinator:
    """`number` is the attempt that the submitting side has opened.

    `draining` tells the ids of the nodes about to be lost, `gone` those of the nodes that Ray has lost.
    """

    def __init__(
        self, plan_path: str, number: int, job: str, draining: Callable[[], set[str]], gone: Callable[[], set[str]]
    ) -> None:
        self._plan_path = plan_path
        self._plan = LaunchPlan.load(plan_path)
        self._run = RunDir(Path(self._plan.run_dir))
        self._attempts = Attempts(plan_path, self._plan, number, job, gone)
        self._draining = draining
        self._environment: dict[str, str] = {}
        cluster = self._plan.config.cluster
        self._limits = Limits(cluster.stall_seconds, cluster.timeout_minutes * 60)
        self._committed = Committed(self._run)
        self._group: Group | None = None
        # Groups whose workers have not all come yet, and the ids of those that another has followed.
        self._coming: dict[str, Group] = {}
        self._gone: set[str] = set()
        self._early_failures = 0
        self._early_failure_at = -math.inf
        # What the last of them said, until workers begin.
        self._early_words = ""
        self._looked = self._looked_at_drains = 0.0
        self._idle_since: float | None = time.monotonic()

    def entrust(self, environment: dict[str, str]) -> None:
        """Variables for the ranks, keys among them: they pass from process to process and are written nowhere."""
        self._environment = environment

    def state(self) -> dict[str, Any]:
        """For the driver: the newest attempt, seconds for which no workers have been there, what the last worker said that could
        not start, and why all is over, if it is.
        """
        group = self._group
        if group is not None and self._idle_since is None and time.monotonic() - group.heard_at > SILENT_S:
            # They are gone, and Ray Train looks for others.
            self._idle_since = group.heard_at
            if self._attempts.over is None:
                lost = f"; Ray has lost {', '.join(names)}" if (names := self._attempts.lost()) else ""
                self._attempts.say(
                    "alert", f"the workers of attempt {self._attempts.number} are gone{lost}; the run waits for others"
                )
                with suppress(OSError, LauncherError):
                    message = f"its workers are gone{lost}; it waits for others"
                    run_store.update_status(self._run, state="pending", message=message)
        idle_s = 0.0 if self._idle_since is None else time.monotonic() - self._idle_since
        return {"number": self._attempts.number, "idle_s": idle_s, "early_words": self._early_words, "over": self._attempts.over}

    def enter(self, group: str, size: int, member: Mapping[str, Any]) -> dict[str, Any]:
        """A worker has started; a group takes over from the one before when all of its workers have come.

        Returns the run's plan and the variables of its ranks, so that a worker can import before it has orders. One that was cut
        off may come back late: its group is gone, or never gets complete.
        """
        current = self._group
        entrusted = {"plan": self._plan_path, "environment": self._environment}
        if group in self._gone or (current is not None and current.id == group):
            return entrusted
        found = self._coming.setdefault(group, Group(group, size, Liveness(self._limits)))
        found.members[member["rank"]] = Member(**member)
        if found.is_complete:
            self._gone |= self._coming.keys() - {group} | ({current.id} if current is not None else set())
            self._coming.clear()
            self._group = found
            self._hear(found, member["rank"])
        return entrusted

    def failed_early(self, words: str) -> None:
        """A worker could not come so far as to enter; Ray Train would start others for ever.

        What all workers of a group say at about the same time is one failure.
        """
        if time.monotonic() - self._early_failure_at > _SAME_FAILURE_S:
            # Groups may follow each other faster than that: from one that counts to the next, not since the last word.
            self._early_failures += 1
            self._early_failure_at = time.monotonic()
        self._early_words = words
        self._attempts.say("alert", f"a worker could not start: {words}")
        if self._early_failures > _MOST_EARLY_FAILURES and self._attempts.over is None:
            self._attempts.end(f"workers cannot start: {words}", state="failed")

    def orders(self, group: str, rank: int) -> dict[str, Any] | None:
        """What a worker does next: None to ask again, else `do` is check, train, wait or leave."""
        found = self._group
        if self._attempts.over is None and group in self._coming:
            return None
        if found is not None and found.id == group and self._attempts.over is None:
            self._open_if_possible(found)
        if self._attempts.over is not None or found is None or found.id != group:
            return {"do": "leave", "why": self._attempts.over or "other workers have taken over"}
        self._hear(found, rank)
        if found.opened_at is None:
            return None
        waiting = self._unchecked(found)
        self._look(found)
        if waiting and found.verdict is None:
            self._end_of_checks(found, waiting)
        if found.verdict is not None:
            return {"do": "wait"}
        common = {
            "attempt": self._attempts.number,
            "plan": found.plan_path,
            "marker": found.marker,
            "world_size": len(found.trains),
        }
        if rank not in found.trains:
            return {"do": "wait", **common}
        head, here = found.training[0], found.members[rank].node_id
        place = {
            **common,
            "rank": found.trains.index(rank),
            "local_size": sum(member.node_id == here for member in found.training),
            "address": head.address,
            "port": head.port,
            "peers": sorted({member.address for member in found.training}),
        }
        if waiting:
            # Every worker listens until it trains or leaves.
            others = [(member.node, member.address, member.port) for member in found.heads if member.rank != rank]
            return {"do": "check", **place, "others": others} if rank in waiting else None
        return {"do": "train", **place, "environment": self._environment}

    def checked(self, group: str, rank: int, report: Mapping[str, Any]) -> None:
        """What a node has found out about itself; where any is unfit, the attempt ends before anything is loaded."""
        found = self._group
        if found is None or found.id != group or found.verdict is not None:
            return
        self._hear(found, rank)
        found.checks.take(rank, report, len(found.heads))
        if found.checks.problems:
            self._conclude_unfit(found)

    def beat(
        self, group: str, rank: int, ended: str | None, sign: Mapping[str, Any] | None = None, num_saved: int = 0
    ) -> dict[str, Any]:
        """A worker tells whether its rank goes on (None), is `done` or has `failed`, and hears what to do.

        `sign` is how far its rank is, see `liveness.Observer`. Returns `signal` for its rank or None, whether it is to show its
        `stacks`, why it is to be killed where it `hung`, the checkpoints `saved` after the first `num_saved` of the attempt, and
        the `verdict` once there is one.
        """
        found = self._group
        if found is None or found.id != group:
            verdict = {"again": False, "reason": "other workers have taken over"}
            return {"signal": "KILL", "stacks": False, "hung": None, "saved": [], "verdict": verdict}
        self._hear(found, rank, sign)
        if ended is not None and rank in found.trains:
            found.ended.add(rank)
            if ended == "failed" and found.failed_at is None:
                found.failed_at = time.monotonic()
        self._look(found)
        if found.verdict is None and found.opened_at is not None:
            late = found.failed_at is not None and time.monotonic() - found.failed_at > _LAST_WORDS_S
            if late or found.is_over:
                with suppress(OSError, LauncherError):
                    found.saved += self._committed.look(self._attempts.number)
                self._conclude(found)
        return {
            "signal": self._signal(found),
            "stacks": found.liveness.wants_stacks(rank),
            "hung": found.hung.get(rank),
            # Ray Train, which waits for the ranks to end, would not take a report from them.
            "saved": [] if found.resizing else found.saved[num_saved:],
            "verdict": found.verdict,
        }

    def make_way(self) -> str:
        """Ray Train has room for more workers and is about to replace these: they save, unless they finish anyway.

        Returns `gone` once they have ended, `busy` while they write what takes its time, else `asked`.
        """
        group = self._group
        if group is None or group.opened_at is None or group.verdict is not None:
            return "gone"
        phases = group.phases
        if not group.resizing and "finishing" not in phases:
            group.resizing = True
            self._attempts.say("info", "Ray has room for another number of workers: the run saves and begins again with them")
            with suppress(OSError, LauncherError):
                if self._attempts.is_starting():
                    # The ranks still load: they would hear of it after their first step, and there is nothing to save.
                    self._conclude(group)
        return "gone" if group.verdict is not None else "busy" if phases & {"saving", "finishing"} else "asked"

    def _hear(self, group: Group, rank: int, sign: Mapping[str, Any] | None = None) -> None:
        group.heard_at = time.monotonic()
        group.liveness.hear(rank, sign)
        if group.verdict is None:
            self._idle_since = None

    def _open_if_possible(self, group: Group) -> None:
        """Open the attempt of a group that is complete, once; what may only be out of reach for now is tried again for a while.

        Raised in the workers, anything would make Ray Train start others, for ever.
        """
        now = time.monotonic()
        if group.opened_at is not None or now - group.tried_at < _LOOK_S:
            return
        group.tried_at = now
        try:
            self._attempts.open(group)
            if group.opened_at is not None:
                self._early_failures, self._early_words = 0, ""
        except ConfigError as error:
            self._attempts.end(error.problems[0].what, state="failed")
        except Exception as error:
            if now - group.came_at > _OPEN_DEADLINE_S:
                said = error.problems[0].what if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"
                self._attempts.end(f"the attempt cannot be opened: {said}", state="failed")

    def _unchecked(self, group: Group) -> list[int]:
        """The workers whose reports on their nodes are still missing."""
        if not RaySection.of(self._plan.config.cluster).node_checks:
            return []
        return [head.rank for head in group.heads if head.rank not in group.checks.reports]

    def _end_of_checks(self, group: Group, waiting: Sequence[int]) -> None:
        """While nodes are checked: a wish to stop needs no save, and a node that does not report is named."""
        assert group.opened_at is not None
        if group.asked_at is not None:
            self._conclude(group)
        elif time.monotonic() - group.opened_at > node_checks.DEADLINE_S:
            group.checks.give_up([group.members[rank].node for rank in waiting])
            self._conclude_unfit(group)

    def _conclude_unfit(self, group: Group) -> None:
        """Nothing is loaded where a node is unfit; the workers' records say why."""
        group.checks.write(self._run, self._attempts.number, [member.node for member in group.training])
        self._conclude(group)

    def _look(self, group: Group) -> None:
        """At the wishes on disk, at the checkpoints, and at the nodes that Ray is about to lose.

        Storage or a Ray that does not answer now is no reason to stop; both are asked again.
        """
        now = time.monotonic()
        if group.opened_at is None or group.verdict is not None or now - self._looked < _LOOK_S:
            return
        self._looked = now
        with suppress(OSError, LauncherError):
            request = run_records.read_cancel(self._run, self._attempts.number)
            if request is not None:
                group.saves = request.save
                group.asked_at = group.asked_at or now
            group.saved += self._committed.look(self._attempts.number)
        self._look_for_trials(group, now)
        # While nodes are checked there is another deadline, and those that are sent away fall silent as they please.
        if group.failed_at is None and not self._unchecked(group):
            for text in group.look_for_hangs():
                self._attempts.say("alert", text)
        if not group.drained and now - self._looked_at_drains > _DRAIN_LOOK_S:
            self._looked_at_drains = now
            lost: set[str] = set()
            with suppress(Exception):
                lost = self._draining() & {member.node_id for member in group.members.values()}
            if lost:
                group.drained = True
                names = sorted({m.node for m in group.members.values() if m.node_id in lost})
                self._attempts.note_drain(names)

    def _look_for_trials(self, group: Group, now: float) -> None:
        """Begin again with the nodes that are left out, once there is a checkpoint after which they are not any more."""
        due = self._attempts.due_for_trial(group, now)
        is_ending = group.failed_at is not None or group.asked_at is not None or group.drained or "finishing" in group.phases
        if due and group.saved and not group.resizing and not is_ending:
            group.resizing = True
            self._attempts.say("info", f"trying {', '.join(due)} again, unfit before: the run saves and begins anew")

    def _signal(self, group: Group) -> str | None:
        """What the ranks that still run are told."""
        if group.failed_at is not None or group.verdict is not None:
            # As torch's elastic agent does: a collective would never end without the one that failed.
            return "TERM"
        if group.asked_at is not None:
            late = time.monotonic() - group.asked_at > self._plan.config.cluster.stop_grace_seconds
            return "USR1" if group.saves and not late else "KILL"
        return "USR2" if group.drained or group.resizing else None

    def _conclude(self, group: Group) -> None:
        self._attempts.conclude(group)
        if group.verdict is not None and group.verdict["again"]:
            self._idle_since = time.monotonic()
