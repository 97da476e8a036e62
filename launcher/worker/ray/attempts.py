"""The attempts of a run on Ray, one for each group of workers that trains: opened, judged, and what follows them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from launcher import atomic_files, json_records, run_records, run_store
from launcher.checkpoint import store
from launcher.config.ray import RaySection
from launcher.errors import LauncherError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Decision, decide
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, DrainRecord
from launcher.tracking import goodput
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.ray.worker_group import Group, Member, require_private

_DRAINED = "drained.json"
# What the run's state says until its ranks speak for themselves.
_STARTING = "starting"
_LOCK_WAIT_S = 60.0
# From the second time on that a node is left out to its next trial, for which the run begins again.
_TRIAL_S = 6 * 3600.0


class Attempts:
    """`number` is the newest, the first that which the submitting side has opened; `over` is why none follows, once that is so.

    `gone` tells the ids of the nodes that Ray has lost.
    """

    def __init__(self, plan_path: str, plan: LaunchPlan, number: int, job: str, gone: Callable[[], set[str]]) -> None:
        self._plan_path, self._plan, self._run = plan_path, plan, RunDir(Path(plan.run_dir))
        self._section = RaySection.of(plan.config.cluster)
        self.number = number
        self.over: str | None = None
        self._job = job
        self._gone = gone
        # Nodes that made an attempt of this run fail, and that the next ones do without where they can.
        self._unfit: tuple[str, ...] = ()
        # Those that the last group misses, and when each that was ever missed is to be tried again.
        self._missed: set[str] = set()
        self._trial_at: dict[str, float] = {}
        # Of the last group that trained: its workers, and those of them that do not stay idle.
        self._size = 0
        self._trained: list[Member] = []

    def open(self, group: Group) -> None:
        """Number the attempt of a group that is complete, with a plan for as many ranks as divide the batch, or end the run.

        Raises:
            ConfigError: where the group cannot train.
            LauncherError, OSError: where the run cannot be read or written now; to be tried again.
        """
        run = self._run
        with run_store.starting(run, wait_s=_LOCK_WAIT_S):
            if run_store.newest_attempt(run) != self.number:
                self.end("another command has started the run again", state=None)
                return
            attempt = run_store.read_attempt(run, self.number)
            if attempt.job is not None:
                decision = self._after(group)
                if not decision.again:
                    # The run is held meanwhile: nobody starts it before that is written.
                    self.end(decision.reason, decision.state)
                    return
                self._unfit = decision.exclude
                self.number = run_store.next_attempt(run, Attempt(store.newest_step(run.checkpoints), automatic=True))
                attempt = run_store.read_attempt(run, self.number)
            plan = group.choose(self._plan, self._unfit)
            head = group.training[0]
            require_private(head, self._section.allow_public_address)
            group.plan_path = self._plan_path
            if not plan == self._plan == run_store.load_plan(run):
                # The plan of an attempt without one of its own is that of the attempt before.
                group.plan_path = str(run_store.write_plan(run, self.number, plan))
            begun = replace(
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
            # The last that may fail: tried again after it, this attempt would count as one that was lost.
            run_store.write_attempt(run, self.number, begun)
        with suppress(OSError, LauncherError):
            run_store.update_status(run, state="running", attempt=self.number, message=_STARTING)
        self.say(*group.composition(self.number))
        group.opened_at, self._size, self._trained = time.monotonic(), group.size, group.training
        for node in group.missed - self._missed:
            # What a check finds may pass within seconds; a node that is broken is not to cost a restart with every checkpoint.
            self._trial_at[node] = group.opened_at + (_TRIAL_S if node in self._trial_at else 0.0)
        self._missed = group.missed

    def conclude(self, group: Group) -> None:
        """Judge the attempt of a group that has said all, and tell it its `verdict`: whether Ray Train is to start the next."""
        try:
            run_store.fence(self._run, self.number, refresh=True)
            attempt = run_store.read_attempt(self._run, self.number)
            state = "PREEMPTED" if group.drained else "RESIZED" if group.resizing else ""
            concluded = postmortem.conclude(self._run, self.number, attempt, self._section, state, lost_nodes=self.lost())
        except Superseded as error:
            group.verdict = {"again": False, "reason": error.problems[0].what}
            self.end(error.problems[0].what, state=None)
            return
        except (OSError, LauncherError) as error:
            # The next start judges by what the ranks have left.
            group.verdict = {"again": True, "reason": f"how the attempt ended cannot be read now: {error}"}
            return
        decision = concluded.decision
        # A disk that is full must not keep the run from going on.
        with suppress(OSError, LauncherError):
            concluded.record(self._run, self.number)
            run_store.update_status(self._run, state=decision.state, step=concluded.ending.step, message=concluded.message)
        if concluded.alert is not None:
            self.say("alert", concluded.alert)
        group.verdict = {"again": decision.again, "reason": concluded.message}
        if not decision.again:
            self.over = concluded.message

    def end(self, why: str, state: str | None) -> None:
        """No other attempt follows; `state` is the run's from now on, None where another writes that."""
        self.over = why
        if state in ("failed", "preempted"):
            self.say("alert", f"the run ends: {why}")
        if state is not None:
            with suppress(OSError, LauncherError):
                run_store.update_status(self._run, state=state, message=why)

    def is_starting(self) -> bool:
        """Whether the ranks of the newest have not spoken for themselves yet; raises what reading the run raises."""
        return run_store.read_status(self._run).message == _STARTING

    def note_drain(self, nodes: Sequence[str]) -> None:
        """Ray is about to lose these nodes: whoever judges the attempt is to know, whatever becomes of its workers."""
        self.say("alert", f"Ray is about to lose {', '.join(nodes)}: the run saves")
        with suppress(OSError):
            json_records.write(self._run.attempt(self.number) / _DRAINED, DrainRecord(tuple(nodes), time.time()))

    def due_for_trial(self, group: Group, now: float) -> list[str]:
        """The nodes that a group does without and that are to be tried again."""
        return sorted(node for node in group.missed if self._trial_at[node] <= now)

    def lost(self) -> list[str] | None:
        """The nodes of the last group that trained which Ray has lost since, by name; None where it does not tell."""
        if self._trained:
            with suppress(Exception):
                gone = self._gone()
                return sorted({member.node for member in self._trained if member.node_id in gone})
        return None

    def say(self, kind: str, text: str) -> None:
        """To those who follow the run; that it cannot be written is no reason to stop."""
        with suppress(OSError):
            append_event(self._run, self.number, kind, text)

    def _after(self, group: Group) -> Decision:
        """What follows the attempt before, whose workers may have left no word: more of them came, or nodes were lost."""
        folder = self._run.attempt(self.number)
        if self._run.cancel(self.number).is_file():
            return Decision(False, "cancelled", "cancelled while it waited for workers")
        grown = not run_records.exit_file(self._run, self.number).is_file() and 0 < self._size < group.size
        state = "RESIZED" if grown else "PREEMPTED" if (folder / _DRAINED).is_file() else ""
        tell = partial(self.say, "alert")
        ended = postmortem.end_of_attempt(self._run, self.number, self._section, state, self.lost(), tell)
        decision = decide(ended, postmortem.history(self._run, self.number), self._section)
        reached = goodput.reached_limit(self._run, self._plan, time.time()) if decision.again else ""
        return Decision(False, "preempted", reached) if reached else decision
