"""status.json as the ranks write it: where training stands, for the other commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from launcher import run_store
from launcher.errors import RunError
from launcher.plan.run_dir import RunDir

# A write that reaches the disk takes a millisecond of a processor, and on shared storage it is everybody's; metrics.jsonl has
# every logged step.
_STEPS_EVERY_S = 5.0


class StatusFile:
    """Written by rank 0 alone, `is_main`, while it trains; that it cannot be written is told and is no reason to stop.

    Who else writes it (an agent, a coordinator, the command that cancels) does so before the ranks start, when they have ended,
    or for the next attempt: what they have written beside state, step and message stays, and an attempt that another has
    followed writes nothing more.
    """

    def __init__(self, run: RunDir, attempt: int, tell: Callable[[str], None], is_main: bool) -> None:
        self._run, self._attempt, self._tell, self._is_main = run, attempt, tell, is_main
        # One thread, so that what was said last is what stays.
        self._writer = ThreadPoolExecutor(1, "status")
        self._pending: Future[None] | None = None
        self._due = 0.0

    def state(self, state: str, step: int) -> None:
        """Tell a state, and return when it is on disk."""
        if self._is_main:
            self._writer.submit(self._write, state, step).result()
            self._due = time.monotonic() + _STEPS_EVERY_S

    def training(self, step: int) -> None:
        """Tell how far training is, every few seconds at most, beside the training: storage may take its time.

        This is synchronised with the disk as well: a file that was only moved into place may be empty after a loss of power,
        and then no command knows the run any more.
        """
        now = time.monotonic()
        if self._is_main and now >= self._due and (self._pending is None or self._pending.done()):
            self._due = now + _STEPS_EVERY_S
            self._pending = self._writer.submit(self._write, "running", step)

    def _write(self, state: str, step: int) -> None:
        try:
            run_store.fence(self._run, self._attempt)
            # The number as well: it heals what an earlier attempt, in the middle of a write, has put back.
            run_store.update_status(self._run, attempt=self._attempt, state=state, step=step, message="")
        except (OSError, RunError) as error:
            self._tell(f"status.json could not be written: {error}")
