"""What is known about GPU types: memory, peak FLOP/s per type of number, and how their names are recognised.

Peaks are the vendors' dense figures: half of those that a data sheet gives "with sparsity". For GeForce they are those with
fp32 accumulation, as training multiplies; fp16 has the peak of bf16 on all of them. Sources:

    A100               NVIDIA A100 Tensor Core GPU data sheet
    A10, A10G          NVIDIA A10 data sheet; NVIDIA A10G data sheet (the cut of it that AWS rents as g5)
    H100               NVIDIA H100 Tensor Core GPU data sheet: SXM, PCIe (of its first edition), NVL
    H200, GH200        NVIDIA H200 Tensor Core GPU data sheet: SXM, NVL; NVIDIA GH200 Grace Hopper Superchip data sheet
    B200, GB200        NVIDIA Blackwell data sheet: one GPU of HGX B200 and of GB200 NVL72
    B300, GB300        NVIDIA Blackwell Ultra data sheet: one GPU of HGX B300 and of GB300 NVL72
    L4, L40S           NVIDIA L4 and L40S data sheets
    RTX 4090, 5090     NVIDIA Ada and RTX Blackwell GPU architecture white papers, appendix A
    MI300X, MI325X     AMD Instinct MI300X and MI325X data sheets
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`memory_gib` is usable device memory; peaks are in TFLOP/s, None where the hardware has no such units."""

    memory_gib: float
    bf16: float
    tf32: float
    fp32: float
    fp8: float | None = None

    def peak_tflops(self, dtype: str) -> float | None:
        """The peak for matrix products of bf16, fp16, tf32 (fp32 rounded on the way in), fp32 or fp8."""
        return {"bf16": self.bf16, "fp16": self.bf16, "tf32": self.tf32, "fp32": self.fp32, "fp8": self.fp8}[dtype]


GPUS = {
    "A100-40GB": Gpu(39.4, bf16=312, tf32=156, fp32=19.5),
    "A100-80GB": Gpu(79.2, bf16=312, tf32=156, fp32=19.5),
    "H100-80GB": Gpu(79.1, bf16=989, tf32=494.5, fp32=67, fp8=1979),
    "H100-PCIE-80GB": Gpu(79.1, bf16=756.5, tf32=378, fp32=51, fp8=1513),
    "H100-NVL": Gpu(93.1, bf16=835.5, tf32=417.5, fp32=60, fp8=1670.5),
    "H200": Gpu(139.8, bf16=989, tf32=494.5, fp32=67, fp8=1979),
    "H200-NVL": Gpu(139.8, bf16=835.5, tf32=417.5, fp32=60, fp8=1670.5),
    "GH200": Gpu(94.5, bf16=989, tf32=494.5, fp32=67, fp8=1979),
    "B200": Gpu(178.4, bf16=2250, tf32=1100, fp32=75, fp8=4500),
    "GB200": Gpu(184.3, bf16=2500, tf32=1250, fp32=80, fp8=5000),
    "B300": Gpu(267.7, bf16=2250, tf32=1125, fp32=75, fp8=4500),
    "GB300": Gpu(276.6, bf16=2500, tf32=1250, fp32=80, fp8=5000),
    "L4": Gpu(22.0, bf16=121, tf32=60, fp32=30.3, fp8=242.5),
    "L40S": Gpu(44.5, bf16=362, tf32=183, fp32=91.6, fp8=733),
    "A10": Gpu(22.1, bf16=125, tf32=62.5, fp32=31.2),
    "A10G": Gpu(22.1, bf16=70, tf32=35, fp32=35),
    "RTX-4090": Gpu(23.6, bf16=165.2, tf32=82.6, fp32=82.6, fp8=330.3),
    "RTX-5090": Gpu(31.3, bf16=209.5, tf32=104.8, fp32=104.8, fp8=419),
    "MI300X": Gpu(191.7, bf16=1307.4, tf32=653.7, fp32=163.4, fp8=2614.9),
    "MI325X": Gpu(255.7, bf16=1307.4, tf32=653.7, fp32=163.4, fp8=2614.9),
}

# Searched in this order in a name in lower case whose other characters are spaces.
_PATTERNS = (
    # Parts of a GPU, and namesakes that compute less, are none of these.
    (r"\bmig\b|\blaptop\b|\bmax q\b|\b4090 ?d\b|\b5090 ?d\b|\ba100x\b|\b144g", None),
    (r"\bgb300(?!\d)", "GB300"),
    (r"\bb300(?!\d)", "B300"),
    (r"\bgb200(?!\d)", "GB200"),
    (r"\bb200(?!\d)", "B200"),
    (r"\bgh200(?!\d)", "GH200"),
    (r"\bh200(?!\d).*\bnvl\b", "H200-NVL"),
    (r"\bh200(?!\d)", "H200"),
    (r"\bh100(?!\d).*\bnvl\b", "H100-NVL"),
    (r"\bh100(?!\d).*\bpcie\b", "H100-PCIE-80GB"),
    (r"\bh100(?!\d)", "H100-80GB"),
    (r"\ba100(?!\d).*\b40(g|gb)?\b", "A100-40GB"),
    (r"\ba100(?!\d)", "A100-80GB"),
    (r"\bl40s\b", "L40S"),
    (r"\bl4\b", "L4"),
    (r"\ba10g\b", "A10G"),
    (r"\ba10\b", "A10"),
    (r"4090\b", "RTX-4090"),
    (r"5090\b", "RTX-5090"),
    (r"\bmi300x", "MI300X"),
    (r"\bmi325x", "MI325X"),
)


def kind_of(name: str) -> str | None:
    """The key in GPUS for a type such as H100-80GB, for what a driver or torch calls it, and for how people write it."""
    if name in GPUS:
        return name
    words = re.sub(r"[^a-z0-9]+", " ", name.lower())
    return next((kind for pattern, kind in _PATTERNS if re.search(pattern, words)), None)


def lookup(name: str) -> Gpu | None:
    """What is known of the GPU of that name, in any of the forms of `kind_of`."""
    kind = kind_of(name)
    return None if kind is None else GPUS[kind]
