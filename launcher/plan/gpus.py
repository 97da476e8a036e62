"""What is known about GPU types: memory, dense bf16 peak, and how their names are recognised.

Peaks are the vendors' dense (no sparsity) bf16 figures from the data sheets of each product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`memory_gib` is usable device memory; `peak_tflops` is dense bf16."""

    memory_gib: float
    peak_tflops: float


GPUS = {
    "A100-40GB": Gpu(39.4, 312),
    "A100-80GB": Gpu(79.2, 312),
    "H100-80GB": Gpu(79.1, 989),
    "H100-PCIE-80GB": Gpu(79.1, 756),
    "H200": Gpu(139.8, 989),
    "B200": Gpu(178.4, 2250),
    "GB200": Gpu(184.3, 2500),
    "L40S": Gpu(44.5, 362),
    "A10G": Gpu(22.1, 125),
    "RTX-4090": Gpu(23.6, 165),
    "MI300X": Gpu(191.7, 1307),
}

_PATTERNS = (
    (r"GB200", "GB200"),
    (r"B200", "B200"),
    (r"H200", "H200"),
    (r"H100.*PCIe", "H100-PCIE-80GB"),
    (r"H100", "H100-80GB"),
    (r"A100.*40GB", "A100-40GB"),
    (r"A100", "A100-80GB"),
    (r"L40S", "L40S"),
    (r"A10G?\b", "A10G"),
    (r"4090", "RTX-4090"),
    (r"MI300X", "MI300X"),
)


def lookup(name: str) -> Gpu | None:
    """The entry for a type such as H100-80GB or for a driver's name such as `NVIDIA H100 80GB HBM3`."""
    if name in GPUS:
        return GPUS[name]
    return next((GPUS[kind] for pattern, kind in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), None)
