"""The coordinator of a run on Ray. It assigns workers to attempts, checks their nodes, and decides when to stop and what follows.

`Coordinator` is a single object in its own Ray actor, which every worker and the driver call. Ray Train places the workers,
detects lost workers and starts the next group; each group of workers is one attempt. No call blocks: workers poll. The driver
starts the actor, polls it, and replaces it if its process is lost (`CoordinatorActor`); workers use `call_coordinator`.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import run_records, run_store
from launcher.clusters.check_results import MachineReport
from launcher.config.sections.ray import RaySection
from launcher.errors import ConfigError, LauncherError, Problem, describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.runs import journal
from launcher.runs.journal import LostCoordinator, NodeEnded
from launcher.tracking.jsonl import append_event
from launcher.worker.ranks.watchdog import StallLimits
from launcher.worker.ray.attempts import Attempts, newest_own_attempt
from launcher.worker.ray.connection import RAYLET_LOST, draining_nodes, lost_nodes, raylet_of_this_node
from launcher.worker.ray.messages import (
    Assignment,
    BeatReply,
    CheckNode,
    CoordinatorState,
    Leave,
    Member,
    Orders,
    RankResult,
    RankSign,
    ResizeProgress,
    Setup,
    Train,
    Verdict,
    Wait,
)
from launcher.worker.ray.worker_group import SILENT_S, Group, GroupLiveness

# How often the coordinator looks at the disk and at Ray, however many workers call it.
_LOOK_S = 0.5
_DRAIN_LOOK_S = 2.0
# How long to retry the start of an attempt while storage is unreadable.
_OPEN_DEADLINE_S = 600.0
# Consecutive groups whose workers failed before they could enter. With more, the failure is not transient.
_MAX_EARLY_FAILURES = 10
_SAME_FAILURE_S = 30.0
# Seconds from the first failure to the end of the other ranks, which get TERM.
_FAILURE_GRACE_S = 30.0
# Checks of GPUs and of a busy file system take seconds; without a deadline, a hung node would hold all others forever.
_CHECK_DEADLINE_S = 300.0
_REPLACED = "other workers have taken over"
# Seconds for a call of the driver or of Ray Train's controller. A worker repeats a call well before it counts as silent.
CALL_S, WORKER_CALL_S = 30.0, 20.0
_PATIENCE_S = 900.0
_POLL_S = 0.2
# Consecutive losses of the coordinator without workers in between. With more, the failure is not transient. Once workers come,
# the run's budgets apply.
_MAX_LOST = 20
# Maximum characters of a Ray error in a run's status; the log has the full message.
_MAX_MESSAGE_CHARS = 400


class RayletLost(Exception):
    """The raylet on the driver's node has ended, and with it everything that Ray ran there; the message says so."""


class CoordinatorLost(Exception):
    """The coordinator's process has ended."""


