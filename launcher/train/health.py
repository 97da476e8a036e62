"""What a person would want to be told of at once: a loss that jumps, training that has become slow or stands still, a rank
that all others wait for, a GPU with a fault. What lasts is said at every look: launcher.tracking.alerts bounds how often it is
told, by the words before the colon.
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
_SLOWED_BY = {"cuda": "the GPUs' clocks and temperatures", "cpu": "what else runs on the CPUs, their clocks and temperatures"}
# A rank whose own work takes so much longer than the usual rank's, in nearly all of so many steps.
STRAGGLES, _STRAGGLER_STEPS, _NEARLY_ALL = 1.2, 20, 16
# No step for so many times the median step, and for so long at least; saving has a limit of its own.
STANDS, _STANDS_AT_LEAST_S, _SAVING_S = 10.0, 60.0, 900.0
_LOOK_S = 5.0


class Health:
    """Looks at the numbers of each step; `device` is what the ranks compute on, cuda or cpu."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._paces: deque[float] = deque(maxlen=_RECENT + _BEFORE)
        self._steps, self._late = 0, dict[int, int]()
        self._xids: dict[int, float] = {}

    def step(self, loss: float, tokens_per_sec: float) -> list[str]:
        """Alerts after a step, in words; none where all is as it was."""
        found = [*self._spike(loss), *self._slow(tokens_per_sec)]
        self._losses.append(loss)
        return found

    def faults(self, told: Sequence[Told], names: Sequence[str]) -> Iterator[str]:
        """Alerts of GPUs after a step in which the ranks have told their numbers; `names` say where each rank is.

        A fault of what lies between GPUs shows on all of them at once, and is one alert.
        """
        places: dict[int, list[str]] = {}
        for rank, one in enumerate(told):
            if one.sample.xids > self._xids.get(rank, 0.0):
                self._xids[rank] = one.sample.xids
                places.setdefault(int(one.sample.last_xid), []).append(f"GPU {one.sample.gpu_index:.0f} of {names[rank]}")
        for number, (first, *others) in places.items():
            where = f"{1 + len(others)} GPUs, the first of them {first}" if others else first
            yield f"Xid {number} on {where}: {xids.meaning(number)}"

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
        if late:
            yield _straggler(max(late, key=lambda rank: works[rank].seconds), works, names)

    def _spike(self, loss: float) -> Iterator[str]:
        if len(self._losses) < _ENOUGH_LOSSES:
            return
        median = statistics.median(self._losses)
        spread = statistics.median(abs(value - median) for value in self._losses)
        sigma = max(_MAD_TO_SIGMA * spread, _LEAST_SIGMA * abs(median))
        if loss > median + SPIKE * sigma:
            yield (
                f"the loss jumped: it is {loss:.4f}, the median of the {len(self._losses)} steps before is {median:.4f}; if it "
                "does not come back, go back to a checkpoint before it with: python -m launcher resume RUN --step N optim.lr=..."
            )

    def _slow(self, tokens_per_sec: float) -> Iterator[str]:
        self._paces.append(tokens_per_sec)
        if len(self._paces) < _RECENT + _ENOUGH_BEFORE:
            return
        paces = list(self._paces)
        recent, usual = statistics.median(paces[-_RECENT:]), statistics.median(paces[:-_RECENT])
        if recent < SLOW * usual:
            yield (
                f"training has become slow: {recent:,.0f} tokens/s over the last {_RECENT} steps, {usual:,.0f} before; "
                f"look at {_SLOWED_BY[self._device]}, the network and the storage"
            )


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
    who = f"rank {rank} on {names[rank]}"
    return f"a straggler: all ranks have waited {_STRAGGLER_STEPS} steps for {who}: {what}, or leave the node out"


class Pulse:
    """Tells, from a thread of its own, when there has been no step for long, at every look until there is one again.

    `beat` is called with the phase and the step wherever there is progress.
    """

    def __init__(
        self,
        tell: Callable[[str, int], None],
        at_least_s: float = _STANDS_AT_LEAST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._at_least_s, self._clock = tell, at_least_s, clock
        self._ended = threading.Event()
        self._steps: deque[float] = deque(maxlen=50)
        self._last = ("", 0, clock())

    def start(self) -> Pulse:
        threading.Thread(target=self._watch, name="pulse", daemon=True).start()
        return self

    def stop(self) -> None:
        self._ended.set()

    def beat(self, phase: str, step: int) -> None:
        before, last, at = self._last
        now = self._clock()
        if phase == "training" == before and step == last:
            # Between two micro-batches there is no step yet.
            return
        if phase == "training" == before:
            self._steps.append(now - at)
        self._last = (phase, step, now)

    def look(self) -> None:
        """Tell where there has been no progress for longer than is usual."""
        phase, step, at = self._last
        if not self._steps or phase not in ("training", "evaluating", "saving"):
            return
        usual_s, silent_s = statistics.median(list(self._steps)), self._clock() - at
        limit_s = max(self._at_least_s, STANDS * usual_s)
        if silent_s >= (max(limit_s, _SAVING_S) if phase == "saving" else limit_s):
            self._tell(f"no progress: {silent_s:.0f} s have passed while {phase}; a step usually takes {usual_s:.1f} s", step)

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.look()
