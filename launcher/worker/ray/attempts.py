"""The attempts of a run on Ray, one per group of workers: opens and judges them, decides what follows, and records the end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from launcher import atomic_files, run_store
from launcher.checkpoint import store
from launcher.clusters import network
from launcher.config.sections.ray import RaySection
from launcher.errors import ConfigError, LauncherError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Decision, decide
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Attempt
from launcher.runs import journal
from launcher.runs.journal import NodesDraining
from launcher.tracking import goodput
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.postmortem import Evidence
from launcher.worker.ray.messages import Member, Verdict
from launcher.worker.ray.worker_group import Group

# The status message until the ranks write their own.
_STARTING = "starting"
_LOCK_WAIT_S = 60.0
# How long and how often to retry a read while storage does not answer.
_STORAGE_S, _RETRY_S = 600.0, 1.0

T = TypeVar("T")


class Attempts:
    """`number` is the newest attempt; the submit side opened the first. `over` is why no attempt follows, None while one may.

    `lost_nodes` returns the ids of the nodes that Ray has lost.
    """

    def __init__(self, plan_path: str, plan: LaunchPlan, number: int, job: str, lost_nodes: Callable[[], set[str]]) -> None:
        self._plan_path, self._plan, self._run = plan_path, plan, RunDir(Path(plan.run_dir))
        self._section = RaySection.of(plan.config.cluster)
        self.number = number
        self.over: str | None = None
        self._job = job
        self._lost_nodes = lost_nodes
        # Nodes that made an attempt fail; later attempts exclude them if possible.
        self._unfit: tuple[str, ...] = ()
        # The last group that trained: its number of workers, and the workers that train.
        self._size = 0
        self._trained: list[Member] = []

    def open(self, group: Group) -> None:
        """Open the attempt of a complete group, with a plan for a number of ranks that divides the batch, or end the run.

        Raises:
            ConfigError: if the group cannot train.
            LauncherError, OSError: if the run cannot be read or written right now; the caller retries.
        """
        run = self._run
        with run_store.start_lock(run, wait_s=_LOCK_WAIT_S):
            if run_store.newest_attempt(run) != self.number:
                self.end("another command has started the run again", state=None)
                return
            attempt = run_store.read_attempt(run, self.number)
            if attempt.job is not None:
                decision = self._decide_next(group)
                if not decision.again:
                    # The run is locked meanwhile, so that no command starts it before its end is written.
                    self.end(decision.reason, decision.state)
                    return
                self._unfit = decision.exclude
                self.number = run_store.create_attempt(run, Attempt(store.newest_step(run.checkpoints), automatic=True))
                attempt = run_store.read_attempt(run, self.number)
            plan = group.choose_training_ranks(self._plan, self._unfit)
            head = group.training[0]
            if self._section.interface is None and network.is_public(head.address):
                public = f"the ranks would connect to each other over a public address: {head.node} at {head.address}"
                raise ConfigError(f"{public}; set cluster.interface")
            group.plan_path = self._plan_path
            if not plan == self._plan == run_store.load_plan(run):
                # An attempt without its own plan uses the previous attempt's.
                group.plan_path = str(run_store.write_plan(run, self.number, plan))
            opened = replace(
                attempt,
                job=self._job,
                nodes=tuple(member.node for member in group.training),
                address=head.address,
                port=head.port,
                begun_at=time.time(),
                num_workers=group.size,
            )
            group.marker = secrets.token_hex(16)
            atomic_files.write_text(run.attempt(self.number) / "marker", group.marker)
            # This must be the last step that can fail: if the attempt were opened again after it, it would count as lost.
            run_store.write_attempt(run, self.number, opened)
            postmortem.reserve_disk_space(run, self.number)
        with suppress(OSError, LauncherError):
            run_store.update_status(run, state="running", attempt=self.number, message=_STARTING)
        self.report(*group.describe_composition(self.number))
        group.opened_at, self._size, self._trained = time.monotonic(), group.size, group.training

    def conclude(self, group: Group) -> None:
        """Judge the attempt of a group whose ranks have ended, and set the verdict: whether Ray Train starts another group."""
        try:
            run_store.fence(self._run, self.number, refresh=True)
            attempt = run_store.read_attempt(self._run, self.number)
            state = "PREEMPTED" if group.draining else "RESIZED" if group.resizing else ""
            conclusion = postmortem.conclude(
                self._run, self.number, attempt, self._section, Evidence(state, lost_nodes=self.find_lost_nodes())
            )
        except Superseded as error:
            group.verdict = Verdict(False, error.problems[0].message)
            self.end(error.problems[0].message, state=None)
            return
        except (OSError, LauncherError) as error:
            # The next start judges by the records of the ranks.
            group.verdict = Verdict(True, f"how the attempt ended cannot be read now: {error}")
            return
        decision = conclusion.decision
        conclusion.write(self._run, self.number)
        # A full disk must not stop the run from continuing.
        with suppress(OSError, LauncherError):
            run_store.update_status(self._run, state=decision.state, step=conclusion.ending.step, message=conclusion.message)
        postmortem.release_disk_space(self._run, self.number)
        group.verdict = Verdict(decision.again, conclusion.message)
        if not decision.again:
            self.over = conclusion.message

    def end(self, reason: str, state: str | None) -> None:
        """End the run: no attempt follows. `state` becomes the run's state; None if another process writes it."""
        self.over = reason
        if state in ("failed", "preempted"):
            self.report("alert", f"the run ends: {reason}")
        if state is not None:
            with suppress(OSError, LauncherError):
                run_store.update_status(self._run, state=state, message=reason)

    def is_starting(self) -> bool:
        """Return whether the newest attempt's ranks have not written a status yet; raises what reading the run raises."""
        return run_store.read_status(self._run).message == _STARTING

    def record_drain(self, nodes: Sequence[str]) -> None:
        """Record for the postmortem that Ray is about to lose these nodes, even if their workers leave no record."""
        self.report("alert", f"Ray is about to lose {', '.join(nodes)}: the run saves")
        with suppress(OSError):
            journal.append(self._run, self.number, NodesDraining(nodes=tuple(nodes)))

    def find_lost_nodes(self) -> list[str] | None:
        """Return the names of training nodes that Ray has lost since the attempt began, or None if unknown."""
        if self._trained:
            with suppress(Exception):
                lost = self._lost_nodes()
                return sorted({member.node for member in self._trained if member.node_id in lost})
        return None

    def report(self, kind: str, text: str) -> None:
        """Append an event; a failed write does not stop the run."""
        with suppress(OSError):
            append_event(self._run, self.number, kind, text)

    def _decide_next(self, group: Group) -> Decision:
        """Decide what follows the previous attempt; its workers may have left no records."""
        if self._run.cancel(self.number).is_file():
            return Decision(False, "cancelled", "cancelled while it waited for workers")
        known = journal.read_state(self._run, self.number)
        grown = known.ended is None and 0 < self._size < group.size
        state = "RESIZED" if grown else "PREEMPTED" if known.draining else ""
        on_alert = partial(self.report, "alert")
        ended = postmortem.end_of_attempt(
            self._run, self.number, self._section, Evidence(state, lost_nodes=self.find_lost_nodes()), on_alert
        )
        decision = decide(ended, postmortem.history(self._run, self.number), self._section)
        reached = goodput.reached_limit(self._run, self._plan, time.time()) if decision.again else ""
        return Decision(False, "preempted", reached) if reached else decision


def retry(read: Callable[[], T]) -> T:
    """Call `read`; retry for a while if storage does not answer.

    Raises:
        OSError: the last error.
    """
    return Retrying(
        retry=retry_if_exception_type(OSError),
        stop=stop_after_delay(_STORAGE_S),
        wait=wait_fixed(_RETRY_S),
        reraise=True,
    )(read)


def record_end(run: RunDir, attempt: int, state: str, message: str) -> None:
    """Write the state of a run, preceded by an alert for a failure, unless the state is final or another command has restarted
    the run.
    """

    def write() -> None:
        run_store.fence(run, attempt, refresh=True)
        if run_store.read_status(run).state not in RUNNING_STATES:
            return
        with suppress(OSError):
            if state == "failed":
                append_event(run, attempt, "alert", f"the run ends: {message}")
        run_store.update_status(run, state=state, message=message)

    with suppress(OSError, LauncherError):
        retry(write)


def newest_own_attempt(run: RunDir, attempt: int) -> int:
    """Return the newest attempt of the driver whose first attempt was `attempt`.

    An attempt that another command has started since is not taken over.
    """
    while run.attempt(attempt + 1).exists() and run_store.read_attempt(run, attempt + 1).automatic:
        attempt += 1
    return attempt
