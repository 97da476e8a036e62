"""Timing and metrics of one step."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from launcher.config.schema import RunConfig
from launcher.data.loader import StepBatch
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import lookup
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.monitoring.rank_stats import mark_time


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
        sources = zip(self._plan.config.data.sources, batch.source_tokens, strict=True)
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
            **{f"data/source/{source.name}/frac": tokens / batch.num_tokens for source, tokens in sources},
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
