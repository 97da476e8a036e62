"""What an hour of one GPU costs where nobody has said what it does cost: typical, on demand, of one date.

Between the list prices of specialised clouds (RunPod, Lambda, Verda) and those of the large ones, a month before or after
DATE, as compared by aimultiple.com/gpu-index (20 May 2026, medians), mercatus-ai.com/blog/cloud-gpu-pricing (May 2026),
deploybase.ai/articles/runpod-gpu-pricing (March 2026), cliffcenter.com/research/amd-inference-economics (May 2026) and the
prices of Lambda, Modal and AWS (g5, g6, g6e) at that time. B300, GB200 and GH200 by the lists of RunPod, Hyperstack, Akash,
Lambda and CoreWeave of August and September 2026, in which a B200 costs about what it does here, and Spheron's of March 2026.
H200 NVL by price tables inside two open-source tools (one of March 2026) that give it the price of the H200 of SXM.
Clouds ask between half and twice as much, and less for long contracts and spot. Types that nobody lists, or that are hardly
rented one by one, have no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.plan.gpus import kind_of

DATE = "2026-05"
USD_PER_GPU_HOUR = {
    "A100-40GB": 1.45,
    "A100-80GB": 1.60,
    "H100-80GB": 2.95,
    "H100-PCIE-80GB": 2.80,
    "H100-NVL": 3.05,
    "H200": 3.80,
    "H200-NVL": 3.50,
    "GH200": 3.50,
    "B200": 6.00,
    "GB200": 7.00,
    "B300": 7.20,
    "L4": 0.75,
    "L40S": 1.40,
    "A10": 0.85,
    "A10G": 1.00,
    "RTX-4090": 0.60,
    "RTX-5090": 0.90,
    "MI300X": 2.00,
    "MI325X": 2.15,
}
ASSUMPTION = f"typical, on demand, {DATE}"


@dataclass(frozen=True)
class Price:
    """US dollars for one GPU for one hour; `assumption` says what it is where the settings have none.

    Part of the plan and no model like its other parts: who looks at runs reads it without loading those.
    """

    usd_per_gpu_hour: float
    assumption: str | None = None

    @classmethod
    def of_plan(cls, values: Mapping[str, Any]) -> Price | None:
        """That of a plan's JSON; None where it has none.

        Raises:
            TypeError, ValueError, KeyError: where it is damaged.
        """
        price = values.get("price")
        try:
            return None if price is None else cls(float(price["usd_per_gpu_hour"]), price.get("assumption"))
        except OverflowError as error:
            raise ValueError(str(error)) from error


def typical(gpu: str) -> float | None:
    """US dollars for one GPU for one hour, by its type or its driver's name; None where there is no typical price."""
    return USD_PER_GPU_HOUR.get(kind_of(gpu) or "")
