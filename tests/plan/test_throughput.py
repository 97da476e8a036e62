"""A plan's estimates of speed, time and cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from plan_fixtures import CPU, H100, plan_lines

from launcher.plan import throughput
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.throughput import MeasuredMfu, estimate_speed

PlanOf = Callable[..., LaunchPlan]
ROWS_AND_MODEL = ("model=llama3_1_8b", "data=jsonl", "data.path=rows.jsonl", "train.max_steps=1000")
# DATA has rows of 900 tokens.
LLAMA = (*ROWS_AND_MODEL, "train.micro_batch_size=8")
GPU = "H100-80GB"


def test_the_range_is_the_published_mfu_over_the_models_flops(plan_of: PlanOf) -> None:
    planned = plan_of(*LLAMA, "cluster.price_per_gpu_hour=2.5", device=H100)
    speed = estimate_speed(planned, H100.name, None)
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


def test_a_measured_mfu_comes_before_published_ones(plan_of: PlanOf) -> None:
    measured = MeasuredMfu("first", num_ranks=1, low=0.31, high=0.33)
    for own in ((), ("deepspeed=zero3_offload",)):
        speed = estimate_speed(plan_of(*LLAMA, *own, device=H100), GPU, measured)
        assert (speed.mfu, speed.basis) == ((0.31, 0.33), "measured in run first on 1 rank")


def test_without_data_a_row_is_one_document(plan_of: PlanOf) -> None:
    speed = estimate_speed(plan_of("model=llama3_1_8b", "data=jsonl", "data.path=rows.jsonl", device=H100, data=None), GPU, None)
    assert speed.basis.endswith("; assumes one document of data.max_length tokens per row, all trained")
    assert speed.tokens_per_sec is not None
    assert (speed.hours, speed.usd) == (None, None), "the number of steps is not known"


def test_small_micro_batches_lower_the_low_end(plan_of: PlanOf) -> None:
    small = (*ROWS_AND_MODEL, "train.micro_batch_size=1")
    full = estimate_speed(plan_of(*LLAMA, device=H100), GPU, None)
    one = estimate_speed(plan_of(*small, "data.max_length=2048", device=H100, data=None), GPU, None)
    assert full.mfu == pytest.approx((0.7 * 0.326, 0.447))
    assert one.mfu == pytest.approx((0.7 * 0.326 / 2, 0.447))
    assert "scaled by 0.7 for ZeRO-3 and by 0.5 for micro-batches of 2,048 tokens" in one.basis
    none = estimate_speed(plan_of(*small, device=H100), GPU, None)
    assert none.mfu is None
    assert none.basis.startswith("a micro-batch has 900 tokens, and below 1,024 no MFU is published: raise")
    measured = MeasuredMfu("first", num_ranks=8, low=0.2, high=0.3)
    assert estimate_speed(plan_of(*small, device=H100), GPU, measured).mfu == (0.2, 0.3)


def test_several_nodes_lower_the_low_end_by_an_assumed_network(plan_of: PlanOf) -> None:
    two = plan_of(
        *LLAMA, "cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8", "train.global_batch_size=128", device=H100
    )
    speed, alone = estimate_speed(two, GPU, None), estimate_speed(plan_of(*LLAMA, device=H100), GPU, None)
    assert speed.basis.endswith("; the low end assumes 400 Gbit/s between nodes")
    assert speed.mfu is not None
    assert alone.mfu is not None
    # Eight rows of 900 tokens. Half of the 6 bytes per parameter cross between the nodes, at 50 GB/s.
    assert speed.tokens_per_sec_per_gpu is not None
    assert alone.tokens_per_sec_per_gpu is not None
    seconds = 7200 / alone.tokens_per_sec_per_gpu[0] + 8_030_261_248 * 6 / 2 / 50e9
    assert speed.tokens_per_sec_per_gpu[0] == pytest.approx(7200 / seconds)
    assert speed.mfu[1] == alone.mfu[1]
    # A measurement on as many nodes includes the network; one on a single node does not.
    assert estimate_speed(two, GPU, MeasuredMfu("first", 16, 0.2, 0.3)).mfu == (0.2, 0.3)
    single = estimate_speed(two, GPU, MeasuredMfu("first", 8, 0.2, 0.3))
    assert single.mfu is not None
    assert single.mfu[0] < 0.16
    assert single.basis == "measured in run first on 8 ranks; the low end assumes 400 Gbit/s between nodes"


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
    speed = estimate_speed(plan_of(*LLAMA, *tokens, device=facts), facts.name, None)
    assert speed.basis.startswith(reason)
    assert speed == throughput.SpeedEstimate(speed.basis)
    (line,) = [line for line in plan_lines(plan_of(*LLAMA, device=facts), speed=speed) if line.startswith(("speed", "time"))]
    assert line == f"{'speed':<11}no estimate: {speed.basis}"
