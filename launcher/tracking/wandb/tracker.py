"""The W&B tracker. Calls only queue work for a thread, so that training never waits for W&B."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import SUPERSEDED, read_events
from launcher.tracking.wandb import core_process, local_settings
from launcher.tracking.wandb import session as wandb_session
from launcher.tracking.wandb.session import CheckpointReference, Session, Unreachable
from launcher.tracking.wandb.steps import returns

# Time that finish() waits beyond W&B's own limits, which a hung wandb-core does not keep.
FINISH_GRACE_S = 10.0
# Further time that the end of a run waits for the upload of an exported model, and the upload rate that it assumes.
EXPORT_GRACE_S = 60.0
_EXPORT_BYTES_PER_S = 20e6
# Interval between attempts to reach W&B, and between checks that it still uploads.
RETRY_S = 60.0
# Number of times that W&B's process may fail within RETRY_S before the next restart waits for RETRY_S.
_MAX_FAILURES = 5
# Interval at which rows of short steps are sent: a batch halves the cost of a row, and W&B uploads less often.
SEND_EVERY_S = 5.0
# Age of a queued call at which an alert is sent.
LATE_CALL_S = 300.0
# Capacity of the queue for W&B: hours of steps, about ten MiB.
_MOST_PENDING = 10_000
# Capacity of the queue for artifacts. They have a separate thread because their calls wait for the server.
_MOST_ARTIFACTS = 100

SendEvent = Callable[..., None]


@dataclass(frozen=True)
class _Call:
    """A call to the session. Without W&B, steps are sent later from metrics.jsonl, and other calls are kept."""

    run: Callable[[Session], None]
    step: int | None = None
    # Whether calls before this one were dropped because the queue was full.
    behind: bool = False
    at: float = field(default_factory=time.monotonic)


class WandbTracker:
    """Sends metrics, alerts, checkpoints and the summary to the W&B run with the plan's id.

    The metrics of a step are one row, queued when the next step begins: W&B accepts a step only once, and a rank may die between
    training and evaluation. A failed attempt does not send its last row: the next attempt repeats that step, or sends the row.
    Rows of short steps are sent together every SEND_EVERY_S; everything else at once.

    No call waits for W&B or raises its errors. The thread retries an unreachable server, and restarts a W&B process that died;
    then the missing steps are sent from metrics.jsonl. If W&B refuses the run, offline files are written for a later upload.
    The first problem is an alert, later ones are information, each kind once. They are sent through `send_event` (kind, text)
    from within calls of this tracker. Mode auto is online if W&B finds credentials, else offline. `on_stop` is called when a
    person presses Stop on the run's page.
    """

    def __init__(self, plan: LaunchPlan, run_dir: str | Path, *, send_event: SendEvent, on_stop: Callable[[], None]) -> None:
        self._plan, self._run, self._send_event, self._on_stop = plan, RunDir(Path(run_dir)), send_event, on_stop
        self._best_loss = _best_checkpoint(self._run, self._plan.config.checkpoint.best_set)
        self._offline = plan.config.tracking.mode == "offline"
        self._notes: deque[tuple[str, str, dict[str, Any]]] = deque()
        self._noted_kinds: set[str] = set()
        self._calls: queue.Queue[_Call | None] = queue.Queue(_MOST_PENDING)
        self._urgent = threading.Event()
        self._artifacts: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_ARTIFACTS)
        self._kept: deque[_Call] = deque(maxlen=_MOST_ARTIFACTS)
        self._session: Session | None = None
        self._next_try = self._next_check = 0.0
        self._failed_at: deque[float] = deque(maxlen=_MAX_FAILURES)
        self._refused = False
        self._failure = ""
        self._last_step = -1
        # The metrics of the current step, until the next step begins.
        self._row: dict[str, float] = {}
        # When the call that the thread is handling was made.
        self._call_made_at: float | None = None
        self._export_s = 0.0
        self._dropped_calls = False
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
        self._send_notes()

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Send an alert, a reference to a checkpoint, or, if configured, the exported model; ignore other kinds."""
        if kind == "alert":
            at = self._last_step if step is None and self._last_step >= 0 else step
            self._put(_Call(lambda session: session.alert(text, at)))
        elif kind == "checkpoint" and "path" in fields:
            loss: float | None = fields["eval_loss"]
            best = loss is not None and loss < self._best_loss
            if loss is not None:
                self._best_loss = min(loss, self._best_loss)
            checkpoint = CheckpointReference(Path(fields["path"]), fields["saved_step"], loss, best)
            self._put(_Call(lambda session: self._queue_artifact(lambda: session.log_checkpoint(checkpoint))))
        elif kind == "export" and "path" in fields and self._plan.config.tracking.log_export:
            folder = Path(fields["path"])
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            limit_s = self._export_s = EXPORT_GRACE_S + size / _EXPORT_BYTES_PER_S
            self._put(_Call(lambda session: self._queue_artifact(lambda: session.log_export(folder, limit_s))))
            wait = f"the run waits for it at its end for up to {limit_s / 60:.0f} minutes"
            self._send_event("info", f"uploading the exported model ({size / 2**30:.1f} GiB) to Weights & Biases; {wait}")
        self._send_notes()

    def summary(self, values: Mapping[str, Any]) -> None:
        self._put(_Call(lambda session: session.summary(values)))

    def finish(self, state: str, *, everything: bool = False) -> None:
        """Upload what is pending, in at most FINISH_TIMEOUT_S + 2 * FINISH_GRACE_S seconds, plus time for an export.

        With `everything`, also send all lines of metrics.jsonl that W&B lacks, even of discarded steps, and the last row of a
        failed attempt unless its evaluation is missing.

        If the upload fails or takes longer, the files stay, and an event has the command that uploads them.
        """
        if state == SUPERSEDED:
            # W&B's process would finish the run while the other attempt trains.
            self._next_try = math.inf
            _kill_core()
            return
        end_step = math.inf if everything else self._last_step + (state != "failed")
        if state != "failed":
            self._send_row()
        sent_all = threading.Event()

        def catch_up(session: Session) -> None:
            session.catch_up(end_step)
            sent_all.set()

        try:
            self._calls.put_nowait(_Call(catch_up, behind=self._dropped_calls))
            self._calls.put(_Call(lambda session: self._finish(session, state)), timeout=FINISH_GRACE_S)
            self._calls.put_nowait(None)
        except queue.Full:
            self._failure = "its queue stayed full"
        self._urgent.set()
        limit = wandb_session.FINISH_TIMEOUT_S + 2 * FINISH_GRACE_S + self._export_s
        self._thread.join(limit)
        if self._thread.is_alive():
            # W&B also waits for its process at exit; without the process there is nothing to wait for.
            _kill_core()
            sent_all.clear()
            self._failure = f"no answer in {limit:.0f} s"
        self._send_notes()
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, self._session)
        if self._failure:
            where = (
                "the data is on disk; upload it"
                if sent_all.is_set()
                else "metrics.jsonl has all data; upload what W&B's files contain"
            )
            rest = f"{where} with the command that `status` shows" if command else "metrics.jsonl has all data"
            text = f"Weights & Biases does not have all data ({self._failure}); {rest}"
            self._send_event("info" if self._alerted else "alert", text, sync_command=command)
        elif self._offline:
            text = "Weights & Biases was offline; upload the run with the command that `status` shows"
            self._send_event("info", text, sync_command=command, is_closing=True)

    def _send_row(self) -> None:
        if self._row:
            step, row, self._row = self._last_step, self._row, {}
            self._put(_Call(lambda session: session.log(step, row), step))

    def _put(self, call: _Call) -> None:
        """Queue a call, then send the noted events: other trackers may hang with their storage."""
        if (made_at := self._call_made_at) is not None and (late_s := call.at - made_at) > LATE_CALL_S:
            self._note_once("alert", f"W&B is behind: its process is {late_s:.0f} s late; metrics.jsonl has all data")
        if self._thread.is_alive():
            try:
                self._calls.put_nowait(replace(call, behind=self._dropped_calls))
                self._dropped_calls = False
                if call.step is None:
                    self._urgent.set()
            except queue.Full:
                self._dropped_calls = True
                self._note_once("alert", "the queue for W&B is full; metrics.jsonl has all data")
        self._send_notes()

    def _send_notes(self) -> None:
        """Send the events that the threads have noted, within a call of the training thread."""
        while True:
            try:
                kind, text, fields = self._notes.popleft()
            except IndexError:
                # Another thread may take the last one, so checking for one first would not help.
                return
            self._send_event(kind, text, **fields)

    def _note_once(self, kind: str, text: str, **fields: Any) -> None:
        if text.partition(":")[0] not in self._noted_kinds:
            self._noted_kinds.add(text.partition(":")[0])
            # One alert about W&B is enough; the others are information.
            self._notes.append(("info" if self._alerted else kind, text, fields))
            self._alerted = self._alerted or kind == "alert"

    # The code below runs in the threads.

    def _work(self) -> None:
        try:
            self._serve()
        except (Exception, SystemExit) as error:
            # SystemExit would end the thread without a message.
            self._failure = f"{type(error).__name__}: {error}"
            self._note_once("alert", f"W&B tracking failed and is off for this attempt: {self._failure}")

    def _serve(self) -> None:
        if not self._offline and (problem := local_settings.find_problem()) is not None:
            raise ConfigError(problem)
        local_settings.leave_folder_of_others(only_this_thread=True)
        # The search for a login imports W&B's package, which takes a while.
        self._offline = not wandb_session.is_online(self._plan.config.tracking.mode)
        self._start_session()
        while not self._refused and (call := self._next_call()) is not None:
            self._call_made_at = call.at
            session = self._session or self._start_session()
            if session is None:
                self._call_made_at = None
                if call.step is None:
                    self._kept.append(call)
                continue
            self._execute(session, call)
            self._call_made_at = None
            self._check_upload(session)
        if self._session is None and not self._refused and self._kept:
            self._write_files()

    def _next_call(self) -> _Call | None:
        if self._calls.empty():
            self._urgent.wait(SEND_EVERY_S)
            self._urgent.clear()
        return self._calls.get()

    def _start_session(self) -> Session | None:
        """Start a session; None soon after a failed try, if W&B does not answer, or if it refuses even offline files."""
        if time.monotonic() < self._next_try:
            return None
        try:
            session = self._session = Session(self._plan, self._run, offline=self._offline, on_stop=self._on_stop)
        except Unreachable as error:
            self._next_try = time.monotonic() + RETRY_S
            self._note_once("alert", f"{error.problems[0].message}; the launcher retries, and training continues")
            return None
        except ConfigError as error:
            reason = error.problems[0].message
            if not self._offline:
                self._offline = True
                if (offline := self._start_session()) is not None:
                    self._note_once("alert", f"this attempt is tracked offline: {reason}")
                return offline
            self._refused, self._failure = True, reason
            self._note_once("alert", f"this attempt is not tracked in W&B, only in metrics.jsonl: {reason}")
            return None
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, session) if session.offline else None
        where = f"see it at {session.url}" if session.url else "offline"
        self._note_once("info", f"Weights & Biases: {where}", url=session.url, sync_command=command)
        # A call that fails starts another session, or waits for one.
        while self._kept and self._session is session:
            self._execute(session, self._kept.popleft())
        return self._session

    def _execute(self, session: Session, call: _Call) -> None:
        if call.behind:
            session.read_again()
        try:
            session.require_core()
            call.run(session)
        except Exception as error:
            if session is not self._session:
                return
            self._note_once("alert", f"W&B's process failed: {type(error).__name__}: {error}; the launcher restarts it")
            _kill_core()
            core_process.leave()
            self._session = None
            if call.step is None:
                self._kept.append(call)
            self._failed_at.append(time.monotonic())
            if len(self._failed_at) == _MAX_FAILURES and self._failed_at[-1] - self._failed_at[0] < RETRY_S:
                self._next_try = max(self._next_try, self._failed_at[-1] + RETRY_S)
            self._start_session()

    def _check_upload(self, session: Session) -> None:
        if session.offline or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + RETRY_S
        if reason := session.upload_failure():
            self._note_once("alert", f"W&B has stopped uploading: {reason}; the data is kept on disk")

    def _write_files(self) -> None:
        """Write offline files, because W&B stayed unreachable until the end."""
        self._failure = "it never answered"
        self._offline = True
        self._next_try = 0.0
        self._start_session()

    def _finish(self, session: Session, state: str) -> None:
        self._artifacts.put(None)
        self._artifact_thread.join(FINISH_GRACE_S + self._export_s)
        if self._artifact_thread.is_alive():
            self._note_once("alert", "W&B did not upload all artifacts in time; checkpoints and the export are on disk")
        try:
            session.finish(state)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"

    def _queue_artifact(self, send: Callable[[], None]) -> None:
        try:
            self._artifacts.put_nowait(send)
        except queue.Full:
            self._note_once("alert", "the queue for W&B artifacts is full; checkpoints are on disk")

    def _work_artifacts(self) -> None:
        while (send := self._artifacts.get()) is not None:
            try:
                send()
            except Exception as error:
                self._note_once("alert", f"W&B did not accept an artifact: {type(error).__name__}: {error}")


def _best_checkpoint(run: RunDir, best_set: str) -> float:
    """Return the lowest loss of the run's checkpoints on `best_set`, except those after a step that a person returned to."""
    returned = returns(run)
    losses = [
        event["fields"].get("eval_loss")
        for event in read_events(run.events)
        if event["kind"] == "checkpoint"
        and event["fields"].get("eval_set", "held_out") == best_set
        and not any(number > event["attempt"] and event["fields"]["saved_step"] > step for number, step in returned.items())
    ]
    return min((loss for loss in losses if isinstance(loss, float)), default=float("inf"))


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def _kill_core() -> None:
    for process in core_process.running():
        process.kill()