class Coordinator:
    """`number` is the attempt that the submit side opened, `job` names the driver.

    `draining_nodes` returns the ids of the nodes that Ray is about to lose, `lost_nodes` the ids of those that it has lost.
    """

    def __init__(
        self,
        plan_path: str,
        number: int,
        job: str,
        draining_nodes: Callable[[], set[str]],
        lost_nodes: Callable[[], set[str]],
    ) -> None:
        self._plan_path = plan_path
        self._plan = LaunchPlan.load(plan_path)
        self._run = RunDir(Path(self._plan.run_dir))
        self._attempts = Attempts(plan_path, self._plan, number, job, lost_nodes)
        self._draining_nodes = draining_nodes
        self._environment: dict[str, str] = {}
        cluster = self._plan.config.cluster
        self._limits = StallLimits(cluster.stall_seconds, cluster.timeout_minutes * 60)
        self._group: Group | None = None
        # Groups whose workers have not all entered yet, and the ids of groups that another group replaced.
        self._incomplete: dict[str, Group] = {}
        self._replaced: set[str] = set()
        self._num_early_failures = 0
        self._early_failure_at = -math.inf
        # The message of the last early failure, until workers begin.
        self._early_failure = ""
        self._looked_at = self._looked_at_drains_at = 0.0
        self._idle_since: float | None = time.monotonic()

    def set_environment(self, environment: dict[str, str]) -> None:
        """Set the ranks' environment variables, including keys. They pass between processes and are never written to disk."""
        self._environment = environment

    def state(self) -> CoordinatorState:
        """Return the state of the run for the driver; also detects that all workers are gone."""
        group = self._group
        if group is not None and self._idle_since is None and time.monotonic() - group.heard_at > SILENT_S:
            self._idle_since = group.heard_at
            if self._attempts.over is None:
                attempt, names = self._attempts.number, self._attempts.find_lost_nodes()
                lost = f"; Ray has lost {', '.join(names)}" if names else ""
                self._attempts.report("alert", f"the workers of attempt {attempt} are gone{lost}; the run waits for others")
                with suppress(OSError, LauncherError):
                    message = f"its workers are gone{lost}; it waits for others"
                    run_store.update_status(self._run, state="pending", message=message)
        idle_s = 0.0 if self._idle_since is None else time.monotonic() - self._idle_since
        return CoordinatorState(self._attempts.number, idle_s, self._early_failure, self._attempts.over)

    def enter(self, group_id: str, size: int, member: Member) -> Setup:
        """Register a worker of a group of `size`; once all its workers have entered, the group replaces the previous one.

        A worker that was cut off may enter late: its group was already replaced, or never becomes complete.
        """
        current = self._group
        setup = Setup(self._plan_path, self._environment)
        if group_id in self._replaced or (current is not None and current.id == group_id):
            return setup
        group = self._incomplete.setdefault(group_id, Group(group_id, size, GroupLiveness(self._limits)))
        group.members[member.rank] = member
        if group.is_complete:
            self._replaced |= self._incomplete.keys() - {group_id} | ({current.id} if current is not None else set())
            self._incomplete.clear()
            self._group = group
            self._hear(group, member.rank)
        return setup

    def report_early_failure(self, message: str) -> None:
        """Count a worker's failure before it could enter; without a limit, Ray Train would start new workers forever.

        Reports from all workers of a group at about the same time count as one failure.
        """
        if time.monotonic() - self._early_failure_at > _SAME_FAILURE_S:
            # Measured from the last failure that counted, because groups may follow each other faster than that.
            self._num_early_failures += 1
            self._early_failure_at = time.monotonic()
        self._early_failure = message
        self._attempts.report("alert", f"a worker could not start: {message}")
        if self._num_early_failures > _MAX_EARLY_FAILURES and self._attempts.over is None:
            self._attempts.end(f"workers cannot start: {message}", state="failed")

    def orders(self, group_id: str, rank: int) -> Orders | None:
        """Return what a worker must do next, or None if it must ask again."""
        group = self._group
        if self._attempts.over is None and group_id in self._incomplete:
            return None
        if group is not None and group.id == group_id and self._attempts.over is None:
            self._open_once(group)
        if self._attempts.over is not None or group is None or group.id != group_id:
            return Leave(self._attempts.over or _REPLACED)
        self._hear(group, rank)
        if group.opened_at is None:
            return None
        unchecked = self._unchecked(group)
        self._look(group)
        if unchecked and group.verdict is None:
            if group.cancelled_at is not None:
                # Nothing is saved.
                self._conclude(group)
            elif time.monotonic() - group.opened_at > _CHECK_DEADLINE_S:
                what, remedy = f"the node did not report within {_CHECK_DEADLINE_S:g} s", "look at its storage and its GPUs"
                group.problems += [Problem(what, where=group.members[late].node, remedy=remedy) for late in unchecked]
                self._conclude_unfit(group)
        if group.verdict is not None or rank not in group.training_ranks:
            return Wait()
        training, node_id = group.training, group.members[rank].node_id
        assignment = Assignment(
            attempt=self._attempts.number,
            plan_path=group.plan_path,
            marker=group.marker,
            rank=group.training_ranks.index(rank),
            world_size=len(training),
            local_world_size=sum(member.node_id == node_id for member in training),
            address=training[0].address,
            port=training[0].port,
            peers=tuple(sorted({member.address for member in training})),
        )
        if unchecked:
            # Every worker listens at its port until it trains or leaves.
            others = tuple((member.node, member.address, member.port) for member in group.heads if member.rank != rank)
            return CheckNode(assignment, others) if rank in unchecked else None
        return Train(assignment, self._environment)

    def report_check(self, group_id: str, rank: int, report: MachineReport) -> None:
        """Accept a node's report on itself; if any node is unfit, the attempt ends before anything is loaded."""
        group = self._group
        if group is None or group.id != group_id or group.verdict is not None:
            return
        self._hear(group, rank)
        group.add_report(rank, report)
        if group.problems:
            self._conclude_unfit(group)

    def beat(self, group_id: str, rank: int, result: RankResult | None, sign: RankSign | None = None) -> BeatReply:
        """Accept a worker's heartbeat, with its rank's result once that has ended, and return what the worker must do."""
        group = self._group
        if group is None or group.id != group_id:
            return BeatReply(signal="KILL", verdict=Verdict(False, _REPLACED))
        self._hear(group, rank, sign)
        if result is not None and rank in group.training_ranks:
            group.ended.add(rank)
            if result == RankResult.FAILED and group.failed_at is None:
                group.failed_at = time.monotonic()
        self._look(group)
        if group.verdict is None and group.opened_at is not None:
            is_late = group.failed_at is not None and time.monotonic() - group.failed_at > _FAILURE_GRACE_S
            if is_late or group.is_over:
                self._conclude(group)
        stop_signal: str | None = None
        if group.failed_at is not None or group.verdict is not None:
            # As torch's elastic agent does: a collective would never complete without the rank that failed.
            stop_signal = "TERM"
        elif group.cancelled_at is not None:
            is_late = time.monotonic() - group.cancelled_at > self._plan.config.cluster.stop_grace_seconds
            stop_signal = "USR1" if group.saves and not is_late else "KILL"
        elif group.draining or group.resizing:
            stop_signal = "USR2"
        return BeatReply(
            signal=stop_signal,
            dump_stacks=group.liveness.wants_stacks(rank),
            hang=group.hung.get(rank),
            verdict=group.verdict,
        )

    def prepare_resize(self) -> ResizeProgress:
        """Ask the ranks to save, because Ray Train is about to replace the workers with more; finishing ranks continue."""
        group = self._group
        if group is None or group.opened_at is None or group.verdict is not None:
            return ResizeProgress.ENDED
        phases = group.phases
        if not group.resizing and "finishing" not in phases:
            group.resizing = True
            self._attempts.report("info", "Ray can place another number of workers: the run saves and restarts with them")
            with suppress(OSError, LauncherError):
                if self._attempts.is_starting():
                    # The ranks are still loading: they would react only after their first step, and there is nothing to save.
                    self._conclude(group)
        if group.verdict is not None:
            return ResizeProgress.ENDED
        return ResizeProgress.WRITING if phases & {"saving", "finishing"} else ResizeProgress.REQUESTED

    def _hear(self, group: Group, rank: int, sign: RankSign | None = None) -> None:
        group.heard_at = time.monotonic()
        group.liveness.hear(rank, sign)
        if group.verdict is None:
            self._idle_since = None

    def _open_once(self, group: Group) -> None:
        """Open the attempt of a complete group; possibly temporary failures are retried for a while.

        An exception in the workers would make Ray Train start new workers forever.
        """
        now = time.monotonic()
        if group.opened_at is not None or now - group.tried_at < _LOOK_S:
            return
        group.tried_at = now
        try:
            self._attempts.open(group)
            if group.opened_at is not None:
                self._num_early_failures, self._early_failure = 0, ""
        except ConfigError as error:
            self._attempts.end(error.problems[0].message, state="failed")
        except Exception as error:
            if now - group.created_at > _OPEN_DEADLINE_S:
                self._attempts.end(f"the attempt cannot be opened: {describe(error)}", state="failed")

    def _unchecked(self, group: Group) -> list[int]:
        """Return the ranks of the workers that have not yet reported on their nodes."""
        if not RaySection.of(self._plan.config.cluster).node_checks:
            return []
        return [head.rank for head in group.heads if head.rank not in group.reports]

    def _conclude_unfit(self, group: Group) -> None:
        """End an attempt with an unfit node before anything is loaded; the records of all ranks say why."""
        with suppress(OSError):
            for rank, member in enumerate(group.training):
                record = NodeEnded(node=rank, host=member.node, problems=tuple(group.problems))
                journal.append(self._run, self._attempts.number, record)
        self._conclude(group)

    def _look(self, group: Group) -> None:
        """Look for cancel requests, hung ranks, and nodes that Ray is about to lose.

        If storage or Ray does not answer, the next call tries again.
        """
        now = time.monotonic()
        if group.opened_at is None or group.verdict is not None or now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        with suppress(OSError, LauncherError):
            request = run_records.read_cancel(self._run, self._attempts.number)
            if request is not None:
                group.saves = request.save
                group.cancelled_at = group.cancelled_at or now
        # The node checks have their own deadline, and workers of a group that is ending may fall silent.
        if group.failed_at is None and not self._unchecked(group):
            for text in group.look_for_hangs():
                self._attempts.report("alert", text)
        if not group.draining and now - self._looked_at_drains_at > _DRAIN_LOOK_S:
            self._looked_at_drains_at = now
            draining: set[str] = set()
            with suppress(Exception):
                draining = self._draining_nodes()
            if names := sorted({member.node for member in group.members.values() if member.node_id in draining}):
                group.draining = True
                self._attempts.record_drain(names)

    def _conclude(self, group: Group) -> None:
        self._attempts.conclude(group)
        if group.verdict is not None and group.verdict.again:
            self._idle_since = time.monotonic()


