"""The W&B tracker. Calls only queue work for a thread, so that training never waits for W&B."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import SUPERSEDED
from launcher.tracking.wandb import session as wandb_session
from launcher.tracking.wandb.session import Session, is_online, kill_core, leave_core

# Time that finish() waits beyond W&B's own limits, which a hung wandb-core does not keep.
FINISH_GRACE_S = 10.0
# Interval at which rows of short steps are sent: a batch halves the cost of a row, and W&B uploads less often.
SEND_EVERY_S = 5.0
# Capacity of the queue for W&B: hours of steps, about ten MiB.
_MOST_PENDING = 10_000

SendEvent = Callable[..., None]


class WandbTracker:
    """Sends metrics, alerts and the summary to the W&B run with the plan's id.

    The metrics of a step are one row, queued when the next step begins: W&B accepts a step only once, and a rank may die between
    training and evaluation. A failed attempt does not send its last row: the next attempt repeats that step, or sends the row.
    Rows of short steps are sent together every SEND_EVERY_S; everything else at once.

    No call waits for W&B or raises its errors. If W&B cannot be reached or refuses the run at the start, the attempt is tracked
    offline. If its process fails later, the steps that W&B lacks are sent from metrics.jsonl at the end. The first problem is an
    alert, later ones are information, each kind once. They are sent through `send_event` (kind, text) from within calls of this
    tracker. Mode auto is online if W&B finds credentials, else offline. `on_stop` is called when a person presses Stop on the
    run's page.
    """

    def __init__(self, plan: LaunchPlan, run_dir: str | Path, *, send_event: SendEvent, on_stop: Callable[[], None]) -> None:
        self._plan, self._run, self._send_event, self._on_stop = plan, RunDir(Path(run_dir)), send_event, on_stop
        self._offline = plan.config.tracking.mode == "offline"
        self._notes: deque[tuple[str, str, dict[str, Any]]] = deque()
        self._noted_kinds: set[str] = set()
        # None is the end.
        self._calls: queue.Queue[Callable[[Session], None] | None] = queue.Queue(_MOST_PENDING)
        self._urgent = threading.Event()
        self._session: Session | None = None
        self._end: Callable[[Session], None] = lambda session: None
        self._failure = ""
        self._last_step = -1
        # The metrics of the current step, until the next step begins.
        self._row: dict[str, float] = {}
        self._is_behind = self._alerted = False
        # W&B's process, written in Go, spends a quarter of its time on keeping many processors busy.
        os.environ.setdefault("GOMAXPROCS", "1")
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step != self._last_step:
            self._send_row()
        self._last_step = step
        self._row |= metrics
        self._send_notes()

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Send an alert; ignore other kinds."""
        if kind == "alert":
            at = self._last_step if step is None and self._last_step >= 0 else step
            self._put(lambda session: session.alert(text, at))
            self._urgent.set()
        self._send_notes()

    def summary(self, values: Mapping[str, Any]) -> None:
        self._put(lambda session: session.summary(values))

    def finish(self, state: str, *, everything: bool = False) -> None:
        """Upload what is pending, in at most FINISH_TIMEOUT_S + 2 * FINISH_GRACE_S seconds.

        With `everything`, also send all lines of metrics.jsonl that W&B lacks, even of discarded steps, and the last row of a
        failed attempt unless its evaluation is missing.

        If the upload fails or takes longer, the files stay, and an event has the command that uploads them.
        """
        if state == SUPERSEDED:
            # W&B's process would finish the run while the other attempt trains.
            kill_core()
            return
        end_step = math.inf if everything else self._last_step + (state != "failed")
        if state != "failed":
            self._send_row()
        has_sent_all = threading.Event()

        def end(session: Session) -> None:
            session.catch_up(end_step)
            has_sent_all.set()
            session.finish(state)

        self._end = end
        self._urgent.set()
        with suppress(queue.Full):
            self._calls.put(None, timeout=FINISH_GRACE_S)
        limit = wandb_session.FINISH_TIMEOUT_S + 2 * FINISH_GRACE_S
        self._thread.join(limit)
        if self._thread.is_alive():
            # W&B also waits for its process at exit; without the process there is nothing to wait for.
            kill_core()
            has_sent_all.clear()
            self._failure = f"no answer in {limit:.0f} s"
        self._send_notes()
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, self._session)
        if self._failure:
            rest = "the data is on disk" if has_sent_all.is_set() else "metrics.jsonl has all data"
            rest += "; upload W&B's files with the command that `status` shows" if command else ""
            text = f"Weights & Biases does not have all data ({self._failure}); {rest}"
            self._send_event("info" if self._alerted else "alert", text, sync_command=command)
        elif self._offline:
            text = "Weights & Biases was offline; upload the run with the command that `status` shows"
            self._send_event("info", text, sync_command=command, is_closing=True)

    def _send_row(self) -> None:
        if self._row:
            step, row, self._row = self._last_step, self._row, {}
            self._put(lambda session: session.log(step, row))

    def _put(self, call: Callable[[Session], None]) -> None:
        """Queue a call. After a full queue none is queued: W&B accepts no earlier step once it has a later one."""
        if not self._is_behind:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._is_behind = True
                self._note_once("alert", "W&B is behind: its queue is full; what it lacks is sent at the end of the attempt")
        # Other trackers may hang with their storage.
        self._send_notes()

    def _send_notes(self) -> None:
        """Send the events that the thread has noted, within a call of the training thread."""
        # Another thread may take the last one, so checking for one first would not help.
        with suppress(IndexError):
            while True:
                kind, text, fields = self._notes.popleft()
                self._send_event(kind, text, **fields)

    def _note_once(self, kind: str, text: str, **fields: Any) -> None:
        if text.partition(":")[0] not in self._noted_kinds:
            self._noted_kinds.add(text.partition(":")[0])
            # One alert about W&B is enough; the others are information.
            self._notes.append(("info" if self._alerted else kind, text, fields))
            self._alerted = self._alerted or kind == "alert"

    # The code below runs in the thread.

    def _work(self) -> None:
        try:
            # The search for a login imports W&B's package, which takes a while.
            self._offline = not is_online(self._plan.config.tracking.mode)
            self._start_session()
            while (call := self._next_call()) is not None:
                self._execute(call)
            if self._session is None and not self._failure:
                self._start_session()
            if self._session is not None:
                self._end(self._session)
        except (Exception, SystemExit) as error:
            # SystemExit would end the thread without a message.
            self._failure = f"{type(error).__name__}: {error}"

    def _next_call(self) -> Callable[[Session], None] | None:
        if self._calls.empty():
            self._urgent.wait(SEND_EVERY_S)
            self._urgent.clear()
        return self._calls.get()

    def _start_session(self) -> None:
        """Start a session: offline if W&B does not answer or refuses the run, none if it refuses even offline files."""
        try:
            self._session = Session(self._plan, self._run, offline=self._offline, on_stop=self._on_stop)
        except ConfigError as error:
            reason = error.problems[0].message
            if self._offline:
                self._failure = reason
                self._note_once("alert", f"this attempt is not tracked in W&B, only in metrics.jsonl: {reason}")
            else:
                self._offline = True
                self._note_once("alert", f"this attempt is tracked offline: {reason}")
                self._start_session()
            return
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, self._session) if self._offline else None
        where = f"see it at {self._session.url}" if self._session.url else "offline"
        self._note_once("info", f"Weights & Biases: {where}", url=self._session.url, sync_command=command)

    def _execute(self, call: Callable[[Session], None]) -> None:
        if self._session is None:
            return
        try:
            self._session.require_core()
            call(self._session)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._note_once("alert", f"W&B's process failed: {reason}; what it lacks is sent at the end of the attempt")
            kill_core()
            leave_core()
            self._session = None
