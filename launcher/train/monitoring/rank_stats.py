"""Per-rank statistics that travel in the all-reduce of each step, and the metrics that rank 0 derives from them. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from launcher.train.monitoring.gpu_stats import DeviceReadings


class RankStats(NamedTuple):
    """Statistics of one rank in one step; NaN for values that were not measured.

    Attributes:
        step_s: time of the whole step.
        data_s: time that the rank waited for its rows.
        load_s: time that the preparation of its rows took, which overlaps with the step before.
        compute_s: time of the timed layer per token, see launcher.train.monitoring.rank_timing.
        optim_s: time of an optimizer that runs on the node's CPUs.
        active, reserved: peak bytes of GPU memory so far.
        alloc_retries: number of retried allocations so far.
        device: readings of the GPU and, on one rank per node, of the host.
    """

    step_s: float = math.nan
    data_s: float = math.nan
    load_s: float = math.nan
    compute_s: float = math.nan
    optim_s: float = math.nan
    active: float = math.nan
    reserved: float = math.nan
    alloc_retries: float = math.nan
    device: DeviceReadings = DeviceReadings()

    def values(self) -> tuple[float, ...]:
        """Return the statistics as NUM_VALUES numbers."""
        *own, device = self
        return (*own, *device)


_NUM_OWN = len(RankStats._fields) - 1
# Numbers that each rank contributes to the all-reduce.
NUM_VALUES = _NUM_OWN + len(DeviceReadings._fields)


def unpack_ranks(values: Sequence[float]) -> list[RankStats]:
    """Return the statistics by rank, from NUM_VALUES numbers per rank."""
    rows = (values[i : i + NUM_VALUES] for i in range(0, len(values), NUM_VALUES))
    return [RankStats._make([*row[:_NUM_OWN], DeviceReadings(*row[_NUM_OWN:])]) for row in rows]


class RankWork(NamedTuple):
    """Seconds of a rank's step without waiting for other ranks: compute, waiting for data, optimizer on the node's CPUs.

    Of the wait for data it counts what the preparation of the rows takes longer than on the median rank. Where all ranks take
    the same time, and longer than a step, they wait for different times only because they began at different times.
    """

    compute_s: float
    data_s: float
    optim_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Their sum."""
        return self.compute_s + self.data_s + self.optim_s


def estimate_work(ranks: Sequence[RankStats]) -> list[RankWork]:
    """Estimate the work of each rank in one step from the step's time and the ratios of the timed layers.

    The slowest rank is assumed to work for the whole step. The other ranks' compute time is scaled down by the time of their
    layer. Ranks without a timed layer count as median ranks. Kernel launches and the network are not measured per rank, so they
    are not included.
    """
    data = _data_seconds(ranks)
    optim = [rank.optim_s if rank.optim_s > 0 else 0.0 for rank in ranks]
    usual = _median([rank.compute_s for rank in ranks])
    factors = [rank.compute_s / usual if rank.compute_s / usual > 0 else 1.0 for rank in ranks]
    rests = (rank.step_s - rank.data_s - one for rank, one in zip(ranks, optim, strict=True) if rank.step_s > 0)
    compute_s, slowest = max(0.0, min(rests, default=0.0)), max(factors)
    return [
        RankWork(compute_s * factor / slowest, data_s, optim_s)
        for factor, data_s, optim_s in zip(factors, data, optim, strict=True)
    ]


def _data_seconds(ranks: Sequence[RankStats]) -> list[float]:
    usual = _median([rank.load_s for rank in ranks])
    return [min(rank.data_s, rank.load_s - usual) if rank.data_s > 0 and rank.load_s > usual else 0.0 for rank in ranks]


def straggler_ratio(works: Sequence[RankWork]) -> float:
    """Return the slowest rank's work divided by the median rank's; 1 if all are equal."""
    usual = statistics.median_low([one.seconds for one in works])
    return max(one.seconds for one in works) / usual if usual > 0 else 1.0


def aggregate_metrics(ranks: Sequence[RankStats], works: Sequence[RankWork]) -> dict[str, float]:
    """Return the metrics over all ranks and their `works`, without metrics that no rank measured."""
    devices = [rank.device for rank in ranks]
    steps = [rank.step_s for rank in ranks if rank.step_s > 0]
    metrics = {"time/step_max_rank_s": max(steps), "time/straggler_ratio": straggler_ratio(works)} if steps else {}
    utils, temps = _known(devices, "gpu_util"), _known(devices, "gpu_temp_c")
    powers, memory = _known(devices, "gpu_power_w"), _known(devices, "gpu_memory")
    metrics |= {"gpu/util_mean": statistics.fmean(utils), "gpu/util_min": min(utils)} if utils else {}
    metrics |= {"gpu/temp_max": max(temps)} if temps else {}
    metrics |= {"gpu/power_mean": statistics.fmean(powers)} if powers else {}
    metrics |= {"gpu/memory_max_frac": max(memory)} if memory else {}
    active, reserved, retries = _known(ranks, "active"), _known(ranks, "reserved"), _known(ranks, "alloc_retries")
    metrics |= {"memory/peak_active_gib": max(active) / 2**30} if active else {}
    metrics |= {"memory/peak_reserved_gib": max(reserved) / 2**30} if reserved else {}
    metrics |= {"memory/alloc_retries": sum(retries)} if retries else {}
    metrics |= {"gpu/xids": sum(device.xids for device in devices)} if _known(devices, "gpu_index") else {}
    cpus, rams = _known(devices, "host_cpu_util"), _known(devices, "host_ram_used")
    metrics |= {"host/cpu_util_mean": statistics.fmean(cpus)} if cpus else {}
    metrics |= {"host/ram_used_max_frac": max(rams)} if rams else {}
    return metrics


def _known(records: Sequence[RankStats] | Sequence[DeviceReadings], name: str) -> list[float]:
    return [value for record in records if not math.isnan(value := getattr(record, name))]


def _median(values: Sequence[float]) -> float:
    """Return the lower median of the positive values; NaN if there are none."""
    known = [value for value in values if value > 0]
    return statistics.median_low(known) if known else math.nan
