"""The time model: what each part of a step depends on, with table rates for GPUs and measured rates for other devices.

A plan's estimates of speed, time and cost, and the settings that fit where a run is too large for its GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import moved_bytes
import pytest
from plan_fixtures import CPU, DATA, H100, PlanOf, plan_lines, preset

from launcher.cli.plan import describe_peak, explain_sizes, list_combinations
from launcher.cli.render import terminal
from launcher.errors import ConfigError
from launcher.plan import throughput
from launcher.plan.architecture import model_facts
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.planner import planned_step, planned_tokens_per_sec, sizing_inputs
from launcher.plan.sizing.combinations import rank_combinations
from launcher.plan.sizing.layers import Kernels
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
from launcher.plan.throughput import estimate_speed

ON_H100 = (
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
ROWS_AND_MODEL = ("model=llama3_1_8b", "data=jsonl", "data.path=rows.jsonl", "train.max_steps=1000")
# DATA has rows of 900 tokens.
LLAMA = (*ROWS_AND_MODEL, "train.micro_batch_size=8")
GPU = "H100-80GB"
EIGHT_H100 = ("cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8", "train.global_batch_size=64", "data.max_length=4096")


def step_of(planned: LaunchPlan, rates: Rates | None = None) -> StepTime:
    step = planned_step(planned, rates=rates)
    assert step is not None
    return step


def test_on_a_gpu_products_and_elementwise_operations_together_reach_half_of_the_peak(plan_of: PlanOf) -> None:
    """Llama 3.1 8B on an H100 reaches 46% of the peak, 55% with Liger; large matrix products alone reach 62%."""
    shares = []
    large = replace(gpu_rates(GPUS["H100-80GB"], BF16), half_tokens=0)
    for more in ((), ("model.liger=true",)):
        planned = plan_of(*ON_H100, *more, data=None)
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
    single, compiled = (step_of(plan_of(*ON_H100, *more)) for more in ((), ("model.compile=true",)))
    # The loss is not compiled, so the ratio exceeds COMPILED_SHARE.
    assert COMPILED_SHARE < compiled.elementwise_s / single.elementwise_s < COMPILED_SHARE + 0.1
    of_layer_s = 2 * 8 * 32 * (HOOK_S + MODULES_OF_LAYER * DISPATCH_S)
    assert compiled.hooks_s == pytest.approx(of_layer_s)
    assert single.hooks_s == pytest.approx(of_layer_s + 2 * 8 * 32 * (MODULES_OF_LAYER - 1) * HOOK_S)
    assert replace(compiled, elementwise_s=single.elementwise_s, hooks_s=single.hooks_s) == single


def test_a_recomputed_layer_computes_and_moves_its_forward_pass_again(plan_of: PlanOf) -> None:
    kept, recomputed = (step_of(plan_of(*ON_H100[:-1], f"model.activation_checkpointing={one}")) for one in ("none", "all"))
    assert recomputed.attention_s == pytest.approx(kept.attention_s * 4 / 3)
    # The head is not recomputed, so the ratio is below 4/3.
    assert 1.3 < recomputed.products_s / kept.products_s < 4 / 3
    assert 1 < recomputed.elementwise_s / kept.elementwise_s < 1 + FORWARD_SHARE
    assert recomputed.hooks_s == pytest.approx(kept.hooks_s * 3 / 2)


def test_weights_that_stay_are_gathered_once(plan_of: PlanOf) -> None:
    """DeepSpeed keeps weights that are reused within 10^9 elements: the last 0.5 x 10^9 of the forward pass."""
    links = replace(gpu_rates(GPUS["H100-80GB"], BF16), copies=float("inf"))
    for model, gathers in (("qwen3_0_6b", (0.6 - 0.5) / 0.6), ("llama3_1_8b", (8.03 - 0.5) / 8.03)):
        planned = plan_of(f"model={model}", *ON_H100[1:], "train.global_batch_size=8")
        communication_s = step_of(planned, links).communication_s
        of_one_transfer_s = 2 * planned.model.num_params * 7 / 8 / links.in_node
        # One gather, one reduction, and a second gather of the other weights.
        assert communication_s / of_one_transfer_s == pytest.approx(2 + gathers, abs=0.01)


def test_the_head_computes_trained_tokens_alone(plan_of: PlanOf) -> None:
    all_trained = DATA.model_copy(update={"num_trained_tokens": DATA.num_tokens})
    half, whole = (step_of(plan_of(*ON_H100, data=data)) for data in (DATA, all_trained))
    flops = train_flops(plan_of(*ON_H100).model)
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
    planned = plan_of("model=llama3_3_70b", "+cluster=slurm", "cluster.nodes=8", *ON_H100, "train.global_batch_size=64")
    lines = terminal.to_lines(*explain_sizes(planned))
    assert max(map(len, lines)) <= 80
    assert any(line.endswith("$/M tokens") for line in lines)
    assert any(line.startswith("the same in all rows: micro-batch 1") for line in lines)
    assert any(line.startswith("optimizer  ") for line in lines)


def test_why_marks_the_chosen_combination_and_shows_what_other_settings_would_do(plan_of: PlanOf) -> None:
    plain = plan_of(*ON_H100)
    others = [one.combination for one in rank_combinations(sizing_inputs(plain)) if not one.is_allowed]
    assert any(one.compiled for one in others)
    assert any(one.offload_optimizer == "cpu" for one in others)
    for more, is_compiled in (((), False), (("model.compile=true",), True)):
        planned = plan_of(*ON_H100, *more)
        assert sum(line.startswith("* ") and "chosen:" not in line for line in terminal.to_lines(*explain_sizes(planned))) == 1
        assert [one["compiled"] for one in list_combinations(planned) if one["is_chosen"]] == [is_compiled]
        assert ("layers are compiled (model.compile)" in describe_peak(planned)) is is_compiled


def test_the_range_is_the_published_mfu_over_the_models_flops(plan_of: PlanOf) -> None:
    planned = plan_of(*LLAMA, "cluster.price_per_gpu_hour=2.5", device=H100)
    speed = estimate_speed(planned, H100.name)
    # DATA has 5,000 documents of 180 tokens, half of them trained. Per token: all weights except embedding and head, half of the
    # head's 128,256 x 4,096, and 90.5 attention pairs in 32 layers of 32 heads of width 128.
    weights = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096
    flops = 6 * weights + 6 * 128_256 * 4096 / 2 + 12 * 32 * 4096 * 90.5
    low, high = 0.7 * 0.326, 0.447
    assert speed.mfu == pytest.approx((low, high))
    assert speed.tokens_per_sec_per_gpu == pytest.approx((low * 989e12 / flops, high * 989e12 / flops))
    assert speed.tokens_per_sec == pytest.approx((8 * low * 989e12 / flops, 8 * high * 989e12 / flops))
    # 1,000 steps of 64 rows of 900 tokens.
    seconds = [1000 * 64 * 900 / (8 * mfu * 989e12 / flops) for mfu in (high, low)]
    assert speed.hours == pytest.approx([s / 3600 for s in seconds])
    assert speed.usd == pytest.approx([s / 3600 * 8 * 2.5 for s in seconds])
    assert speed.basis == "published for FSDP (LLM Foundry, 2024-04), the low end scaled by 0.7 for ZeRO-3"


def test_without_data_a_row_is_one_document(plan_of: PlanOf) -> None:
    speed = estimate_speed(plan_of("model=llama3_1_8b", "data=jsonl", "data.path=rows.jsonl", device=H100, data=None), GPU)
    assert speed.basis.endswith("; assumes one document of data.max_length tokens per row, all trained")
    assert speed.tokens_per_sec is not None
    assert (speed.hours, speed.usd) == (None, None), "the number of steps is not known"


def test_small_micro_batches_lower_the_low_end(plan_of: PlanOf) -> None:
    small = (*ROWS_AND_MODEL, "train.micro_batch_size=1")
    full = estimate_speed(plan_of(*LLAMA, device=H100), GPU)
    one = estimate_speed(plan_of(*small, "data.max_length=2048", device=H100, data=None), GPU)
    assert full.mfu == pytest.approx((0.7 * 0.326, 0.447))
    assert one.mfu == pytest.approx((0.7 * 0.326 / 2, 0.447))
    assert "scaled by 0.7 for ZeRO-3 and by 0.5 for micro-batches of 2,048 tokens" in one.basis
    none = estimate_speed(plan_of(*small, device=H100), GPU)
    assert none.mfu is None
    assert none.basis.startswith("a micro-batch has 900 tokens, and below 1,024 no MFU is published: raise")


def test_several_nodes_lower_the_low_end_by_an_assumed_network(plan_of: PlanOf) -> None:
    two = plan_of(
        *LLAMA, "cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8", "train.global_batch_size=128", device=H100
    )
    speed, alone = estimate_speed(two, GPU), estimate_speed(plan_of(*LLAMA, device=H100), GPU)
    assert speed.basis.endswith("; the low end assumes 400 Gbit/s between nodes")
    assert speed.mfu is not None
    assert alone.mfu is not None
    # Eight rows of 900 tokens. Half of the 6 bytes per parameter cross between the nodes, at 50 GB/s.
    assert speed.tokens_per_sec_per_gpu is not None
    assert alone.tokens_per_sec_per_gpu is not None
    seconds = 7200 / alone.tokens_per_sec_per_gpu[0] + 8_030_261_248 * 6 / 2 / 50e9
    assert speed.tokens_per_sec_per_gpu[0] == pytest.approx(7200 / seconds)
    assert speed.mfu[1] == alone.mfu[1]


@pytest.mark.parametrize(
    ("tokens", "device", "reason"),
    [
        ((), CPU, "the run is planned for CPUs, for which no MFU is published"),
        ((), "Abacus 3000", "Abacus 3000 is not in the table of GPU types"),
        (("cluster.gpu_type=L40S",), "L40S", "no MFU is published for L40S"),
        (("model.config.model_type=deepseek_v3",), GPU, "the launcher does not know the FLOPs of deepseek_v3"),
        (("model=qwen3_30b_a3b",), GPU, "no MFU is published for mixtures of experts"),
        (("model=smollm2_135m",), GPU, "no MFU is published for a model of this size on H100-80GB"),
        (("deepspeed=zero3_offload",), GPU, "with offloaded states the speed depends on"),
        (("model.dtype=fp32",), GPU, "no MFU is published for fp32"),
    ],
)
def test_why_there_is_no_estimate(plan_of: PlanOf, tokens: tuple[str, ...], device: DeviceFacts | str, reason: str) -> None:
    facts = device if isinstance(device, DeviceFacts) else H100.model_copy(update={"name": device})
    speed = estimate_speed(plan_of(*LLAMA, *tokens, device=facts), facts.name)
    assert speed.basis.startswith(reason)
    assert speed == throughput.SpeedEstimate(speed.basis)
    (line,) = [line for line in plan_lines(plan_of(*LLAMA, device=facts), speed=speed) if line.startswith(("speed", "time"))]
    assert line == f"{'speed':<11}no estimate: {speed.basis}"


def remedy(plan_of: PlanOf, *settings: str) -> tuple[str, list[str]]:
    """Return how the refusal begins, and the changes that it offers."""
    with pytest.raises(ConfigError) as raised:
        plan_of(*EIGHT_H100, *settings)
    (problem,) = raised.value.problems
    advice, _, nearest = problem.remedy.partition(". Nearest that fit: ")
    return advice, nearest.split("; ")


def test_states_that_do_not_fit_need_other_machines_or_offload(plan_of: PlanOf) -> None:
    advice, changes = remedy(plan_of, "model=llama3_1_70b", "cluster.price_per_gpu_hour=2")
    assert advice == "use more ranks, deepspeed=zero3_offload, or name larger GPUs with cluster.gpu_type"
    nodes, offload, gpu = changes
    assert nodes.startswith("4 nodes of 8 GPUs (")
    assert offload.startswith("deepspeed.offload_optimizer=cpu (")
    assert offload.endswith(" GiB of main memory per node)")
    assert gpu.startswith("cluster.gpu_type=B200 (")
    for change in changes:
        assert " of 79 GiB" in change or " of 178 GiB" in change
        assert " tokens/s, $" in change, "its speed and its price"


def test_shorter_rows_are_offered_where_only_activations_do_not_fit(plan_of: PlanOf) -> None:
    long = ("data.max_length=262144", "model.config.max_position_embeddings=262144")
    settings = ("model=llama3_1_8b", *long, "train.global_batch_size=8")
    _, changes = remedy(plan_of, *settings)
    assert any(change.startswith("data.max_length=") for change in changes)


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        (("train.micro_batch_size=8", "data.max_length=32768"), "train.micro_batch_size=null ("),
        (("model.activation_checkpointing=none", "data.max_length=32768"), "model.activation_checkpointing=auto ("),
        # Either of the two would do; recomputing layers would take longer.
        (("train.micro_batch_size=8", "model.activation_checkpointing=none"), "train.micro_batch_size=null ("),
        (
            ("train.micro_batch_size=8", "model.activation_checkpointing=none", "data.max_length=32768"),
            "train.micro_batch_size=null model.activation_checkpointing=auto (",
        ),
    ],
)
def test_settings_that_are_too_large_are_left_to_the_plan(plan_of: PlanOf, settings: tuple[str, ...], offered: str) -> None:
    advice, (first, *_) = remedy(plan_of, "model=llama3_1_8b", *settings)
    assert advice == "leave to the plan what it can choose, or change the machines"
    assert first.startswith(offered)
    words = first.partition(" (")[0].split()
    # What is offered can be typed, and makes the run fit.
    assert plan_of(*EIGHT_H100, "model=llama3_1_8b", *settings, *words).peak is not None
