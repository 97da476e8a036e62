"""Peak FLOP/s of a rank's device: the divisor of MFU."""

from __future__ import annotations

import time

import torch

from launcher.config.schema import RunConfig
from launcher.plan.gpus import lookup
from launcher.train.model import DTYPES

# Seconds of multiplying; allocating the matrices is extra.
_BUDGET_S = 0.12
_SMALLEST, _LARGEST = 256, 2048


def find_peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """Return the peak TFLOP/s of matrix products in the run's dtype; None for an unknown GPU.

    For a GPU it is the vendor's figure. A CPU is measured with this rank's threads, in less than 0.3 s.
    """
    dtype = config.model.dtype
    if device.type == "cpu":
        return measure_tflops(DTYPES[dtype])
    gpu = lookup(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    uses_tf32 = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return gpu.peak_tflops("tf32" if uses_tf32 else dtype)


def measure_tflops(dtype: torch.dtype) -> float:
    """Measure the highest TFLOP/s of square matrix products on this CPU, at the largest size that the budget allows."""
    end = time.perf_counter() + _BUDGET_S
    size, best, runs = _SMALLEST, 0.0, 0
    # Ones: random numbers would advance the generator of the run, and multiply no slower.
    left, right, product = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    while True:
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        now = time.perf_counter()
        best, runs = max(best, 2 * size**3 / (now - started) / 1e12), runs + 1
        if now >= end:
            return best
        # The first product of a size prepares its kernel. Grow if two products of eight times the work fit into the budget.
        if runs >= 3 and size < _LARGEST and now + 24 * (now - started) < end:
            size, runs = 2 * size, 0
            left, right, product = (torch.ones(size, size, dtype=dtype) for _ in range(3))
