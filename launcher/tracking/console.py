"""Plain lines in the log: one per logged step, one per event."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from launcher.errors import printable
from launcher.tracking.metrics import console_text


class ConsoleTracker:
    """Prints steps and events to a stream (rank 0's log), and flushes each line."""

    def __init__(self, max_steps: int | None, stream: TextIO | None = None) -> None:
        self._max_steps = max_steps
        self._stream = stream or sys.stdout

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # Evaluations are events; without a loss, the line would be a bare step number.
        if "train/loss" in metrics:
            self._print(format_step({"trainer/step": step, **metrics}, self._max_steps))

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self._print(f"{kind}: {text}" if step is None else f"{kind} at step {step}: {text}")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing: the summary repeats what was printed before."""

    def finish(self, state: str) -> None:
        self._stream.flush()

    def _print(self, line: str) -> None:
        # One write, because the tracker of W&B sends events from a thread.
        print(f"{printable(line)}\n", end="", file=self._stream, flush=True)


def format_step(metrics: Mapping[str, float], max_steps: int | None) -> str:
    """Return a line such as `step  12/40  loss 1.834  lr 1.8e-05  grad 1.32  231 tok/s  eta 1m40s`; leave out missing metrics."""
    parts = []
    if "trainer/step" in metrics:
        width = max(3, len(str(max_steps or "")))
        total = f"/{max_steps}" if max_steps else ""
        parts.append(f"step {int(metrics['trainer/step']):>{width}}{total}")
    return "  ".join(filter(None, (*parts, console_text(metrics))))
