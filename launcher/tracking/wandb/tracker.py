"""Weights & Biases, never in the way of training: what is said here is handed to a thread, which alone waits for W&B."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import SUPERSEDED, read_events
from launcher.tracking.wandb import session as wandb_session
from launcher.tracking.wandb.session import Checkpoint, Session, Unreachable
from launcher.tracking.wandb.steps import returns

# What finish() waits beyond W&B's own limits, which a hung wandb-core does not keep.
FINISH_GRACE_S = 10.0
# What the end waits beyond that for an exported model to be uploaded, and per byte.
EXPORT_GRACE_S = 60.0
_EXPORT_BYTES_PER_S = 20e6
# Between two tries to reach W&B, and between two looks whether it still sends.
RETRY_S = 60.0
# How seldom rows are sent where steps are short: one costs W&B half as much among others, and it uploads less often than that.
SEND_EVERY_S = 5.0
# How long a call may wait for W&B before that is told.
PATIENCE_S = 300.0
# Calls that may wait for W&B: hours of steps, and some ten MiB.
_MOST_PENDING = 10_000
# Artifacts are sent by a thread of their own, which asks the server and so may hang with it.
_MOST_ARTIFACTS = 100

Tell = Callable[..., None]


@dataclass(frozen=True)
class _Call:
    """What a session is to do. Where W&B is away, steps come later from metrics.jsonl, and other calls have to be kept."""

    run: Callable[[Session], None]
    step: int | None = None
    # Whether calls before this one were left out, as W&B took none.
    behind: bool = False
    at: float = field(default_factory=time.monotonic)


class WandbTracker:
    """Sends metrics, alerts, checkpoints and the summary to the W&B run of the plan's id.

    The metrics of a step are one row, handed on when the next step begins: W&B takes nothing more for a step that it has, and a
    rank may die between training and evaluation. An attempt that fails keeps its last row to itself: the next one comes to that
    step again, or sends it. Where steps are short, the rows of SEND_EVERY_S go together; all else goes at once.

    Nothing waits for W&B to start, and no trouble of W&B's is raised. Where it does not answer it is tried again all the while;
    a W&B process that dies is replaced. What W&B lacks then is sent from metrics.jsonl. Where W&B refuses the run, files are
    written that can be uploaded later. The first trouble is told as an alert, others once as information, through `tell` (kind,
    text), from within calls of this tracker. mode auto is online where W&B finds credentials, else offline. `on_stop` is called
    where a person presses Stop in the page.
    """

    def __init__(self, plan: LaunchPlan, run_dir: str | Path, *, tell: Tell, on_stop: Callable[[], None]) -> None:
        self._plan, self._run, self._tell, self._on_stop = plan, RunDir(Path(run_dir)), tell, on_stop
        self._best_loss = _best_checkpoint(self._run)
        self._offline = plan.config.tracking.mode == "offline"
        self._notes: deque[tuple[str, str, dict[str, Any]]] = deque()
        self._told: set[str] = set()
        self._calls: queue.Queue[_Call | None] = queue.Queue(_MOST_PENDING)
        self._urgent = threading.Event()
        self._artifacts: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_ARTIFACTS)
        self._kept: deque[_Call] = deque(maxlen=_MOST_ARTIFACTS)
        self._session: Session | None = None
        self._next_try = self._next_look = 0.0
        self._refused = False
        self._failure = ""
        self._last_step = -1
        # What has been measured at that step, until the next one begins.
        self._row: dict[str, float] = {}
        # When the call was made that the thread is at.
        self._at: float | None = None
        self._export_s = 0.0
        self._overflown = False
        self._alerted = False
        # W&B's process, written in Go, spends a quarter of its time on keeping many processors busy.
        os.environ.setdefault("GOMAXPROCS", "1")
        self._thread = _start(self._work, "wandb")
        self._artifact_thread = _start(self._work_artifacts, "wandb-artifacts")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step != self._last_step:
            self._send_row()
        self._last_step = step
        self._row |= metrics
        self._pass_on()

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """W&B sends alerts to whoever has asked it to; checkpoints are kept by reference, the export where asked for."""
        if kind == "alert":
            at = self._last_step if step is None and self._last_step >= 0 else step
            self._put(_Call(lambda session: session.alert(text, at)))
        elif kind == "checkpoint" and "path" in fields:
            loss: float | None = fields["eval_loss"]
            best = loss is not None and loss < self._best_loss
            if loss is not None:
                self._best_loss = min(loss, self._best_loss)
            checkpoint = Checkpoint(Path(fields["path"]), fields["saved_step"], loss, best)
            self._put(_Call(lambda session: self._later(lambda: session.log_checkpoint(checkpoint))))
        elif kind == "export" and "path" in fields and self._plan.config.tracking.log_export:
            folder = Path(fields["path"])
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            limit_s = self._export_s = EXPORT_GRACE_S + size / _EXPORT_BYTES_PER_S
            self._put(_Call(lambda session: self._later(lambda: session.log_export(folder, limit_s))))
            wait = f"the end waits for that for up to {limit_s / 60:.0f} minutes"
            self._tell("info", f"the exported model ({size / 2**30:.1f} GiB) is handed to Weights & Biases; {wait}")
        self._pass_on()

    def summary(self, values: Mapping[str, Any]) -> None:
        self._put(_Call(lambda session: session.summary(values)))

    def finish(self, state: str, *, everything: bool = False) -> None:
        """Upload what is pending, in at most FINISH_TIMEOUT_S + 2 * FINISH_GRACE_S seconds; an export has longer, by its size.

        With `everything`, the lines of metrics.jsonl that no session has sent go as well, even those of steps that no attempt
        has gone on from, and the last row of an attempt that has failed, unless its evaluation is missing.

        Where it took longer or failed, the files stay, and what is told says how to upload them, and whether all is in them.
        """
        if state == SUPERSEDED:
            # W&B's process would tell of an end, while the other attempt trains.
            self._next_try = math.inf
            _kill_core()
            return
        upto = math.inf if everything else self._last_step + (state != "failed")
        if state != "failed":
            self._send_row()
        given = threading.Event()

        def catch_up(session: Session) -> None:
            session.catch_up(upto)
            given.set()

        try:
            self._calls.put_nowait(_Call(catch_up, behind=self._overflown))
            self._calls.put(_Call(lambda session: self._finish(session, state)), timeout=FINISH_GRACE_S)
            self._calls.put_nowait(None)
        except queue.Full:
            self._failure = "it has not taken what was sent for long"
        self._urgent.set()
        limit = wandb_session.FINISH_TIMEOUT_S + 2 * FINISH_GRACE_S + self._export_s
        self._thread.join(limit)
        if self._thread.is_alive():
            # W&B waits for its process at exit too; without it, nothing is left to wait for.
            _kill_core()
            given.clear()
            self._failure = f"no answer in {limit:.0f} s"
        self._pass_on()
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, self._session)
        if self._failure:
            where = (
                "the data is on disk, upload it" if given.is_set() else "metrics.jsonl has it all; upload what W&B's files have"
            )
            rest = f"{where} with: {command}" if command else "metrics.jsonl has it all"
            text = f"Weights & Biases has not got everything ({self._failure}); {rest}"
            self._tell("info" if self._alerted else "alert", text, sync_command=command)
        elif self._offline:
            self._tell("info", f"Weights & Biases was offline; upload with: {command}", sync_command=command)

    def _send_row(self) -> None:
        if self._row:
            step, row, self._row = self._last_step, self._row, {}
            self._put(_Call(lambda session: session.log(step, row), step))

    def _put(self, call: _Call) -> None:
        """Hand a call to the thread. What is told of W&B comes after that: other trackers may hang with their storage."""
        if (at := self._at) is not None and (late_s := call.at - at) > PATIENCE_S:
            self._note_once("alert", f"W&B takes nothing: its process is {late_s:.0f} s behind; metrics.jsonl has it all")
        if self._thread.is_alive():
            try:
                self._calls.put_nowait(replace(call, behind=self._overflown))
                self._overflown = False
                if call.step is None:
                    self._urgent.set()
            except queue.Full:
                self._overflown = True
                self._note_once("alert", "W&B does not take what is sent; metrics.jsonl has it")
        self._pass_on()

    def _pass_on(self) -> None:
        """Tell what the threads have noted, within a call of who tells something."""
        while True:
            try:
                kind, text, fields = self._notes.popleft()
            except IndexError:
                # Another thread may take the last one, so it is not asked before whether there is one.
                return
            self._tell(kind, text, **fields)

    def _note_once(self, kind: str, text: str, **fields: Any) -> None:
        if text.partition(":")[0] not in self._told:
            self._told.add(text.partition(":")[0])
            # One warning of W&B's troubles is enough; the others stand in the log.
            self._notes.append(("info" if self._alerted else kind, text, fields))
            self._alerted = self._alerted or kind == "alert"

    # What follows runs in the threads.

    def _work(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            self._note_once("alert", f"W&B tracking has failed and is off: {self._failure}")

    def _serve(self) -> None:
        # Looking for a login imports the package, which takes a while.
        self._offline = not wandb_session.is_online(self._plan.config.tracking.mode)
        self._begin()
        while not self._refused and (call := self._next_call()) is not None:
            self._at = call.at
            session = self._session or self._begin()
            if session is None:
                self._at = None
                if call.step is None:
                    self._kept.append(call)
                continue
            self._carry_out(session, call)
            self._at = None
            self._look_whether_it_sends(session)
        if self._session is None and not self._refused and self._kept:
            self._write_files()

    def _next_call(self) -> _Call | None:
        if self._calls.empty():
            self._urgent.wait(SEND_EVERY_S)
            self._urgent.clear()
        return self._calls.get()

    def _begin(self) -> Session | None:
        """Start a session, unless the last try was just now; None where W&B does not answer, or refuses even to write files."""
        if time.monotonic() < self._next_try:
            return None
        try:
            session = self._session = Session(self._plan, self._run, offline=self._offline, on_stop=self._on_stop)
        except Unreachable as error:
            self._next_try = time.monotonic() + RETRY_S
            self._note_once("alert", f"{error.problems[0].what}; it is tried again, and training goes on")
            return None
        except ConfigError as error:
            what = error.problems[0].what
            if not self._offline:
                self._offline = True
                if (offline := self._begin()) is not None:
                    self._note_once("alert", f"this attempt goes on offline: {what}")
                return offline
            self._refused, self._failure = True, what
            self._note_once("alert", f"W&B does not track this attempt, metrics.jsonl does: {what}")
            return None
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, session) if session.offline else None
        where = f"see it at {session.url}" if session.url else f"offline; upload it with: {command}"
        self._note_once("info", f"Weights & Biases: {where}", url=session.url, sync_command=command)
        while self._kept:
            self._carry_out(session, self._kept.popleft())
        return session

    def _carry_out(self, session: Session, call: _Call) -> None:
        if call.behind:
            session.fall_behind()
        try:
            call.run(session)
        except Exception as error:
            if session is not self._session:
                return
            self._note_once("alert", f"W&B's process has failed: {type(error).__name__}: {error}; another is started")
            _kill_core()
            import wandb

            # It says farewell to the process that is gone.
            with suppress(Exception):
                wandb.teardown(exit_code=1)
            self._session = None
            if call.step is None:
                self._kept.append(call)
            self._begin()

    def _look_whether_it_sends(self, session: Session) -> None:
        if session.offline or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + RETRY_S
        if reason := session.given_up():
            self._note_once("alert", f"W&B takes nothing more: {reason}; the data is kept on disk")

    def _write_files(self) -> None:
        """W&B was away to the end: leave files that can be uploaded."""
        self._failure = "it has not answered"
        self._offline = True
        self._next_try = 0.0
        self._begin()

    def _finish(self, session: Session, state: str) -> None:
        self._artifacts.put(None)
        self._artifact_thread.join(FINISH_GRACE_S + self._export_s)
        if self._artifact_thread.is_alive():
            self._note_once("alert", "W&B did not take all artifacts in time; checkpoints and the export are on disk")
        try:
            session.finish(state)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"

    def _later(self, send: Callable[[], None]) -> None:
        try:
            self._artifacts.put_nowait(send)
        except queue.Full:
            self._note_once("alert", "W&B does not take artifacts; checkpoints are on disk")

    def _work_artifacts(self) -> None:
        while (send := self._artifacts.get()) is not None:
            try:
                send()
            except Exception as error:
                self._note_once("alert", f"W&B did not take an artifact: {type(error).__name__}: {error}")


def _best_checkpoint(run: RunDir) -> float:
    """The lowest held-out loss of the checkpoints that were committed before and that no person has gone back behind."""
    returned = returns(run)
    losses = [
        event["fields"].get("eval_loss")
        for event in read_events(run.events)
        if event["kind"] == "checkpoint"
        and not any(number > event["attempt"] and event["fields"]["saved_step"] > step for number, step in returned.items())
    ]
    return min((loss for loss in losses if isinstance(loss, float)), default=float("inf"))


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def _kill_core() -> None:
    for child in psutil.Process().children():
        if child.name().startswith("wandb-core"):
            child.kill()
