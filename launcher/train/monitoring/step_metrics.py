"""The numbers of each step: timers and readings of this rank, statistics of all ranks, and the metrics that rank 0 logs.

The statistics of each rank travel in the all-reduce of each step. Step times do not show which rank is slow, because under ZeRO-3
all ranks finish a step together. `LayerTimer` measures what contains no collective: the forward pass of one linear layer, between
DeepSpeed's fetch of its weights and their release (or of a whole decoder layer if its weights are fetched as a whole, because the
compiler does not support hooks inside it).
"""

from __future__ import annotations

import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from launcher.config.schema import RunConfig
from launcher.data.loader import StepBatch
from launcher.nvml import LOST_GPU, GpuSensor, describe_xid
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import lookup
from launcher.plan.launch_plan import LaunchPlan

INTERVAL_S = 5.0
_CPU_S = 0.5
# Consecutive readings after which lowered clocks are reported; shorter drops hardly slow training.
_LASTING_READINGS = 6
_NAN = math.nan


class StepTimer:
    """Measures named parts of a step in seconds. On a GPU it uses CUDA events, so measuring never waits for the GPU.

    A part `on_host` is timed with the CPU's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._start = time.perf_counter()

    def begin(self) -> None:
        self._spans.clear()
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        on_gpu = self._cuda and not on_host
        start = mark_time(on_gpu)
        yield
        self._spans.append((name, start, mark_time(on_gpu)))

    def read(self) -> dict[str, float]:
        """Return `time/<part>_s` and `time/step_s`. Call it when the device has finished the step; it does not wait."""
        totals: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            totals[f"time/{name}_s"] = totals.get(f"time/{name}_s", 0.0) + seconds
        totals["time/step_s"] = time.perf_counter() - self._start
        return totals


class Meter:
    """Computes the metrics of each step; tracks the token counts of the run and the pace for the ETA.

    MFU is omitted if `peak_tflops`, this device's peak, is None, or if the model's FLOPs are unknown.
    `overall_tokens_per_sec` is for the last step, including the time between it and the previous step.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        max_steps: int,
        attempt: int,
        restart: int,
        peak_tflops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._max_steps = max_steps
        self._recent: deque[float] = deque(maxlen=20)
        self._process = psutil.Process()
        self._fixed = {"run/attempt": float(attempt), "run/restarts": float(restart), "run/nodes": float(plan.topology.nodes)}
        self._flops = train_flops(plan.model)
        self._peak_tflops = peak_tflops
        self._clock = clock
        self._ended_at: float | None = None
        self._between_s, self._num_between = 0.0, 0
        self.overall_tokens_per_sec = 0.0
        self.tokens = 0
        self.skipped_steps = 0

    def restore(self, tokens: int, skipped_steps: int) -> None:
        """Continue from a checkpoint's counts."""
        self.tokens = tokens
        self.skipped_steps = skipped_steps

    def step(
        self, step: int, batch: StepBatch, loss: float, grad_norm: float, lr: float, times: dict[str, float]
    ) -> dict[str, float]:
        """Return the metrics of optimizer step `step`, counted from 1; `loss` is per trained token of the global batch."""
        world_size, step_s = self._plan.topology.world_size, times["time/step_s"]
        self._recent.append(step_s)
        # Evaluation, saves and logging, from the end of the previous step.
        now, between_s = self._clock(), 0.0
        if self._ended_at is not None:
            between_s = max(0.0, now - self._ended_at - step_s)
            self._between_s, self._num_between = self._between_s + between_s, self._num_between + 1
        self._ended_at = now
        pace_s = statistics.median(self._recent) + self._between_s / max(1, self._num_between)
        self.overall_tokens_per_sec = batch.num_tokens / (step_s + between_s)
        self.tokens += batch.num_tokens
        samples = step * self._plan.batch.global_batch_size
        per_sec = batch.num_tokens / step_s
        sources = self._plan.config.data.sources
        source_tokens = np.bincount(batch.documents["source"], batch.doc_lengths, len(sources)).tolist()
        metrics = {
            "trainer/step": float(step),
            "trainer/tokens": float(self.tokens),
            "trainer/samples": float(samples),
            "trainer/progress": step / self._max_steps,
            "trainer/eta_s": (self._max_steps - step) * pace_s,
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/skipped_steps": float(self.skipped_steps),
            "perf/tokens_per_sec": per_sec,
            "perf/tokens_per_sec_per_gpu": per_sec / world_size,
            "perf/padding_frac": 1 - batch.num_tokens / batch.num_slots,
            "data/label_frac": batch.num_labels / batch.num_tokens,
            **{
                f"data/source/{source.name}/frac": tokens / batch.num_tokens
                for source, tokens in zip(sources, source_tokens, strict=True)
            },
            "memory/host_rss_gib": self._process.memory_info().rss / 2**30,
            **times,
            **self._fixed,
        }
        if self._plan.data is not None:
            metrics["trainer/epoch"] = samples / self._plan.data.num_rows
            metrics["data/truncated_frac"] = self._plan.data.truncated_frac
        if self._flops is not None:
            tflops = self._flops.of(batch.doc_lengths, batch.num_labels) / step_s / world_size / 1e12
            metrics["perf/tflops_per_gpu"] = tflops
            if self._peak_tflops is not None:
                metrics["perf/mfu"] = tflops / self._peak_tflops
        return metrics


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def find_peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """Return the vendor's peak TFLOP/s of matrix products in the run's dtype; None for an unknown GPU or a CPU.

    A CPU has no such figure, and a value measured beside other processes is too low: MFU would exceed 1.
    """
    gpu = None if device.type == "cpu" else lookup(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    dtype = config.model.dtype
    uses_tf32 = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return gpu.peak_tflops("tf32" if uses_tf32 else dtype)


class DeviceReadings(NamedTuple):
    """The latest readings; NaN for values that were not read. Fractions are 0 to 1.

    Attributes:
        gpu_index: the driver's number of the GPU, independent of CUDA_VISIBLE_DEVICES.
        xids: number of Xid faults since the start.
        last_xid: code of the last fault.
        host_cpu_util, host_ram_used: of the node; read by one rank per node.
    """

    gpu_index: float = _NAN
    gpu_util: float = _NAN
    gpu_memory: float = _NAN
    gpu_power_w: float = _NAN
    gpu_temp_c: float = _NAN
    xids: float = 0.0
    last_xid: float = _NAN
    host_cpu_util: float = _NAN
    host_ram_used: float = _NAN


class DeviceMonitor:
    """Keeps `latest` up to date; calls `on_fault` from its thread for each Xid, lasting lowered clocks, and a lost GPU.

    `device` is the rank's device; only NVIDIA GPUs are read. With `reads_host`, the node's CPU and memory are read as well.
    """

    def __init__(
        self, device: torch.device, reads_host: bool, on_fault: Callable[[str], None], interval_s: float = INTERVAL_S
    ) -> None:
        self._device, self._reads_host = device, reads_host
        self._on_fault, self._interval_s = on_fault, interval_s
        self._stopped = threading.Event()
        self.latest = DeviceReadings()

    def start(self) -> DeviceMonitor:
        """Start the thread."""
        threading.Thread(target=self._watch, name="device-monitor", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop the thread within an interval, without waiting for it, because the driver may hang."""
        self._stopped.set()

    def _watch(self) -> None:
        try:
            gpu = None
            if self._device.type == "cuda":
                properties = torch.cuda.get_device_properties(self._device)
                bus_id = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
                gpu = GpuSensor.open(f"GPU-{properties.uuid}", bus_id)
            if gpu is None and not self._reads_host:
                return
            gpu_name, is_reported, num_slow = "", False, 0
            while not self._stopped.is_set():
                readings = gpu.read() if gpu is not None else {}
                if self._reads_host:
                    memory = psutil.virtual_memory()
                    readings["host_cpu_util"] = psutil.cpu_percent(interval=_CPU_S) / 100
                    readings["host_ram_used"] = 1 - memory.available / memory.total
                self.latest = self.latest._replace(**readings)
                # A lost GPU no longer has a number.
                gpu_name = gpu_name if math.isnan(self.latest.gpu_index) else f" (GPU {self.latest.gpu_index:.0f})"
                if gpu is not None and gpu.is_lost and not is_reported:
                    is_reported = True
                    self._on_fault(f"{LOST_GPU}{gpu_name}; restart the node, or reset the GPU")
                slowdowns = gpu.read_hardware_slowdowns() if gpu is not None else ()
                num_slow = num_slow + 1 if slowdowns else 0
                if num_slow == _LASTING_READINGS:
                    reasons = " and ".join(slowdowns)
                    self._on_fault(
                        f"the clocks of a GPU are lowered{gpu_name}: {reasons}; check the node's cooling and power supply"
                    )
                # Report GPU faults until the next reading is due.
                until = time.monotonic() + self._interval_s
                while (left := until - time.monotonic()) > 0 and not self._stopped.is_set():
                    if gpu is None or not gpu.has_events:
                        self._stopped.wait(left)
                    elif (number := gpu.next_xid(left)) is not None:
                        self.latest = self.latest._replace(xids=self.latest.xids + 1, last_xid=float(number))
                        self._on_fault(f"Xid {number} on GPU {self.latest.gpu_index:.0f}: {describe_xid(number)}")
        except Exception as error:
            # Only the charts lose these readings.
            print(f"note: the readings of this rank's device have stopped: {type(error).__name__}: {error}", file=sys.stderr)


class RankStats(NamedTuple):
    """Statistics of one rank in one step; NaN for values that were not measured.

    Attributes:
        step_s: time of the whole step.
        data_s: time that the rank waited for its rows.
        load_s: time that the preparation of its rows took, which overlaps with the step before.
        compute_s: time of the timed layer per token, see LayerTimer.
        active, reserved: peak bytes of GPU memory so far.
        alloc_retries: number of retried allocations so far.
        device: readings of the GPU and, on one rank per node, of the host.
    """

    step_s: float = math.nan
    data_s: float = math.nan
    load_s: float = math.nan
    compute_s: float = math.nan
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
    """Seconds of a rank's step without waiting for other ranks: compute, and waiting for data.

    Of the wait for data it counts what the preparation of the rows takes longer than on the median rank. Where all ranks take
    the same time, and longer than a step, they wait for different times only because they began at different times.
    """

    compute_s: float
    data_s: float

    @property
    def seconds(self) -> float:
        """Their sum."""
        return self.compute_s + self.data_s


def estimate_work(ranks: Sequence[RankStats]) -> list[RankWork]:
    """Estimate the work of each rank in one step from the step's time and the ratios of the timed layers.

    The slowest rank is assumed to work for the whole step. The other ranks' compute time is scaled down by the time of their
    layer. Ranks without a timed layer count as median ranks. Kernel launches and the network are not measured per rank, so they
    are not included.
    """
    usual = _median([rank.load_s for rank in ranks])
    data = [min(rank.data_s, rank.load_s - usual) if rank.data_s > 0 and rank.load_s > usual else 0.0 for rank in ranks]
    usual = _median([rank.compute_s for rank in ranks])
    factors = [rank.compute_s / usual if rank.compute_s / usual > 0 else 1.0 for rank in ranks]
    rests = (rank.step_s - rank.data_s for rank in ranks if rank.step_s > 0)
    compute_s, slowest = max(0.0, min(rests, default=0.0)), max(factors)
    return [RankWork(compute_s * factor / slowest, data_s) for factor, data_s in zip(factors, data, strict=True)]


def straggler_ratio(works: Sequence[RankWork]) -> float:
    """Return the slowest rank's work divided by the median rank's; 1 if all are equal."""
    usual = statistics.median_low([one.seconds for one in works])
    return max(one.seconds for one in works) / usual if usual > 0 else 1.0


# Metrics over all ranks: the field of RankStats or DeviceReadings, and how its values become one.
_AGGREGATES: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("gpu/util_mean", "gpu_util", statistics.fmean),
    ("gpu/util_min", "gpu_util", min),
    ("gpu/temp_max", "gpu_temp_c", max),
    ("gpu/power_mean", "gpu_power_w", statistics.fmean),
    ("gpu/memory_max_frac", "gpu_memory", max),
    ("memory/peak_active_gib", "active", lambda values: max(values) / 2**30),
    ("memory/peak_reserved_gib", "reserved", lambda values: max(values) / 2**30),
    ("memory/alloc_retries", "alloc_retries", sum),
    ("host/cpu_util_mean", "host_cpu_util", statistics.fmean),
    ("host/ram_used_max_frac", "host_ram_used", max),
)


def aggregate_metrics(ranks: Sequence[RankStats], works: Sequence[RankWork]) -> dict[str, float]:
    """Return the metrics over all ranks and their `works`, without metrics that no rank measured."""
    devices = [rank.device for rank in ranks]
    steps = [rank.step_s for rank in ranks if rank.step_s > 0]
    metrics = {"time/step_max_rank_s": max(steps), "time/straggler_ratio": straggler_ratio(works)} if steps else {}
    for name, field, aggregate in _AGGREGATES:
        records: Sequence[Any] = devices if field in DeviceReadings._fields else ranks
        if known := [value for record in records if not math.isnan(value := getattr(record, field))]:
            metrics[name] = aggregate(known)
    if not all(math.isnan(device.gpu_index) for device in devices):
        metrics["gpu/xids"] = sum(device.xids for device in devices)
    return metrics


def _median(values: Sequence[float]) -> float:
    """Return the lower median of the positive values; NaN if there are none."""
    known = [value for value in values if value > 0]
    return statistics.median_low(known) if known else math.nan


class LayerTimer:
    """Times one layer of `model` in training mode, including recomputation. Create it after DeepSpeed's engine."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start: Any = None
        self._spans: list[tuple[Any, Any, int]] = []
        layer = representative_layer(model)
        if layer is not None:
            # This hook runs after DeepSpeed's hook that gathers the weights, and before the one that releases them.
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end, prepend=True)

    def read(self) -> float:
        """Return seconds per token since the last call, NaN if there are none; call it when the device has finished."""
        spans, self._spans = self._spans, []
        tokens = sum(count for *_, count in spans)
        if not tokens:
            return math.nan
        seconds = sum(start.elapsed_time(end) / 1000 if self._cuda else end - start for start, end, _ in spans)
        return seconds / tokens

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._start = mark_time(self._cuda) if module.training else None

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if self._start is not None:
            output = output[0] if isinstance(output, tuple) else output
            # Count tokens in the output: a layer that is called by keyword has no inputs here.
            self._spans.append((self._start, mark_time(self._cuda), output.numel() // output.shape[-1]))
            self._start = None


def mark_time(on_gpu: bool) -> Any:
    """Return a CUDA event that is recorded now, without waiting for the GPU, or else the CPU's clock in seconds."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def representative_layer(model: nn.Module) -> nn.Module | None:
    """Return the largest linear layer of the middle block, or the block itself if ZeRO-3 gathers it as a whole.

    Returns None if the model has no list of blocks with a linear layer.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        return None
    blocks = max(stacks, key=len)
    block = blocks[len(blocks) // 2]
    if getattr(block, "_z3_leaf", False):
        return block
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return max(linears, key=lambda linear: linear.in_features * linear.out_features, default=None)
