"""Report the measurements of benchmarks/gpu.py as Markdown, with values for the GPU's row in launcher/plan/gpu_types.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import GPUS, GpuType, recognize
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_tokens_per_sec, sizing_inputs

LAUNCHER = "launcher"
# A setting measured in addition to the defaults. Such a side is named after it.
COMPILE = "model.compile=true"
# Deviations from the plan beyond which a run sends an alert: launcher/train/monitoring/anomalies.py.
SPEED_LIMIT, MEMORY_LIMIT = 0.20, 0.05


@dataclass(frozen=True)
class Side:
    """One side of a case: its plan, including the micro-batch, and the figures of benchmarks/sides.py."""

    name: str
    attention: str
    recomputed: str
    plan: LaunchPlan
    figures: dict[str, Any]


@dataclass
class Measured:
    """All measurements so far: kernels by name, sides by case, and notes about missing or failed parts."""

    card: str
    tests: str = ""
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: dict[str, list[Side]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def lines(measured: Measured) -> list[str]:
    """Return the body of a section of RESULTS.md."""
    parts = [measured.tests, *_kernel_table(measured.kernels)]
    for case, sides in measured.cases.items():
        parts += ["", f"**{case}**", "", *_side_table(sides), "", *_against_plan(sides, measured.card)]
    if row := fitted_row(measured):
        parts += ["", "Rows for `launcher/plan/gpu_types.py`:", "", "```python", row, "```"]
    if measured.notes:
        parts += ["", *(f"- {note}" for note in measured.notes)]
    return parts


def _kernel_table(kernels: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not kernels:
        return
    yield from ("", "| attention kernel | documents are kept apart | error against fp32 | forward, ms | backward, ms | TFLOP/s |")
    yield "|---|---|---|---|---|---|"
    for name, of_kernel in kernels.items():
        if problem := of_kernel.get("missing") or of_kernel.get("failed"):
            yield f"| {name} | {'not here' if 'missing' in of_kernel else 'failed'}: {problem} | | | | |"
            continue
        apart = "yes" if of_kernel["is_isolated"] else f"NO: {of_kernel['isolation']}"
        times = f"{of_kernel['forward_ms']:.3f} | {of_kernel['backward_ms']:.3f} | {of_kernel['tflops']:.1f}"
        yield f"| {name} | {apart} | {of_kernel['error']:.1e} | {times} |"


def _side_table(sides: list[Side]) -> Iterator[str]:
    yield "| side | attention | rows x micro-batches | recomputed | tokens/s | s a step | MFU | peak GiB | launcher / side |"
    yield "|---|---|---|---|---|---|---|---|---|"
    ours = next((side.figures["tokens_per_sec"] for side in sides if side.name.startswith(LAUNCHER)), None)
    for side in sides:
        rate, batch, peak = side.figures["tokens_per_sec"], side.plan.batch, peak_gib(side)
        split = f"{batch.micro_batch_size} x {batch.accumulation}"
        ratio = f"{ours / rate:.2f}" if ours is not None else ""
        shares = f"{_percent(mfu(side))} | {'' if peak is None else f'{peak:.1f}'} | {ratio}"
        figures = f"{rate:,.0f} | {side.figures['step_s']:.3f} | {shares}"
        yield f"| {side.name} | {side.attention} | {split} | {side.recomputed} | {figures} |"


def _against_plan(sides: list[Side], card: str) -> Iterator[str]:
    """Yield a comparison of the launcher's run with its plan."""
    for side in sides:
        last = _last_metrics(side)
        if planned := planned_tokens_per_sec(side.plan):
            yield f"{side.name}: {_deviation(side.figures['tokens_per_sec'], planned, 'tokens/s', SPEED_LIMIT)}"
        if planned := last.get("memory/planned_gib"):
            reserved = _deviation(last["memory/peak_reserved_gib"], planned, "GiB reserved", MEMORY_LIMIT)
            peak = side.plan.peak
            tensors = "" if peak is None else f"; tensors {last['memory/peak_active_gib']:.2f}, planned {peak.tensors_gib:.2f}"
            yield f"{side.name}: {reserved}{tensors}"
        if recognize(card) is None and side.name.startswith(LAUNCHER):
            yield f"{card} is not in launcher/plan/gpu_types.py: no MFU and no planned speed"


