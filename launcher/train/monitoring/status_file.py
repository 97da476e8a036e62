"""The ranks' updates of status.json, with state and step for the other commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from launcher import run_store
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir

# A synced write takes a millisecond and loads shared storage; metrics.jsonl has every logged step.
_UPDATE_INTERVAL_S = 5.0


class StatusFile:
    """Writes state and step of a run during training, only on rank 0 (`is_main`). A failed write is an alert, not an error.

    Other writers (agent, coordinator, the cancel command) write before the ranks start, after they end, or for the next attempt.
    Their fields are kept, and a superseded attempt writes nothing.
    """

    def __init__(self, run: RunDir, attempt: int, send_alert: Callable[[str], None], is_main: bool) -> None:
        self._run, self._attempt, self._send_alert, self._is_main = run, attempt, send_alert, is_main
        # A single thread, so the last update is the one that stays.
        self._writer = ThreadPoolExecutor(1, "status")
        self._pending: Future[None] | None = None
        self._due = 0.0

    def write_state(self, state: str, step: int) -> None:
        """Write a state, and return when it is on disk."""
        if self._is_main:
            self._writer.submit(self._write, state, step).result()
            self._due = time.monotonic() + _UPDATE_INTERVAL_S

    def update_step(self, step: int) -> None:
        """Write the step every few seconds, in a thread because storage may be slow.

        The write is synced to disk: after a power loss, a file that was only renamed may be empty, and no command could read the
        run.
        """
        now = time.monotonic()
        if self._is_main and now >= self._due and (self._pending is None or self._pending.done()):
            self._due = now + _UPDATE_INTERVAL_S
            self._pending = self._writer.submit(self._write, "running", step)

    def _write(self, state: str, step: int) -> None:
        try:
            run_store.fence(self._run, self._attempt)
            # Write the attempt too: an earlier attempt may have overwritten it while it was writing.
            run_store.update_status(self._run, attempt=self._attempt, state=state, step=step, message="")
        except (OSError, RunError) as error:
            self._send_alert(f"status.json could not be written: {error}")
