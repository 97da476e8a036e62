"""Peak FLOP/s of a rank's device: the divisor of MFU."""

from __future__ import annotations

import torch

from launcher.config.schema import RunConfig
from launcher.plan.gpu_types import lookup


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
