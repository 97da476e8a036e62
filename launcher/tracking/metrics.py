"""The table of metrics: name, unit, section, and how each is shown in W&B, `status`, the report and the console line.

To add a metric, add a row to METRICS and log it under that name. Everything that shows metrics reads this table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher import clock

STEP = "trainer/step"
# Sections of the W&B workspace, in order. Sections that only METRICS names follow.
SECTIONS = ("Training", "Evaluation", "Throughput", "Memory", "Stability", "Data", "Checkpoints", "Cluster", "Cost")
# Lines of `status` that show metrics, in order. Lines that only METRICS names follow.
STATUS_LINES = ("loss", "pace", "memory", "GPUs", "ranks")

_LAST = 99


def format_duration(seconds: float) -> str:
    """Return seconds in the two largest units: 45s, 1m40s, 2h05m, 3d04h; `?` if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def format_age(at: float) -> str:
    """Return how long ago a time in seconds since the epoch was."""
    return format_duration(max(0.0, clock.now() - at))


@dataclass(frozen=True)
class Part:
    """How a metric is shown within a line of text. An empty text leaves it out.

    Attributes:
        show: formats the value.
        line: label of the line of `status`.
        order: position in the line; rows of equal order keep the order of METRICS.
        separator: text between this part and the one before.
        is_median: `status` shows the median of the last steps instead of the last value.
    """

    show: Callable[[float], str]
    line: str = ""
    order: int = _LAST
    separator: str = ", "
    is_median: bool = False


@dataclass(frozen=True)
class Curve:
    """A chart of the report page; `scale` is the factor from the metric to the axis, such as 100 for a percentage."""

    title: str
    scale: float = 1.0
    unit: str = ""


@dataclass(frozen=True)
class Metric:
    """One metric, or all metrics that match a pattern.

    Attributes:
        section: section of the W&B workspace.
        title: title of the W&B panel. Metrics of one section with the same title share a panel. No panel if empty.
        unit: axis label of its W&B panels; empty for counts and fractions (0 to 1), and if the panel's title names it.
        log_y: the panel has a logarithmic y axis.
        curve: chart of the report page, in the order of METRICS.
        status: place in `status`.
        console: place in the line that each logged step prints.
        lowest: name in the run's summary of the lowest value; `<name>_step` is its step. None if the lowest is not kept.
    """

    section: str = ""
    title: str = ""
    unit: str = ""
    log_y: bool = False
    curve: Curve | None = None
    status: Part | None = None
    console: Part | None = None
    lowest: str | None = None


