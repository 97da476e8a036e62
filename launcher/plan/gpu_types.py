"""The table of GPU types: memory and its bandwidth, peak FLOP/s, a typical price, and how names are recognized.

Peaks are the vendors' dense figures: half of those that a data sheet gives "with sparsity". For GeForce, they are the figures
with fp32 accumulation, as in training. The fp16 peak equals the bf16 peak on all types. Sources:

    A100               NVIDIA A100 Tensor Core GPU data sheet
    A10, A10G          NVIDIA A10 data sheet; NVIDIA A10G data sheet (the cut of it that AWS rents as g5)
    H100               NVIDIA H100 Tensor Core GPU data sheet: SXM, PCIe (of its first edition), NVL
    H200, GH200        NVIDIA H200 Tensor Core GPU data sheet: SXM, NVL; NVIDIA GH200 Grace Hopper Superchip data sheet
    B200, GB200        NVIDIA Blackwell data sheet: one GPU of HGX B200 and of GB200 NVL72
    B300, GB300        NVIDIA Blackwell Ultra data sheet: one GPU of HGX B300 and of GB300 NVL72
    L4, L40S           NVIDIA L4 and L40S data sheets
    RTX 4090, 5090     NVIDIA Ada and RTX Blackwell GPU architecture white papers, appendix A
    MI300X, MI325X     AMD Instinct MI300X and MI325X data sheets

Prices are typical on-demand prices as of PRICE_DATE. They lie between the list prices of specialized clouds (RunPod, Lambda,
Verda) and of the large ones, a month before or after that date, as compared by aimultiple.com/gpu-index (20 May 2026, medians),
mercatus-ai.com/blog/cloud-gpu-pricing (May 2026), deploybase.ai/articles/runpod-gpu-pricing (March 2026),
cliffcenter.com/research/amd-inference-economics (May 2026) and the prices of Lambda, Modal and AWS (g5, g6, g6e) at that time.
B300, GB200 and GH200 follow the lists of RunPod, Hyperstack, Akash, Lambda and CoreWeave of August and September 2026, in which a
B200 costs about what it does here, and Spheron's list of March 2026. H200 NVL follows price tables in two open-source tools (one
of March 2026) that give it the price of the H200 SXM. Clouds charge between half and twice as much, and less for long contracts
and spot instances. Types without a public price per GPU have no price.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRICE_DATE = "2026-05"
PRICE_ASSUMPTION = f"typical, on demand, {PRICE_DATE}"


@dataclass(frozen=True)
class GpuType:
    """Numbers of one GPU type. `memory_gib` is usable device memory; peaks are in TFLOP/s, None if there are no such units.

    `memory_tbs` is the memory bandwidth in 10^12 bytes per second; None stands for that of an H100 with as many FLOP/s.

    `names` is a regular expression that is searched in the names that nvidia-smi, torch, Slurm and people use, after converting
    them to lower case and replacing everything but letters and digits by single spaces. No name may match the expressions of two
    types. `usd_per_hour` is a typical price of one GPU, None if there is none.

    The other numbers are None until a GPU has been measured; benchmarks/gpu.py measures them. `runtime_gib` is the memory that
    CUDA and NCCL use. `fragmentation` is the factor by which the allocator's peak exceeds that of the tensors. `gemm_share` is
    the share of the peak that the matrix products of a step reach.
    """

    memory_gib: float
    bf16: float
    tf32: float
    fp32: float
    names: str
    memory_tbs: float | None = None
    usd_per_hour: float | None = None
    runtime_gib: float | None = None
    fragmentation: float | None = None
    gemm_share: float | None = None

    def peak_tflops(self, dtype: str) -> float:
        """Return the peak of matrix products in bf16, fp16, tf32 (fp32 rounded on input) or fp32."""
        return {"bf16": self.bf16, "fp16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[dtype]


@dataclass(frozen=True)
class Price:
    """US dollars per GPU and hour; `assumption` is set if the price is a typical one and not from the settings.

    Part of the plan, but not a pydantic model like its other parts: commands that look at runs read it without loading those.
    """

    usd_per_gpu_hour: float
    assumption: str | None = None

    @classmethod
    def of_plan(cls, values: Mapping[str, Any]) -> Price | None:
        """Return the price in a plan's JSON; None if it has none.

        Raises:
            TypeError, ValueError, KeyError: if it is damaged.
        """
        price = values.get("price")
        return None if price is None else cls(float(price["usd_per_gpu_hour"]), price.get("assumption"))


GPUS = {
    "A100-40GB": GpuType(
        39.4, bf16=312, tf32=156, fp32=19.5, memory_tbs=1.555, usd_per_hour=1.45, names=r"\ba100(?!\d).*\b40(g|gb)?\b"
    ),
    "A100-80GB": GpuType(
        79.2, bf16=312, tf32=156, fp32=19.5, memory_tbs=2.039, usd_per_hour=1.60, names=r"\ba100(?!\d)(?!.*\b40(g|gb)?\b)"
    ),
    "H100-80GB": GpuType(
        79.1,
        bf16=989,
        tf32=494.5,
        fp32=67,
        memory_tbs=3.35,
        usd_per_hour=2.95,
        names=r"\bh100(?!\d)(?!.*\b(nvl|pcie)\b)",
    ),
    "H100-PCIE-80GB": GpuType(
        79.1,
        bf16=756.5,
        tf32=378,
        fp32=51,
        memory_tbs=2,
        usd_per_hour=2.80,
        names=r"\bh100(?!\d)(?!.*\bnvl\b).*\bpcie\b",
    ),
    "H100-NVL": GpuType(93.1, bf16=835.5, tf32=417.5, fp32=60, memory_tbs=3.9, usd_per_hour=3.05, names=r"\bh100(?!\d).*\bnvl\b"),
    "H200": GpuType(139.8, bf16=989, tf32=494.5, fp32=67, memory_tbs=4.8, usd_per_hour=3.80, names=r"\bh200(?!\d)(?!.*\bnvl\b)"),
    "H200-NVL": GpuType(
        139.8, bf16=835.5, tf32=417.5, fp32=60, memory_tbs=4.8, usd_per_hour=3.50, names=r"\bh200(?!\d).*\bnvl\b"
    ),
    "GH200": GpuType(94.5, bf16=989, tf32=494.5, fp32=67, memory_tbs=4, usd_per_hour=3.50, names=r"\bgh200(?!\d)"),
    "B200": GpuType(178.4, bf16=2250, tf32=1100, fp32=75, memory_tbs=8, usd_per_hour=6.00, names=r"\bb200(?!\d)"),
    "GB200": GpuType(184.3, bf16=2500, tf32=1250, fp32=80, memory_tbs=8, usd_per_hour=7.00, names=r"\bgb200(?!\d)"),
    "B300": GpuType(267.7, bf16=2250, tf32=1125, fp32=75, memory_tbs=8, usd_per_hour=7.20, names=r"\bb300(?!\d)"),
    "GB300": GpuType(276.6, bf16=2500, tf32=1250, fp32=80, memory_tbs=8, names=r"\bgb300(?!\d)"),
    "L4": GpuType(22.0, bf16=121, tf32=60, fp32=30.3, memory_tbs=0.3, usd_per_hour=0.75, names=r"\bl4\b"),
    "L40S": GpuType(44.5, bf16=362, tf32=183, fp32=91.6, memory_tbs=0.864, usd_per_hour=1.40, names=r"\bl40s\b"),
    "A10": GpuType(22.1, bf16=125, tf32=62.5, fp32=31.2, memory_tbs=0.6, usd_per_hour=0.85, names=r"\ba10\b"),
    "A10G": GpuType(22.1, bf16=70, tf32=35, fp32=35, memory_tbs=0.6, usd_per_hour=1.00, names=r"\ba10g\b"),
    "RTX-4090": GpuType(23.6, bf16=165.2, tf32=82.6, fp32=82.6, memory_tbs=1.008, usd_per_hour=0.60, names=r"4090\b"),
    "RTX-5090": GpuType(31.3, bf16=209.5, tf32=104.8, fp32=104.8, memory_tbs=1.792, usd_per_hour=0.90, names=r"5090\b"),
    "MI300X": GpuType(191.7, bf16=1307.4, tf32=653.7, fp32=163.4, memory_tbs=5.3, usd_per_hour=2.00, names=r"\bmi300x"),
    "MI325X": GpuType(255.7, bf16=1307.4, tf32=653.7, fp32=163.4, memory_tbs=6, usd_per_hour=2.15, names=r"\bmi325x"),
}

# GPU partitions, and slower GPUs whose names contain the name of a faster one.
_UNKNOWN_VARIANTS = re.compile(r"\bmig\b|\blaptop\b|\bmax q\b|\b4090 ?d\b|\b5090 ?d\b|\ba100x\b|\b144g")


def recognize(name: str) -> str | None:
    """Return the key in GPUS for a type such as H100-80GB, or for any other name of a type; None for an unknown GPU."""
    if name in GPUS:
        return name
    spaced = re.sub(r"[^a-z0-9]+", " ", name.lower())
    if _UNKNOWN_VARIANTS.search(spaced):
        return None
    return next((key for key, gpu_type in GPUS.items() if re.search(gpu_type.names, spaced)), None)


def lookup(name: str) -> GpuType | None:
    """Return the row of a GPU, by any name that `recognize` accepts; None for an unknown GPU."""
    return GPUS.get(recognize(name) or "")


def typical_price(name: str) -> Price | None:
    """Return the typical price of a GPU, by any name that `recognize` accepts; None if there is none."""
    gpu_type = lookup(name)
    if gpu_type is None or gpu_type.usd_per_hour is None:
        return None
    return Price(gpu_type.usd_per_hour, PRICE_ASSUMPTION)
