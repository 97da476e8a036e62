"""The time model: what each part of a step depends on, with table rates for GPUs and measured rates for other devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import moved_bytes
import pytest
from plan_fixtures import DATA, preset

from launcher.cli.plan import describe_peak, explain_sizes, list_combinations
from launcher.cli.render import terminal
from launcher.plan.architecture import model_facts
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_step, planned_tokens_per_sec, situation_of
from launcher.plan.sizing.combinations import rank_combinations
from launcher.plan.sizing.kernels import Kernels
from launcher.plan.sizing.step_time import (
    COMPILED_SHARE,
    DISPATCH_S,
    FORWARD_SHARE,
    GEMM_SHARE,
    HOOK_S,
    MODULES_OF_LAYER,
    Rates,
    StepTime,
    bytes_of_layers,
    bytes_of_loss,
    gpu_rates,
)

PlanOf = Callable[..., LaunchPlan]
H100 = (
    *("model=llama3_1_8b", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8", "data.max_length=4096"),
    *("train.global_batch_size=64", "train.micro_batch_size=1", "model.activation_checkpointing=none"),
)
# Rates of a device that does one thing at a time.
IN_TURN = Rates(
    *(1e11, 5e10, 5e9, 2e9, 4e9, 1e9),
    half_tokens=0,
    overlap=0,
    runs_ahead=False,
)
BF16 = Kernels(2, "varlen", 4096)
PARTS = ("products_s", "attention_s", "elementwise_s", "communication_s", "hooks_s", "optimizer_s")


def step_of(planned: LaunchPlan, rates: Rates | None = None) -> StepTime:
    step = planned_step(planned, rates=rates)
    assert step is not None
    return step


def test_on_a_gpu_products_and_elementwise_operations_together_reach_half_of_the_peak(plan_of: PlanOf) -> None:
    """Llama 3.1 8B on an H100 reaches 46% of the peak, 55% with Liger; large matrix products alone reach 62%."""
    shares = []
    large = replace(gpu_rates(GPUS["H100-80GB"], BF16), half_tokens=0)
    for more in ((), ("model.liger=true",)):
        planned = plan_of(*H100, *more, data=None)
        step, flops = step_of(planned, large), train_flops(planned.model)
        assert flops is not None
        per_token = flops.per_token + flops.per_label
        ideal_s = planned.batch.max_tokens_per_step / 8 * per_token / GPUS["H100-80GB"].bf16 / 1e12
        shares.append(ideal_s / (step.products_s + step.elementwise_s))
        assert ideal_s / step.products_s == pytest.approx(GEMM_SHARE)
    assert shares == [pytest.approx(0.465, abs=0.01), pytest.approx(0.55, abs=0.01)]


@pytest.mark.rest
@pytest.mark.parametrize("name", ["llama3_1_8b", "qwen3_30b_a3b"])
def test_elementwise_operations_of_a_layer_move_what_a_pass_reads_and_writes(name: str) -> None:
    """Fake tensors at real width; the difference between three layers and one."""
    pytest.importorskip("torch.nn.attention.varlen")
    config = preset(name, vocab_size=256, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    for checkpointing, share in (("none", 0.0), ("all", 1.0)):
        moved = [moved_bytes.measure(config | {"num_hidden_layers": layers}, 512, "bf16", checkpointing) for layers in (1, 3)]
        model = model_facts(config | {"num_hidden_layers": 2}, None, None, None)
        planned = 512 * bytes_of_layers(model, Kernels(2, "varlen", 512), share)
        assert planned == pytest.approx(moved[1] - moved[0], rel=0.15)


def test_the_loss_moves_what_a_pass_reads_and_writes() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    config = preset("llama3_2_1b", num_hidden_layers=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    moved = [moved_bytes.measure(config | {"vocab_size": size}, 4096) for size in (32_000, 128_000)]
    sizes = [model_facts(config | {"vocab_size": size}, None, None, None) for size in (32_000, 128_000)]
    planned = [bytes_of_loss(model, 2, 4096, 4096) for model in sizes]
    assert planned[1] - planned[0] == pytest.approx(moved[1] - moved[0], rel=0.15)


def test_compiled_layers_move_less_memory_and_have_fewer_hooks(plan_of: PlanOf) -> None:
    single, compiled = (step_of(plan_of(*H100, *more)) for more in ((), ("model.compile=true",)))
    # The loss is not compiled, so the ratio exceeds COMPILED_SHARE.
    assert COMPILED_SHARE < compiled.elementwise_s / single.elementwise_s < COMPILED_SHARE + 0.1
    of_layer_s = 2 * 8 * 32 * (HOOK_S + MODULES_OF_LAYER * DISPATCH_S)
    assert compiled.hooks_s == pytest.approx(of_layer_s)
    assert single.hooks_s == pytest.approx(of_layer_s + 2 * 8 * 32 * (MODULES_OF_LAYER - 1) * HOOK_S)
    assert replace(compiled, elementwise_s=single.elementwise_s, hooks_s=single.hooks_s) == single


def test_a_recomputed_layer_computes_and_moves_its_forward_pass_again(plan_of: PlanOf) -> None:
    kept, recomputed = (step_of(plan_of(*H100[:-1], f"model.activation_checkpointing={one}")) for one in ("none", "all"))
    assert recomputed.attention_s == pytest.approx(kept.attention_s * 4 / 3)
    # The head is not recomputed, so the ratio is below 4/3.
    assert 1.3 < recomputed.products_s / kept.products_s < 4 / 3
    assert 1 < recomputed.elementwise_s / kept.elementwise_s < 1 + FORWARD_SHARE
    assert recomputed.hooks_s == pytest.approx(kept.hooks_s * 3 / 2)


def test_weights_that_stay_are_gathered_once(plan_of: PlanOf) -> None:
    """DeepSpeed keeps weights that are reused within 10^9 elements: the last 0.5 x 10^9 of the forward pass."""
    links = replace(gpu_rates(GPUS["H100-80GB"], BF16), copies=float("inf"))
    for model, gathers in (("qwen3_0_6b", (0.6 - 0.5) / 0.6), ("llama3_1_8b", (8.03 - 0.5) / 8.03)):
        planned = plan_of(f"model={model}", *H100[1:], "train.global_batch_size=8")
        communication_s = step_of(planned, links).communication_s
        of_one_transfer_s = 2 * planned.model.num_params * 7 / 8 / links.in_node
        # One gather, one reduction, and a second gather of the other weights.
        assert communication_s / of_one_transfer_s == pytest.approx(2 + gathers, abs=0.01)


def test_the_head_computes_trained_tokens_alone(plan_of: PlanOf) -> None:
    all_trained = DATA.model_copy(update={"num_trained_tokens": DATA.num_tokens})
    half, whole = (step_of(plan_of(*H100, data=data)) for data in (DATA, all_trained))
    flops = train_flops(plan_of(*H100).model)
    assert flops is not None
    assert whole.products_s / half.products_s == pytest.approx(
        (flops.per_token + flops.per_label) / (flops.per_token + flops.per_label / 2)
    )
    assert whole.elementwise_s > half.elementwise_s


def test_a_device_that_does_one_thing_at_a_time_takes_the_sum_of_all(plan_of: PlanOf) -> None:
    on_cpus = plan_of("model=tiny", "model.dtype=bf16", "cluster.ranks_per_node=2", "data.max_length=256")
    assert planned_step(on_cpus) is None
    assert planned_tokens_per_sec(on_cpus) is None
    step = step_of(on_cpus, IN_TURN)
    assert step.total_s == pytest.approx(sum(getattr(step, part) for part in PARTS))
    assert min(getattr(step, part) for part in PARTS) > 0
    ahead = replace(step, runs_ahead=True, overlap=1.0)
    computing_s = max(step.products_s + step.attention_s + step.elementwise_s, step.hooks_s)
    assert ahead.total_s == pytest.approx(max(computing_s, step.communication_s) + step.optimizer_s)


def test_the_combinations_fit_a_terminal_of_80_columns(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    planned = plan_of("model=llama3_3_70b", "+cluster=slurm", "cluster.nodes=8", *H100, "train.global_batch_size=64")
    lines = terminal.to_lines(*explain_sizes(planned))
    assert max(map(len, lines)) <= 80
    assert any(line.endswith("$/M tokens") for line in lines)
    assert any(line.startswith("the same in all rows: micro-batch 1") for line in lines)
    assert any(line.startswith("optimizer  ") for line in lines)


def test_why_marks_the_chosen_combination_and_shows_what_other_settings_would_do(plan_of: PlanOf) -> None:
    plain = plan_of(*H100)
    others = [one.combination for one in rank_combinations(situation_of(plain)) if not one.is_allowed]
    assert any(one.compiled for one in others)
    assert any(one.offload_optimizer == "cpu" for one in others)
    for more, is_compiled in (((), False), (("model.compile=true",), True)):
        planned = plan_of(*H100, *more)
        assert sum(line.startswith("* ") and "chosen:" not in line for line in terminal.to_lines(*explain_sizes(planned))) == 1
        assert [one["compiled"] for one in list_combinations(planned) if one["is_chosen"]] == [is_compiled]
        assert ("layers are compiled (model.compile)" in describe_peak(planned)) is is_compiled