@dataclass(frozen=True)
class Panel:
    """A line plot of the W&B workspace. `metrics` are names, or one pattern with `*`."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    log_y: bool = False

    @property
    def regex(self) -> str | None:
        """The pattern as a regular expression with escaped slashes, as W&B takes it; None for names."""
        (first, *_) = self.metrics
        if "*" not in first:
            return None
        return "^" + re.escape(first).replace("/", r"\/").replace(r"\*", ".+") + "$"


_PARTS_OF_A_STEP = "Step time and its parts"

# Keyed by name. `*` in a name stands for any text, such as the name of a data source.
METRICS: dict[str, Metric] = {
    "train/loss": Metric(
        "Training",
        "Loss per trained token",
        curve=Curve("Training loss"),
        status=Part("{:.4f}".format, "loss"),
        console=Part("loss {:.3f}".format),
        lowest="best/train_loss",
    ),
    "eval/held_out/loss": Metric("Training", "Loss per trained token", curve=Curve("Held-out loss"), lowest="best/eval_loss"),
    "eval/held_out/ppl": Metric("Training", "Held-out perplexity"),
    "eval/*/loss": Metric("Evaluation", "Loss by evaluation set and source"),
    "eval/*/ppl": Metric("Evaluation", "Perplexity by evaluation set"),
    "train/lr": Metric("Training", "Learning rate", curve=Curve("Learning rate"), console=Part("lr {:.1e}".format)),
    "train/grad_norm": Metric(
        "Stability",
        "Gradient norm",
        log_y=True,
        curve=Curve("Gradient norm"),
        console=Part("grad {:.2f}".format),
    ),
    "train/skipped_steps": Metric("Stability", "Skipped steps"),
    STEP: Metric(),
    "trainer/tokens": Metric("Training", "Tokens seen"),
    "trainer/samples": Metric(),
    "trainer/progress": Metric("Training", "Progress"),
    "perf/tokens_per_sec": Metric(
        "Throughput",
        "Tokens per second",
        curve=Curve("Tokens per second"),
        status=Part("{:,.0f} tokens/s".format, "pace", 0, is_median=True),
        console=Part("{:,.0f} tok/s".format),
    ),
    "perf/planned_tokens_per_sec": Metric("Throughput", "Tokens per second"),
    "trainer/eta_s": Metric("Training", "Time left", "s", console=Part(lambda seconds: f"eta {format_duration(seconds)}")),
    "perf/tokens_per_sec_per_gpu": Metric("Throughput", "Tokens per second per GPU"),
    "perf/mfu": Metric(
        "Throughput",
        "MFU",
        curve=Curve("MFU", 100.0, "%"),
        status=Part("MFU {:.1%}".format, "pace", is_median=True),
    ),
    "perf/tflops_per_gpu": Metric("Throughput", "TFLOP/s per GPU"),
    "time/eval_s": Metric("Throughput", "Time of evaluations and of checkpoint stalls", "s"),
    "time/ckpt_s": Metric("Throughput", "Time of evaluations and of checkpoint stalls", "s"),
    "time/step_s": Metric(
        "Throughput",
        _PARTS_OF_A_STEP,
        "s",
        status=Part("{:.2f} s a step".format, "pace", 1, is_median=True),
    ),
    "time/data_s": Metric("Throughput", _PARTS_OF_A_STEP, "s"),
    "time/fwd_bwd_s": Metric("Throughput", _PARTS_OF_A_STEP, "s"),
    "time/optim_s": Metric("Throughput", _PARTS_OF_A_STEP, "s"),
    "memory/peak_active_gib": Metric("Memory", "Peak GPU memory", "GiB"),
    "memory/planned_gib": Metric("Memory", "Peak GPU memory", "GiB"),
    "memory/peak_reserved_gib": Metric(
        "Memory",
        "Peak GPU memory",
        "GiB",
        curve=Curve("Peak GPU memory reserved", unit="GiB"),
        status=Part("{:.1f} GiB of GPU memory reserved at peak".format, "memory"),
    ),
    "memory/alloc_retries": Metric("Memory", "Retried allocations"),
    "memory/host_rss_gib": Metric(
        "Memory",
        "Main memory of rank 0",
        "GiB",
        curve=Curve("Main memory of rank 0", unit="GiB"),
        status=Part("{:.1f} GiB of main memory in rank 0".format, "memory"),
    ),
    "cost/usd": Metric("Cost", "Cost", "US dollars"),
    "cost/gpu_hours": Metric("Cost", "GPU hours", "h"),
    "cost/usd_per_million_tokens": Metric("Cost", "Cost per million tokens", "US dollars"),
    "perf/goodput": Metric(
        "Cost",
        "Share of time on kept steps",
        curve=Curve("Goodput", 100.0, "%"),
    ),
    "time/kept_s": Metric(unit="s"),
    "lost/*_s": Metric("Cost", "Lost time by cause", "s"),
    "time/straggler_ratio": Metric(
        "Stability",
        "Slowest rank relative to the median rank",
        curve=Curve("Slowest rank relative to the median rank"),
        status=Part("the slowest rank takes {:.2f}x the time of the median rank".format, "ranks", is_median=True),
    ),
    "time/step_max_rank_s": Metric("Stability", "Longest step of any rank", "s"),
    "run/restarts": Metric("Stability", "Restarts"),
    "run/attempt": Metric("Stability", "Restarts"),
    "run/lost_steps": Metric("Stability", "Replayed steps"),
    "data/label_frac": Metric("Data", "Share of trained tokens"),
    "perf/padding_frac": Metric("Data", "Padding"),
    "data/truncated_frac": Metric("Data", "Truncated tokens"),
    "data/source/*/frac": Metric("Data", "Share of each source"),
    "trainer/epoch": Metric("Data", "Epochs"),
    "ckpt/last_step": Metric("Checkpoints", "Step of the last checkpoint"),
    "ckpt/save_s": Metric("Checkpoints", "Time to save, and time that training waited", "s"),
    "ckpt/stall_s": Metric("Checkpoints", "Time to save, and time that training waited", "s"),
    "ckpt/bytes": Metric("Checkpoints", "Size", "bytes"),
    "ckpt/disk_free_gib": Metric("Checkpoints", "Free disk", "GiB"),
    "gpu/util_mean": Metric(
        "Cluster",
        "GPU utilization, mean and lowest",
        curve=Curve("GPU utilization, mean", 100.0, "%"),
        status=Part("{:.0%} busy".format, "GPUs", 0),
    ),
    "gpu/util_min": Metric(
        "Cluster",
        "GPU utilization, mean and lowest",
        status=Part("(lowest {:.0%})".format, "GPUs", 1, " "),
    ),
    "gpu/temp_max": Metric(
        "Cluster",
        "Hottest GPU",
        "°C",
        curve=Curve("GPU temperature, highest", unit="°C"),
        status=Part("up to {:.0f} °C".format, "GPUs", 4),
    ),
    "gpu/power_mean": Metric("Cluster", "Power per GPU", "W", status=Part("{:,.0f} W each".format, "GPUs", 3)),
    "gpu/memory_max_frac": Metric(
        "Cluster",
        "GPU memory used, highest",
        status=Part("memory up to {:.0%}".format, "GPUs", 2),
    ),
    "gpu/xids": Metric(
        "Cluster",
        "GPU faults (Xid)",
        status=Part(lambda count: f"{count:.0f} Xid errors" if count else "", "GPUs", 5),
    ),
    "host/cpu_util_mean": Metric("Cluster", "CPU and main memory of the nodes"),
    "host/ram_used_max_frac": Metric("Cluster", "CPU and main memory of the nodes"),
    "run/nodes": Metric("Cluster", "Nodes"),
}


def panels() -> dict[str, tuple[Panel, ...]]:
    """Return the panels of each section of the W&B workspace."""
    by_section: dict[str, dict[str, list[str]]] = {section: {} for section in SECTIONS}
    for name, metric in METRICS.items():
        if metric.title:
            by_section.setdefault(metric.section, {}).setdefault(metric.title, []).append(name)
    return {
        section: tuple(
            Panel(title, tuple(names), METRICS[names[0]].unit, METRICS[names[0]].log_y) for title, names in titles.items()
        )
        for section, titles in by_section.items()
    }


def wandb_names() -> list[str]:
    """Return the names for W&B's define_metric: each name, or for a pattern the part up to its first `*`."""
    return list(dict.fromkeys(name.partition("*")[0] + "*" * ("*" in name) for name in METRICS if name != STEP))


