"""Anomalies that need prompt attention: loss spikes, slow training, stragglers, GPU faults.

A lasting anomaly is reported at every step; `launcher.tracking.tracker.RateLimit` limits how often it becomes an alert.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

from launcher.errors import DivergedError
from launcher.nvml import describe_xid
from launcher.shell_commands import launcher_command
from launcher.train.monitoring.step_metrics import RankStats, RankWork

# Number of steps in the reference of losses, its minimum, and the consecutive spikes that count as a lasting rise.
_LOSS_WINDOW, _MIN_LOSSES, _LASTING_SPIKES = 100, 20, 20
# A spike exceeds the median by this many robust standard deviations (median absolute deviation; Iglewicz and Hoaglin 1993).
SPIKE_SIGMAS = 10.0
_MAD_TO_SIGMA = 1.4826
# Lower bound of the deviation, relative to the median, for losses that hardly vary.
_MIN_RELATIVE_SIGMA = 0.01
# Steps whose pace is compared, steps before them that form the reference, its minimum, and the consecutive slow steps that count
# as lasting.
_RECENT_STEPS, _PACE_WINDOW, _MIN_PACES, _LASTING_SLOW_STEPS = 10, 200, 30, 60
# Training is slow below this fraction of the reference pace.
SLOW_FRACTION = 0.7
_SLOWDOWN_CAUSES = {
    "cuda": "the GPUs' clocks and temperatures",
    "cpu": "other processes on the CPUs, their clocks and temperatures",
}
# A straggler's own work exceeds the median rank's by this factor in most of a window of steps.
STRAGGLER_FACTOR, _STRAGGLER_WINDOW, _MIN_LATE_STEPS = 1.2, 20, 16
# An alert if the measured tokens per second deviate from the plan by more than this fraction. Measured as the median over this
# many steps, after the first ones, in which kernels are chosen and compiled.
_SPEED_DEVIATION, _SPEED_WARMUP, _SPEED_STEPS = 0.20, 5, 15
# Consecutive steps that may be skipped. fp16 finds its loss scale by skipping; other types do not.
_MAX_IN_A_ROW = {"fp16": 20, "bf16": 3, "fp32": 3}


class AnomalyDetector:
    """Checks the numbers of each step; `device` is what the ranks compute on, cuda or cpu, and alerts name `run_dir`.

    Anomalous steps do not enter the reference until they have lasted for a whole window. Passing and lasting anomalies are
    separate kinds of alerts, so the rate limit of one does not suppress the other.
    """

    def __init__(self, device: str, run_dir: str) -> None:
        self._device, self._run_dir = device, run_dir
        self._losses: deque[float] = deque(maxlen=_LOSS_WINDOW)
        self._recent_paces: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._paces: deque[float] = deque(maxlen=_PACE_WINDOW)
        self._num_spikes = self._num_slow = 0
        self._num_steps, self._num_late = 0, dict[int, int]()
        self._xids: dict[int, float] = {}
        self._num_speed_steps = 0
        self._speeds: list[float] = []

    def speed(self, tokens_per_sec: float, planned: float | None) -> list[str]:
        """Return an alert, once, if the tokens per second of the first steps deviate from the plan."""
        self._num_speed_steps += 1
        if planned is None or not _SPEED_WARMUP < self._num_speed_steps <= _SPEED_WARMUP + _SPEED_STEPS:
            return []
        self._speeds.append(tokens_per_sec)
        measured = statistics.median(self._speeds)
        deviation = measured / planned - 1
        if len(self._speeds) < _SPEED_STEPS or abs(deviation) <= _SPEED_DEVIATION:
            return []
        advice = (
            f"see what takes the time with: {launcher_command('report', self._run_dir)}; on a healthy machine, "
            "the rates that the plan assumes are too high"
            if deviation < 0
            else "the rates that the plan assumes are too low, and other settings may be faster than it predicts"
        )
        return [
            f"training runs at {measured:,.0f} tokens/s, {abs(deviation):.0%} {'above' if deviation > 0 else 'below'} "
            f"the planned {planned:,.0f}: {advice}"
        ]

    def step(self, loss: float, tokens_per_sec: float, number: int = 0) -> list[str]:
        """Return the alerts after step `number`."""
        return [*self._check_loss(loss, number), *self._check_pace(tokens_per_sec)]

    def faults(self, ranks: Sequence[RankStats], hosts: Sequence[str]) -> Iterator[str]:
        """Yield an alert for each Xid that ranks report for the first time; `hosts` are the nodes by rank.

        A fault of a link between GPUs shows on all of them at once, but is one alert.
        """
        gpus_by_xid: dict[int, list[str]] = {}
        for rank, stats in enumerate(ranks):
            device = stats.device
            if device.xids > self._xids.get(rank, 0.0):
                self._xids[rank] = device.xids
                gpus_by_xid.setdefault(int(device.last_xid), []).append(f"GPU {device.gpu_index:.0f} of {hosts[rank]}")
        for number, (first, *others) in gpus_by_xid.items():
            where = f"{1 + len(others)} GPUs, the first of them {first}" if others else first
            yield f"Xid {number} on {where}: {describe_xid(number)}"

    def stragglers(self, works: Sequence[RankWork], hosts: Sequence[str]) -> Iterator[str]:
        """Yield an alert at the end of a window in which one rank was late in most steps; `works` are for one step, by rank."""
        median_s = statistics.median_low([work.seconds for work in works])
        for rank, work in enumerate(works):
            if work.seconds > STRAGGLER_FACTOR * median_s > 0:
                self._num_late[rank] = self._num_late.get(rank, 0) + 1
        self._num_steps += 1
        if self._num_steps < _STRAGGLER_WINDOW:
            return
        late_ranks = [rank for rank, count in self._num_late.items() if count >= _MIN_LATE_STEPS]
        self._num_steps, self._num_late = 0, {}
        if not late_ranks:
            return
        rank = max(late_ranks, key=lambda rank: works[rank].seconds)
        work, median = works[rank], RankWork(*(statistics.median_low(parts) for parts in zip(*works, strict=True)))
        # The alert names the part of its work that exceeds the median rank's most.
        excess_s = work.data_s - median.data_s
        if excess_s > work.compute_s - median.compute_s:
            cause = f"its data take {excess_s:.2f} s a step longer than the median rank's: check the node's storage and CPUs"
        else:
            factor = work.compute_s / median.compute_s if median.compute_s else 1.0
            cause = f"it computes {factor:.2f} times as long as the median rank: check the clock and temperature of its device"
        name = f"rank {rank} on {hosts[rank]}"
        yield f"a straggler: all ranks have waited {_STRAGGLER_WINDOW} steps for {name}: {cause}, or leave the node out"

    def _check_loss(self, loss: float, number: int) -> Iterator[str]:
        median = limit = math.inf
        if len(self._losses) >= _MIN_LOSSES:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            limit = median + SPIKE_SIGMAS * max(_MAD_TO_SIGMA * deviation, _MIN_RELATIVE_SIGMA * abs(median))
        if loss <= limit:
            self._losses.append(loss)
            # A diverged loss rises and falls.
            self._num_spikes = max(0, self._num_spikes - 1)
            return
        self._num_spikes += 1
        reference = f"the median of the {len(self._losses)} steps before is {median:.4f}"
        command = launcher_command("resume", self._run_dir, "--step", "N", "optim.lr=...")
        remedy = f"resume from a checkpoint before it with: {command}"
        if self._num_spikes < _LASTING_SPIKES:
            rows = f"its rows: {launcher_command('why', self._run_dir, str(number))}"
            yield f"the loss jumped: it is {loss:.4f}, {reference}; {rows}; if it stays high, {remedy}"
        else:
            yield f"the loss stays high: it is {loss:.4f} after {self._num_spikes} high steps, {reference}; {remedy}"
        if self._num_spikes >= _LOSS_WINDOW:
            self._losses.clear()
            self._num_spikes = 0

    def _check_pace(self, tokens_per_sec: float) -> Iterator[str]:
        oldest = self._recent_paces[0] if len(self._recent_paces) == _RECENT_STEPS else None
        self._recent_paces.append(tokens_per_sec)
        recent = statistics.median(self._recent_paces)
        reference = statistics.median(self._paces) if len(self._paces) >= _MIN_PACES else 0.0
        if recent >= SLOW_FRACTION * reference:
            self._num_slow = 0
            if oldest is not None:
                self._paces.append(oldest)
            return
        self._num_slow += 1
        kind = "training has become slow" if self._num_slow < _LASTING_SLOW_STEPS else "training stays slow"
        yield (
            f"{kind}: {recent:,.0f} tokens/s over the last {_RECENT_STEPS} steps, {reference:,.0f} before; "
            f"check {_SLOWDOWN_CAUSES[self._device]}, the network and the storage"
        )
        if self._num_slow >= _PACE_WINDOW:
            self._paces.clear()
            self._num_slow = 0


class SkippedSteps:
    """Counts consecutive skipped steps; the caller sets `num_in_a_row` to 0 when a step is applied."""

    def __init__(self, dtype: str, run_dir: str) -> None:
        self._dtype, self._run_dir = dtype, run_dir
        self.num_in_a_row = 0

    def count(self, step: int, num_skipped: int) -> str | None:
        """Count one skipped step; return an alert, None if skipping is usual. `num_skipped` is the run's total.

        Raises:
            DivergedError: if too many steps in a row were skipped.
        """
        self.num_in_a_row += 1
        if self.num_in_a_row > _MAX_IN_A_ROW[self._dtype]:
            raise DivergedError(
                f"the gradients of {self.num_in_a_row} steps in a row are not finite; training stopped",
                where=f"step {step}",
                remedy="lower optim.lr and go back to a good step: "
                f"{launcher_command('resume', self._run_dir, '--step', 'N', 'optim.lr=...')}",
            )
        if self._dtype == "fp16":
            return None
        # The rate limit counts alerts by the text before the colon.
        skipped = f"the gradients are not finite: this step was skipped, {num_skipped} so far"
        return f"{skipped}; check the GPUs for faults, or lower optim.lr"
