"""The W&B tracker. Calls only queue work for a thread, so that training never waits for W&B."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Mapping
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


class WandbTracker:
    """Sends metrics, alerts and the summary to the W&B run with the plan's id.

    The metrics of a step are one row, queued when the next step begins: W&B accepts a step only once, and a rank may die between
    training and evaluation. A failed attempt does not send its last row: the next attempt repeats that step, or sends the row.

    No call waits for W&B or raises its errors. If W&B cannot be reached or refuses the run at the start, the attempt is tracked
    offline. If its process fails later, the steps that W&B lacks are sent from metrics.jsonl at the end. The first problem is an
    alert, later ones are information. They are sent through `send_event` (kind, text), also from the thread. Mode auto is online
    if W&B finds credentials, else offline. `on_stop` is called when a person presses Stop on the run's page.
    """

    def __init__(
        self, plan: LaunchPlan, run_dir: str | Path, *, send_event: Callable[..., None], on_stop: Callable[[], None]
    ) -> None:
        self._plan, self._run, self._send_event, self._on_stop = plan, RunDir(Path(run_dir)), send_event, on_stop
        self._offline = plan.config.tracking.mode == "offline"
        # None is the end.
        self._calls: queue.SimpleQueue[Callable[[Session], None] | None] = queue.SimpleQueue()
        self._session: Session | None = None
        self._end: Callable[[Session], None] = lambda session: None
        self._failure = ""
        self._last_step = -1
        # The metrics of the current step, until the next step begins.
        self._row: dict[str, float] = {}
        self._alerted = False
        # W&B's process, written in Go, spends a quarter of its time on keeping many processors busy.
        os.environ.setdefault("GOMAXPROCS", "1")
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step != self._last_step:
            self._send_row()
        self._last_step = step
        self._row |= metrics

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Send an alert; ignore other kinds."""
        if kind == "alert":
            at = self._last_step if step is None and self._last_step >= 0 else step
            self._calls.put(lambda session: session.alert(text, at))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._calls.put(lambda session: session.summary(values))

    def finish(self, state: str, *, everything: bool = False) -> None:
        """Upload what is pending, in at most FINISH_TIMEOUT_S + FINISH_GRACE_S seconds.

        With `everything`, also send all lines of metrics.jsonl that W&B lacks, even of discarded steps, and the last row of a
        failed attempt.

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
        self._calls.put(None)
        limit = wandb_session.FINISH_TIMEOUT_S + FINISH_GRACE_S
        self._thread.join(limit)
        if self._thread.is_alive():
            # W&B also waits for its process at exit; without the process there is nothing to wait for.
            kill_core()
            has_sent_all.clear()
            self._failure = f"no answer in {limit:.0f} s"
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, self._session)
        if self._failure:
            rest = "the data is on disk" if has_sent_all.is_set() else "metrics.jsonl has all data"
            rest += "; upload W&B's files with the command that `status` shows" if command else ""
            self._report(f"Weights & Biases does not have all data ({self._failure}); {rest}", sync_command=command)
        elif self._offline:
            text = "Weights & Biases was offline; upload the run with the command that `status` shows"
            self._send_event("info", text, sync_command=command, is_closing=True)

    def _send_row(self) -> None:
        if self._row:
            step, row, self._row = self._last_step, self._row, {}
            self._calls.put(lambda session: session.log(step, row))

    def _report(self, text: str, **fields: Any) -> None:
        # One alert about W&B is enough; the others are information.
        kind, self._alerted = "info" if self._alerted else "alert", True
        self._send_event(kind, text, **fields)

    # The code below runs in the thread.

    def _work(self) -> None:
        try:
            # The search for a login imports W&B's package, which takes a while.
            self._offline = not is_online(self._plan.config.tracking.mode)
            self._start_session()
            while (call := self._calls.get()) is not None:
                self._execute(call)
            if self._session is None and not self._failure:
                self._start_session()
            if self._session is not None:
                self._end(self._session)
        except (Exception, SystemExit) as error:
            # SystemExit would end the thread without a message.
            self._failure = f"{type(error).__name__}: {error}"

    def _start_session(self) -> None:
        """Start a session: offline if W&B does not answer or refuses the run, none if it refuses even offline files."""
        try:
            self._session = Session(self._plan, self._run, offline=self._offline, on_stop=self._on_stop)
        except ConfigError as error:
            reason = error.problems[0].message
            if self._offline:
                self._failure = reason
                self._report(f"this attempt is not tracked in W&B, only in metrics.jsonl: {reason}")
            else:
                self._offline = True
                self._report(f"this attempt is tracked offline: {reason}")
                self._start_session()
            return
        command = wandb_session.sync_command(self._run, self._plan.wandb_id, self._session) if self._offline else None
        where = f"see it at {self._session.url}" if self._session.url else "offline"
        self._send_event("info", f"Weights & Biases: {where}", url=self._session.url, sync_command=command)

    def _execute(self, call: Callable[[Session], None]) -> None:
        if self._session is None:
            return
        try:
            call(self._session)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._report(f"W&B's process failed: {reason}; what it lacks is sent at the end of the attempt")
            kill_core()
            leave_core()
            self._session = None
