"""What a person would want to be told of at once: a loss that jumps, training that has become slow or stands still, a rank
that all others wait for, a GPU with a fault.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from launcher.plan import xids
from launcher.train.ranks import Told, Work

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
# A rank whose own work takes so much longer than the usual rank's, in nearly all of so many steps.
STRAGGLES, _STRAGGLER_STEPS, _NEARLY_ALL = 1.2, 20, 16
# No step for so many times the median step, and for so long at least; saving has a limit of its own.
STANDS, _STANDS_AT_LEAST_S, _SAVING_S = 10.0, 60.0, 900.0
_LOOK_S = 5.0


class Health:
    """Looks at the numbers of each step; the same kind of alert is told again after REPEAT_S seconds at the earliest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._paces: deque[float] = deque(maxlen=_RECENT + _BEFORE)
        self._told_at: dict[str, float] = {}
        self._steps, self._late = 0, dict[int, int]()
        self._xids: dict[int, float] = {}

    def step(self, loss: float, tokens_per_sec: float) -> list[str]:
        """Alerts after a step, in words; none where all is as it was."""
        found = [*self._spike(loss), *self._slow(tokens_per_sec)]
        self._losses.append(loss)
        return found

    def faults(self, told: Sequence[Told], names: Sequence[str]) -> Iterator[str]:
        """Alerts of GPUs after a step in which the ranks have told their numbers; `names` say where each rank is."""
        for rank, one in enumerate(told):
            if one.sample.xids > self._xids.get(rank, 0.0):
                self._xids[rank] = one.sample.xids
                number = int(one.sample.last_xid)
                if self._due(f"xid {number} of {rank}"):
                    yield f"Xid {number} on GPU {one.sample.gpu_index:.0f} of {names[rank]}: {xids.meaning(number)}"

    def stragglers(self, works: Sequence[Work], names: Sequence[str]) -> Iterator[str]:
        """Alerts of ranks that all others wait for, after a step of these works."""
        usual = statistics.median_low([one.seconds for one in works])
        for rank, one in enumerate(works):
            if one.seconds > STRAGGLES * usual > 0:
                self._late[rank] = self._late.get(rank, 0) + 1
        self._steps += 1
        if self._steps < _STRAGGLER_STEPS:
            return
        late = [rank for rank, count in self._late.items() if count >= _NEARLY_ALL]
        self._steps, self._late = 0, {}
        if late and self._due("straggler"):
            yield _straggler(max(late, key=lambda rank: works[rank].seconds), works, names)

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


def _straggler(rank: int, works: Sequence[Work], names: Sequence[str]) -> str:
    one = works[rank]
    compute_s = statistics.median_low([other.compute_s for other in works])
    data_s = statistics.median_low([other.data_s for other in works])
    if one.data_s - data_s > one.compute_s - compute_s:
        what = (
            f"it waits {one.data_s:.2f} s a step for its data, the usual rank {data_s:.2f} s: look at the node's storage and CPUs"
        )
    else:
        times = one.compute_s / compute_s if compute_s else 1.0
        what = f"it computes {times:.2f} times as long as the usual rank: look at the clock and the temperature of its device"
    return f"all ranks have waited {_STRAGGLER_STEPS} steps for rank {rank} on {names[rank]}: {what}, or leave the node out"


class Pulse:
    """Tells, from a thread of its own, when there has been no step for long; once until there is one again.

    `beat` is called with the phase and the step wherever there is progress.
    """

    def __init__(self, tell: Callable[[str, int], None], look_s: float = _LOOK_S, at_least_s: float = _STANDS_AT_LEAST_S) -> None:
        self._tell, self._look_s, self._at_least_s = tell, look_s, at_least_s
        self._ended = threading.Event()
        self._steps: deque[float] = deque(maxlen=50)
        self._last = ("", 0, time.monotonic())
        self._told = False

    def start(self) -> Pulse:
        threading.Thread(target=self._watch, name="pulse", daemon=True).start()
        return self

    def stop(self) -> None:
        self._ended.set()

    def beat(self, phase: str, step: int) -> None:
        before, last, at = self._last
        now = time.monotonic()
        if phase == "training" == before and step == last:
            # Between two micro-batches there is no step yet.
            return
        if phase == "training" == before:
            self._steps.append(now - at)
        self._last, self._told = (phase, step, now), False

    def _limit_s(self, phase: str) -> float | None:
        if not self._steps or phase not in ("training", "evaluating", "saving"):
            return None
        usual = max(self._at_least_s, STANDS * statistics.median(list(self._steps)))
        return max(usual, _SAVING_S) if phase == "saving" else usual

    def _watch(self) -> None:
        while not self._ended.wait(self._look_s):
            phase, step, at = self._last
            silent_s, limit_s = time.monotonic() - at, self._limit_s(phase)
            if limit_s is None or silent_s < limit_s or self._told:
                continue
            self._told = True
            usual = statistics.median(list(self._steps))
            self._tell(f"no progress for {silent_s:.0f} s while {phase}; a step usually takes {usual:.1f} s", step)