def _deviation(measured: float, planned: float, unit: str, limit: float) -> str:
    deviation = measured / planned - 1
    verdict = "within" if abs(deviation) <= limit else "NOT within"
    digits = ",.0f" if measured > 1000 else ".2f"
    return f"{measured:{digits}} {unit}, planned {planned:{digits}} ({deviation:+.1%}, {verdict} {limit:.0%})"


def _last_metrics(side: Side) -> dict[str, float]:
    metrics = side.figures.get("metrics") or [{}]
    return dict(metrics[-1])


def peak_gib(side: Side) -> float | None:
    """Return the most memory that the allocator reserved on a GPU."""
    reserved = _last_metrics(side).get("memory/peak_reserved_gib")
    return side.figures.get("peak_gib") if reserved is None else reserved


def mfu(side: Side) -> float | None:
    """Return the MFU for the mean document of the plan's data; None for an unknown GPU and on CPUs."""
    flops, data, gpu = train_flops(side.plan.model), side.plan.data, recognize(side.plan.gpu_name)
    if flops is None or data is None or gpu is None or side.plan.topology.device != "cuda":
        return None
    if "metrics" in side.figures and (shares := [line["perf/mfu"] for line in side.figures["metrics"] if "perf/mfu" in line]):
        # The launcher's MFU uses the documents of each step.
        return statistics.median(shares)
    length = max(1, round(data.num_tokens / data.num_docs))
    per_token = flops.of([length], 0) / length + flops.per_label * data.num_trained_tokens / data.num_tokens
    peak = GPUS[gpu].peak_tflops(side.plan.config.model.dtype) or float("inf")
    return float(side.figures["tokens_per_sec"] * per_token / side.plan.topology.world_size / peak / 1e12)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def fitted_row(measured: Measured) -> str:
    """Return the values that the launcher's runs give for this GPU's row; empty if there are none."""
    of_launcher = [side for sides in measured.cases.values() for side in sides if side.name.startswith(LAUNCHER)]
    on_one = [side for side in of_launcher if side.plan.topology.world_size == 1]
    values = {name: value for name, fit in _FITS.items() if (value := _median_of(fit, on_one)) is not None}
    if not values:
        return ""
    key = recognize(measured.card) or measured.card
    return f'"{key}": ' + ", ".join(f"{name}={value:.3g}" for name, value in values.items())


def _median_of(fit: Any, sides: list[Side]) -> float | None:
    fitted = [value for side in sides if (value := fit(side)) is not None]
    return statistics.median(fitted) if fitted else None


def _runtime_gib(side: Side) -> float | None:
    """Return the memory of CUDA and NCCL: the GPU memory in use minus the allocator's reserved memory."""
    last, device_gib = _last_metrics(side), side.plan.memory.device_gib
    if device_gib is None or not {"gpu/memory_max_frac", "memory/peak_reserved_gib"} <= last.keys():
        return None
    return max(0.0, last["gpu/memory_max_frac"] * device_gib - last["memory/peak_reserved_gib"])


def _fragmentation(side: Side) -> float | None:
    last = _last_metrics(side)
    reserved, active = last.get("memory/peak_reserved_gib"), last.get("memory/peak_active_gib")
    return reserved / active if reserved and active else None


def gemm_share(side: Side) -> float | None:
    """Return the share of the peak for which the time model gives the measured speed; None if there is none."""
    return _fit(side, lambda gpu, share: replace(gpu, gemm_share=share), 0.02, 1.0)


def _fit(side: Side, changed: Callable[[GpuType, float], GpuType], low: float, high: float) -> float | None:
    """Return the value for which the row from `changed` gives the measured speed; None if there is none."""
    gpu, lowest, highest = sizing_inputs(side.plan).gpu, 1.01 * low, 0.99 * high
    if gpu is None:
        return None
    for _ in range(30):
        value = (low + high) / 2
        planned = planned_tokens_per_sec(side.plan, changed(gpu, value))
        if planned is None:
            return None
        low, high = (value, high) if planned < side.figures["tokens_per_sec"] else (low, value)
    return value if lowest < value < highest else None


_FITS = {"runtime_gib": _runtime_gib, "fragmentation": _fragmentation, "gemm_share": gemm_share}
