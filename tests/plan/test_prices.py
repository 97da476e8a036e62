from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from plan_fixtures import H100, plan_lines

from launcher.plan.gpu_types import GPUS, PRICE_ASSUMPTION, Price
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.planner import resized

PlanOf = Callable[..., LaunchPlan]
A100 = DeviceFacts(kind="cuda", name="NVIDIA A100-SXM4-80GB", count=8, memory_gib=79.2)
UNHEARD_OF = DeviceFacts(kind="cuda", name="Abacus 3000", count=8, memory_gib=8)


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
    assert resized(planned, 4, 4).price == price


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
    assert (
        "config.json of this mixtral lacks num_experts_per_tok, num_local_experts: its parameters and the peak are a guess"
        in note
    )
    (note,) = notes("model.config.model_type=llama", "+model.config.use_bidirectional_attention=true")
    assert "the FLOPs of this kind of llama are not known: perf/tflops" in note
