"""Anomalies that a person wants to know of at once: loss spikes, slow or stalled training, stragglers, GPU faults.

What lasts is reported at every step; `launcher.tracking.tracker.RateLimit` bounds how often it becomes an alert.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from launcher.plan import xids
from launcher.train.monitoring.rank_stats import Told, Work

# Losses of so many steps tell what is usual, once there are enough of them. So many high ones are no single spike.
_LOSSES, _ENOUGH_LOSSES, _STAYS_HIGH = 100, 20, 20
# Robust standard deviations above the median, by the median absolute deviation (Iglewicz and Hoaglin 1993).
SPIKE = 10.0
_MAD_TO_SIGMA = 1.4826
# Where losses hardly differ from each other, a small change is no spike.
_LEAST_SIGMA = 0.01
# The pace of the last few steps, against that of many before them. So many slow ones are no passing trouble.
_RECENT, _BEFORE, _ENOUGH_BEFORE, _STAYS_SLOW = 10, 200, 30, 60
SLOW = 0.7
_SLOWED_BY = {"cuda": "the GPUs' clocks and temperatures", "cpu": "what else runs on the CPUs, their clocks and temperatures"}
# A rank whose own work takes so much longer than the usual rank's, in nearly all of so many steps.
STRAGGLES, _STRAGGLER_STEPS, _NEARLY_ALL = 1.2, 20, 16
# No step for so many times the median step, and for so long at least; saving has a limit of its own.
STANDS, _STANDS_AT_LEAST_S, _SAVING_S = 10.0, 60.0, 900.0
_LOOK_S = 5.0


class Health:
    """Looks at the numbers of each step; `device` is what the ranks compute on, cuda or cpu.

    What is told of does not count as usual, until it has lasted for as many steps as tell what is. A trouble that passes and one
    that stays are alerts of two kinds, so that the one does not keep the other from being told.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._paces: deque[float] = deque(maxlen=_BEFORE)
        self._high = self._slow = 0
        self._steps, self._late = 0, dict[int, int]()
        self._xids: dict[int, float] = {}

    def step(self, loss: float, tokens_per_sec: float) -> list[str]:
        """Alerts after a step, in words; none where all is as it was."""
        return [*self._spike(loss), *self._slowdown(tokens_per_sec)]

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
        if not self._is_spike(loss):
            self._losses.append(loss)
            # A loss that is out of bounds goes up and down.
            self._high = max(0, self._high - 1)
            return
        self._high += 1
        usual = f"the median of the {len(self._losses)} steps before is {statistics.median(self._losses):.4f}"
        go_back = "go back to a checkpoint before it with: python -m launcher resume RUN --step N optim.lr=..."
        if self._high < _STAYS_HIGH:
            yield f"the loss jumped: it is {loss:.4f}, {usual}; if it does not come back, {go_back}"
        else:
            yield f"the loss does not come back: it is {loss:.4f}, after {self._high} steps of high ones, {usual}; {go_back}"
        if self._high >= _LOSSES:
            self._losses.clear()
            self._high = 0

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < _ENOUGH_LOSSES:
            return False
        median = statistics.median(self._losses)
        spread = statistics.median(abs(value - median) for value in self._losses)
        return loss > median + SPIKE * max(_MAD_TO_SIGMA * spread, _LEAST_SIGMA * abs(median))

    def _slowdown(self, tokens_per_sec: float) -> Iterator[str]:
        leaving = self._recent[0] if len(self._recent) == _RECENT else None
        self._recent.append(tokens_per_sec)
        recent = statistics.median(self._recent)
        usual = statistics.median(self._paces) if len(self._paces) >= _ENOUGH_BEFORE else 0.0
        if recent >= SLOW * usual:
            self._slow = 0
            if leaving is not None:
                self._paces.append(leaving)
            return
        self._slow += 1
        what = "training has become slow" if self._slow < _STAYS_SLOW else "training stays slow"
        yield (
            f"{what}: {recent:,.0f} tokens/s over the last {_RECENT} steps, {usual:,.0f} before; "
            f"look at {_SLOWED_BY[self._device]}, the network and the storage"
        )
        if self._slow >= _BEFORE:
            self._paces.clear()
            self._slow = 0


def _straggler(rank: int, works: Sequence[Work], names: Sequence[str]) -> str:
    one, usual = works[rank], Work(*(statistics.median_low(parts) for parts in zip(*works, strict=True)))
    more = {name: part - other for name, part, other in zip(Work._fields, one, usual, strict=True)}
    match max(more, key=more.__getitem__):
        case "data_s":
            what = f"it waits {one.data_s:.2f} s a step for its data, the usual rank {usual.data_s:.2f} s: "
            what += "look at the node's storage and CPUs"
        case "optim_s":
            what = f"its optimizer takes {one.optim_s:.2f} s a step on the CPUs, the usual rank's {usual.optim_s:.2f} s: "
            what += "look at the clocks of the node's CPUs, and at what else runs there"
        case _:
            times = one.compute_s / usual.compute_s if usual.compute_s else 1.0
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
