"""GPU types are recognized by their driver's names, and have peaks and prices."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from plan_fixtures import H100, PlanOf, plan_lines

from launcher.plan.gpu_types import GPUS, PRICE_ASSUMPTION, Price, lookup, recognize, typical_price
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.planner import resize_plan

NAMES = {
    # Names from NVML, torch and nvidia-smi.
    "NVIDIA H100 80GB HBM3": "H100-80GB",
    "NVIDIA H100 PCIe": "H100-PCIE-80GB",
    "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200-NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA A100 80GB PCIe": "A100-80GB",
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA A100-PCIE-40GB": "A100-40GB",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA GB300": "GB300",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
    "NVIDIA GeForce RTX 5090": "RTX-5090",
    "AMD Instinct MI300X OAM": "MI300X",
    "AMD Instinct MI325X": "MI325X",
    # Names that users and Slurm's gres use.
    "h100": "H100-80GB",
    "H100-SXM": "H100-80GB",
    "nvidia_h100_80gb_hbm3": "H100-80GB",
    "h100_pcie": "H100-PCIE-80GB",
    "h100-nvl": "H100-NVL",
    "a100": "A100-80GB",
    "a100-40": "A100-40GB",
    "a100_80gb": "A100-80GB",
    "l40s": "L40S",
    "nvidia_l4": "L4",
    "4090": "RTX-4090",
    "rtx5090": "RTX-5090",
    "mi300x": "MI300X",
}
A100 = DeviceFacts(kind="cuda", name="NVIDIA A100-SXM4-80GB", count=8, memory_gib=79.2)
UNHEARD_OF = DeviceFacts(kind="cuda", name="Abacus 3000", count=8, memory_gib=8)


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_name_is_recognized(name: str, kind: str) -> None:
    assert recognize(name) == kind
    assert lookup(name) is GPUS[kind]


@pytest.mark.parametrize(
    "name",
    [
        *("Abacus 3000", "NVIDIA H20", "NVIDIA L40", "NVIDIA A40", "NVIDIA A100X", "AMD Instinct MI300A", "NVIDIA RTX A1000"),
        *("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"),
    ],
)
def test_slower_variants_are_not_recognized_as_their_namesake(name: str) -> None:
    assert recognize(name) is None
    assert lookup(name) is None


def test_no_name_is_recognized_as_two_types() -> None:
    for name in NAMES:
        spaced = re.sub(r"[^a-z0-9]+", " ", name.lower())
        assert [key for key, gpu_type in GPUS.items() if re.search(gpu_type.names, spaced)] == [NAMES[name]]


def test_typical_prices_are_of_the_recognized_type() -> None:
    assert typical_price("NVIDIA H100 80GB HBM3") == Price(2.95, PRICE_ASSUMPTION)
    assert typical_price("NVIDIA GB300") is None
    assert typical_price("Abacus 3000") is None


def test_every_entry_is_found_by_its_own_name_in_any_writing() -> None:
    for kind in GPUS:
        assert recognize(kind) == recognize(kind.lower()) == recognize(kind.replace("-", "_")) == kind


def test_each_number_type_has_its_peak() -> None:
    h100 = GPUS["H100-80GB"]
    peaks = [h100.peak_tflops(dtype) for dtype in ("bf16", "fp16", "tf32", "fp32")]
    assert peaks == [989, 989, 494.5, 67]


@pytest.mark.parametrize("kind", GPUS)
def test_half_the_bits_are_twice_as_fast(kind: str) -> None:
    """Checks the data sheet figures: one with sparsity, or from another row, would break these ratios."""
    gpu = GPUS[kind]
    assert gpu.bf16 == pytest.approx(2 * gpu.tf32, rel=0.03)
    assert gpu.fp32 <= gpu.tf32


def cost(planned: LaunchPlan) -> list[str]:
    return [line.removeprefix("cost").strip() for line in plan_lines(planned) if line.startswith("cost")]


@pytest.mark.parametrize(
    ("tokens", "device", "price"),
    [
        ((), A100, Price(usd_per_gpu_hour=1.60, assumption=PRICE_ASSUMPTION)),
        (("cluster.gpu_type=H200",), A100, Price(usd_per_gpu_hour=3.80, assumption=PRICE_ASSUMPTION)),
        (("cluster.price_per_gpu_hour=2.5",), A100, Price(usd_per_gpu_hour=2.5)),
        (("cluster.price_per_gpu_hour=2.5",), UNHEARD_OF, Price(usd_per_gpu_hour=2.5)),
        ((), UNHEARD_OF, None),
    ],
)
def test_the_price_of_a_plan(plan_of: PlanOf, tokens: tuple[str, ...], device: DeviceFacts, price: Price | None) -> None:
    planned = plan_of(*tokens, device=device)
    assert planned.price == price
    assert resize_plan(planned, 4, 4).price == price


def test_a_cpu_costs_the_price_of_the_settings(plan_of: PlanOf) -> None:
    assert plan_of().price is None
    assert cost(plan_of()) == []
    assert cost(plan_of("cluster.price_per_gpu_hour=2.5")) == ["$5.00 an hour = 2 CPU ranks x $2.50"]


def test_a_typical_price_is_shown_as_assumed(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*tokens: str, **how: Any) -> list[str]:
        return cost(plan_of(*tokens, **how))

    monkeypatch.setitem(GPUS, "H100-80GB", replace(GPUS["H100-80GB"], usd_per_hour=200.0))
    assumed = f"$1,600.00 an hour = 8 GPUs x $200.00, assumed ({PRICE_ASSUMPTION}; cluster.price_per_gpu_hour sets yours)"
    assert of(device=H100) == [assumed]
    assert of("cluster.price_per_gpu_hour=2.5", device=H100) == ["$20.00 an hour = 8 GPUs x $2.50"]
    assert of(device=UNHEARD_OF) == ["not known: set cluster.price_per_gpu_hour to what a GPU costs you"]


def test_the_plan_notes_unknown_flops(plan_of: PlanOf) -> None:
    def notes(*tokens: str) -> list[str]:
        return [line for line in plan_lines(plan_of(*tokens)) if "perf/mfu" in line]

    assert notes() == []
    (note,) = notes("model.config.model_type=qwen3_next")
    assert "the launcher does not know the layers of qwen3_next: the peak is a guess from its sizes, and perf/tflops" in note
    (note,) = notes("model.config.model_type=mixtral")
    assert "config.json of this mixtral lacks num_experts_per_tok, num_local_experts: the peak is a guess" in note
    (note,) = notes("model.config.model_type=llama", "+model.config.use_bidirectional_attention=true")
    assert "the FLOPs of this kind of llama are not known: perf/tflops" in note
