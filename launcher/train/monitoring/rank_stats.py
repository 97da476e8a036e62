"""What the ranks tell each other of themselves in the all-reduce of each step, and what rank 0 makes of it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from launcher.train.monitoring.gpu_stats import Sample


class Told(NamedTuple):
    """One rank's numbers of one step, in seconds; NaN where there is none.

    `data_s` is what it waited for its rows; `compute_s` what a probed layer took for a token, and `optim_s` its optimizer on the
    node's CPUs, see launcher.train.monitoring.rank_timing. `active` and `reserved` are the most bytes of its GPU so far.
    """

    step_s: float = math.nan
    data_s: float = math.nan
    compute_s: float = math.nan
    optim_s: float = math.nan
    active: float = math.nan
    reserved: float = math.nan
    alloc_retries: float = math.nan
    sample: Sample = Sample()

    def values(self) -> tuple[float, ...]:
        *own, sample = self
        return (*own, *sample)


_OWN = len(Told._fields) - 1
SLOTS = _OWN + len(Sample._fields)


def told(values: Sequence[float]) -> list[Told]:
    """Numbers of all ranks, SLOTS for each, by rank."""
    rows = (values[i : i + SLOTS] for i in range(0, len(values), SLOTS))
    return [Told._make([*row[:_OWN], Sample(*row[_OWN:])]) for row in rows]


class Work(NamedTuple):
    """What a rank's step would take if it waited for no other: computing, waiting for data, and the optimizer on its CPUs."""

    compute_s: float
    data_s: float
    optim_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute_s + self.data_s + self.optim_s


def work(ranks: Sequence[Told]) -> list[Work]:
    """The work of each rank in one step, from the step's time and from how the probed layers compare.

    The rank that all wait for spends its step on just this; the others need as much less to compute as their layer takes less.
    Ranks without a probe count as usual ones. What no rank times on its own (launching kernels, its network) is not seen here.
    """
    optim = [rank.optim_s if rank.optim_s > 0 else 0.0 for rank in ranks]
    usual = _median([rank.compute_s for rank in ranks])
    factors = [rank.compute_s / usual if rank.compute_s / usual > 0 else 1.0 for rank in ranks]
    rests = (rank.step_s - rank.data_s - one for rank, one in zip(ranks, optim, strict=True) if rank.step_s > 0)
    compute_s, slowest = max(0.0, min(rests, default=0.0)), max(factors)
    return [
        Work(compute_s * factor / slowest, max(0.0, rank.data_s), one)
        for factor, rank, one in zip(factors, ranks, optim, strict=True)
    ]


def ratio(works: Sequence[Work]) -> float:
    """The slowest rank's work over that of the usual rank; 1 where all are alike."""
    usual = statistics.median_low([one.seconds for one in works])
    return max(one.seconds for one in works) / usual if usual > 0 else 1.0


def metrics(ranks: Sequence[Told], works: Sequence[Work]) -> dict[str, float]:
    """Of all ranks and their `works` together, under the names of the design; what nobody has measured is left out."""
    samples = [rank.sample for rank in ranks]
    steps = [rank.step_s for rank in ranks if rank.step_s > 0]
    found = {"time/step_max_rank_s": max(steps), "time/straggler_ratio": ratio(works)} if steps else {}
    utils, temps = _known(samples, "gpu_util"), _known(samples, "gpu_temp_c")
    powers, memory = _known(samples, "gpu_power_w"), _known(samples, "gpu_memory")
    found |= {"gpu/util_mean": statistics.fmean(utils), "gpu/util_min": min(utils)} if utils else {}
    found |= {"gpu/temp_max": max(temps)} if temps else {}
    found |= {"gpu/power_mean": statistics.fmean(powers)} if powers else {}
    found |= {"gpu/memory_max_frac": max(memory)} if memory else {}
    active, reserved, retries = _known(ranks, "active"), _known(ranks, "reserved"), _known(ranks, "alloc_retries")
    found |= {"memory/peak_active_gib": max(active) / 2**30} if active else {}
    found |= {"memory/peak_reserved_gib": max(reserved) / 2**30} if reserved else {}
    found |= {"memory/alloc_retries": sum(retries)} if retries else {}
    found |= {"gpu/xids": sum(sample.xids for sample in samples)} if _known(samples, "gpu_index") else {}
    cpus, rams = _known(samples, "host_cpu_util"), _known(samples, "host_ram_used")
    found |= {"host/cpu_util_mean": statistics.fmean(cpus)} if cpus else {}
    found |= {"host/ram_used_max_frac": max(rams)} if rams else {}
    return found


def _known(told: Sequence[Told] | Sequence[Sample], name: str) -> list[float]:
    return [value for one in told if not math.isnan(value := getattr(one, name))]


def _median(values: Sequence[float]) -> float:
    """The lower median of those that are known, NaN where none is."""
    known = [value for value in values if value > 0]
    return statistics.median_low(known) if known else math.nan