def curves() -> dict[str, Curve]:
    """Return the charts of the report page by metric."""
    return {name: metric.curve for name, metric in METRICS.items() if metric.curve is not None}


def median_names() -> list[str]:
    """Return the metrics whose median over the last steps `status` shows."""
    return [name for name, metric in METRICS.items() if metric.status is not None and metric.status.is_median]


def status_lines(last: Mapping[str, Any], medians: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield label and text of each line of `status`, from metrics of the last step and medians of those in `median_names`."""
    parts: dict[str, list[tuple[Part, float]]] = {line: [] for line in STATUS_LINES}
    for name, metric in METRICS.items():
        if metric.status is not None:
            values = medians if metric.status.is_median else last
            if name in values:
                parts.setdefault(metric.status.line, []).append((metric.status, values[name]))
    for line, line_parts in parts.items():
        if text := _join_parts(line_parts):
            yield line, text


def format_step(metrics: Mapping[str, float], max_steps: int | None) -> str:
    """Return a line such as `step  12/40  loss 1.834  lr 1.8e-05  grad 1.32  231 tok/s  eta 1m40s`; leave out missing metrics."""
    parts = []
    if STEP in metrics:
        width = max(3, len(str(max_steps or "")))
        total = f"/{max_steps}" if max_steps else ""
        parts.append(f"step {int(metrics[STEP]):>{width}}{total}")
    shown = [(metric.console, metrics[name]) for name, metric in METRICS.items() if metric.console and name in metrics]
    return "  ".join(filter(None, (*parts, _join_parts(shown, "  "))))


def _join_parts(parts: list[tuple[Part, float]], separator: str | None = None) -> str:
    """Join the formatted parts in their order."""
    text = ""
    for part, value in sorted(parts, key=lambda pair: pair[0].order):
        if piece := part.show(value):
            text += (part.separator if separator is None else separator) * bool(text) + piece
    return text
