"""What a person would want to be told of at once: a loss that jumps, training that has become slow."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

# Losses of so many steps tell what is usual, once there are enough of them.
_LOSSES, _ENOUGH_LOSSES = 100, 20
# Robust standard deviations above the median, by the median absolute deviation (Iglewicz and Hoaglin 1993).
SPIKE = 10.0
_MAD_TO_SIGMA = 1.4826
# Where losses hardly differ from each other, a small change is no spike.
_LEAST_SIGMA = 0.01
# The pace of the last few steps, against that of many before them.
_RECENT, _BEFORE, _ENOUGH_BEFORE = 10, 200, 30
SLOW = 0.7
REPEAT_S = 1800.0


class Health:
    """Looks at the numbers of each step; the same kind of alert is told again after REPEAT_S seconds at the earliest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._paces: deque[float] = deque(maxlen=_RECENT + _BEFORE)
        self._told_at: dict[str, float] = {}

    def step(self, loss: float, tokens_per_sec: float) -> list[str]:
        """Alerts after a step, in words; none where all is as it was."""
        found = [*self._spike(loss), *self._slow(tokens_per_sec)]
        self._losses.append(loss)
        return found

    def _spike(self, loss: float) -> Iterator[str]:
        if len(self._losses) < _ENOUGH_LOSSES:
            return
        median = statistics.median(self._losses)
        spread = statistics.median(abs(value - median) for value in self._losses)
        sigma = max(_MAD_TO_SIGMA * spread, _LEAST_SIGMA * abs(median))
        if loss > median + SPIKE * sigma and self._due("spike"):
            yield (
                f"the loss jumped to {loss:.4f}: the median of the {len(self._losses)} steps before is {median:.4f}; if it does "
                "not come back, go back to a checkpoint before it with: python -m launcher resume RUN --step N optim.lr=..."
            )

    def _slow(self, tokens_per_sec: float) -> Iterator[str]:
        self._paces.append(tokens_per_sec)
        if len(self._paces) < _RECENT + _ENOUGH_BEFORE:
            return
        paces = list(self._paces)
        recent, usual = statistics.median(paces[-_RECENT:]), statistics.median(paces[:-_RECENT])
        if recent < SLOW * usual and self._due("slow"):
            yield (
                f"training has become slow: {recent:,.0f} tokens/s over the last {_RECENT} steps, {usual:,.0f} before; "
                "look at the GPUs' clocks and temperatures, the network and the storage"
            )

    def _due(self, kind: str) -> bool:
        now = self._clock()
        if kind in self._told_at and now - self._told_at[kind] < REPEAT_S:
            return False
        self._told_at[kind] = now
        return True
