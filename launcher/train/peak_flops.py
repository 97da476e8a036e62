"""The FLOP/s that a rank's device could reach: the divisor of MFU."""

from __future__ import annotations

import time

import torch

from launcher.config.schema import RunConfig
from launcher.plan.gpus import lookup
from launcher.train.model import DTYPES

# Of measuring; making the matrices comes on top.
_BUDGET_S = 0.12
_SMALLEST, _LARGEST = 256, 2048


def peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """Peak TFLOP/s of matrix products in the type of number that the run computes in; None for a GPU that nobody knows.

    A GPU's is its vendor's figure. A CPU's is measured with the threads that this rank has, within 0.3 s.
    """
    dtype = config.model.dtype
    if device.type == "cpu":
        return measured_tflops(DTYPES[dtype])
    gpu = lookup(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    rounded = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return gpu.peak_tflops("tf32" if rounded else dtype)


def measured_tflops(dtype: torch.dtype) -> float:
    """The best TFLOP/s of square matrix products on this CPU, of the largest size that the time allows."""
    end = time.perf_counter() + _BUDGET_S
    size, best, runs = _SMALLEST, 0.0, 0
    # Ones: random numbers would move on the generator that the run draws from, and take no longer to multiply.
    left, right, product = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    while True:
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        now = time.perf_counter()
        best, runs = max(best, 2 * size**3 / (now - started) / 1e12), runs + 1
        if now >= end:
            return best
        # The first product of a size prepares its kernel; two more of eight times the work have to fit into what is left.
        if runs >= 3 and size < _LARGEST and now + 24 * (now - started) < end:
            size, runs = 2 * size, 0
            left, right, product = (torch.ones(size, size, dtype=dtype) for _ in range(3))