class CoordinatorProcess(Coordinator):
    """The coordinator in its own process: only the run's user can access what it writes, whatever Ray's umask."""

    def __init__(self, *arguments: Any) -> None:
        os.umask(0o077)
        super().__init__(*arguments)


class CoordinatorActor:
    """Runs on the driver's node; workers call it through its `handle`.

    An actor that dies, for example for lack of memory, is replaced by another, which judges the previous attempt from the records
    on disk. `is_lost` is true until the replacement has answered.

    `attempt` is the driver's first attempt; `environment` holds the ranks' environment variables.
    """

    def __init__(self, plan_path: str, run: RunDir, attempt: int, environment: dict[str, str]) -> None:
        self.handle: Any = None
        self._plan_path, self._run, self._number, self._environment = plan_path, run, attempt, environment
        self._num_lost = 0
        self.is_lost = False
        # The driver and the thread that waits for Ray Train both call `state`.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the actor; raises what Ray raises."""
        import ray

        here, job = ray.get_runtime_context().get_node_id(), f"{os.uname().nodename}:{os.getpid()}"
        actor = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(CoordinatorProcess)
        self.handle = actor.remote(self._plan_path, self._number, job, draining_nodes, lost_nodes)
        ray.get(self.handle.set_environment.remote(self._environment), timeout=CALL_S)

    def state(self) -> CoordinatorState | None:
        """Return the coordinator's state, or None if it is busy (for example with slow storage) or has just been replaced."""
        import ray
        from ray.exceptions import ActorUnavailableError, GetTimeoutError

        with self._lock:
            try:
                state: CoordinatorState = ray.get(self.handle.state.remote(), timeout=CALL_S)
            except (GetTimeoutError, ActorUnavailableError):
                return None
            except deaths() as error:
                self._replace(error)
                return None
            self._number, self.is_lost = state.number, False
            if not state.idle_s:
                self._num_lost = 0
            return state

    def _replace(self, error: Exception) -> None:
        """Start another actor; if storage is unreadable right now, the next call retries.

        Raises:
            RayletLost: if no actor can be started on this node any more.
        """
        from ray.exceptions import RayError

        if (raylet := raylet_of_this_node()) is not None and raylet.has_ended:
            raise RayletLost(RAYLET_LOST)
        self.is_lost = True
        if self._num_lost >= _MAX_LOST:
            raise error
        try:
            self._number = newest_own_attempt(self._run, self._number)
        except (OSError, LauncherError):
            return
        self._num_lost += 1
        print(error, file=sys.stderr, flush=True)
        text = "the run's coordinator was killed or has ended: another replaces it, and the run restarts"
        with suppress(OSError):
            append_event(self._run, self._number, "alert", text)
        with suppress(OSError, LauncherError):
            journal.append(self._run, self._number, LostCoordinator())
        with suppress(OSError, LauncherError):
            if run_store.read_status(self._run).state in RUNNING_STATES:
                message = "the run's coordinator was killed or has ended; it waits for workers"
                run_store.update_status(self._run, state="pending", message=message)
        # The replacement may die too.
        with suppress(RayError):
            self.start()


def call_coordinator(handle: Any, method: str, *arguments: Any) -> Any:
    """Call the coordinator from a worker; retry for a while if it is busy or unreachable.

    Raises:
        CoordinatorLost: if its process has ended.
    """
    import ray
    from ray.exceptions import ActorUnavailableError, GetTimeoutError

    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ray.get(getattr(handle, method).remote(*arguments), timeout=WORKER_CALL_S)
        except (GetTimeoutError, ActorUnavailableError):
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_S)
        except deaths():
            raise CoordinatorLost("the coordinator's process was killed or has ended") from None


def deaths() -> tuple[type[Exception], ...]:
    """Return what Ray raises for an actor whose process has ended; the second is for a kill by Ray's memory monitor."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    return ActorDiedError, OutOfMemoryError


def shorten(error: Exception) -> str:
    """Return a Ray error's message as one line of limited length."""
    return " ".join(str(error).split())[:_MAX_MESSAGE_CHARS] or type(error).__name__
