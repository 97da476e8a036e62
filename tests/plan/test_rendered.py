"""Plans and DeepSpeed JSON compared with golden files, which LAUNCHER_WRITE_GOLDEN=1 rewrites."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from plan_fixtures import DATA, plan_lines

from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.throughput import estimate_speed

Golden = Callable[[str, str], None]
GPUS = DeviceFacts(kind="cuda", name="NVIDIA H100 80GB HBM3", count=8, memory_gib=79.1, host_memory_gib=2000.0)


@pytest.mark.parametrize("deepspeed", ["zero3", "zero3_offload", "zero3_nvme", "zero3_pp"])
def test_the_zero3_json_matches_its_golden_file(plan_of: Callable[..., LaunchPlan], golden: Golden, deepspeed: str) -> None:
    planned = plan_of(
        "model=llama3_1_8b",
        "data=jsonl",
        "data.path=rows.jsonl",
        f"deepspeed={deepspeed}",
        "cluster.nodes=2",
        "train.global_batch_size=64",
        "train.micro_batch_size=2",
        device=GPUS,
    )
    golden(f"{deepspeed}.ds.json", json.dumps(planned.deepspeed, indent=2) + "\n")


def test_the_plan_of_a_tiny_run_matches_its_golden_file(plan_of: Callable[..., LaunchPlan], golden: Golden) -> None:
    planned = plan_of("train.max_steps=20")
    golden("tiny.plan.json", planned.to_json())
    golden("tiny.plan.txt", "\n".join(plan_lines(planned)) + "\n")


def test_the_plan_of_many_nodes_as_text_matches_its_golden_file(plan_of: Callable[..., LaunchPlan], golden: Golden) -> None:
    planned = plan_of(
        *("experiment=llama3_70b_four_nodes", "data.path=rows.jsonl", "run.max_hours=12", "tracking.entity=us"), data=None
    )
    speed = estimate_speed(planned, "H100-80GB", None)
    golden("llama3_70b.plan.txt", "\n".join(plan_lines(planned, speed=speed)) + "\n")


def test_sizes_follow_the_model_and_can_be_set(plan_of: Callable[..., LaunchPlan]) -> None:
    zero = plan_of("model=llama3_3_70b", "deepspeed.offload_optimizer=cpu", device=GPUS).deepspeed["zero_optimization"]
    assert zero["reduce_bucket_size"] == 8192 * 8192
    assert zero["stage3_param_persistence_threshold"] == 81920
    keys = "reduce_bucket_size: 7, stage3_prefetch_bucket_size: 8, stage3_param_persistence_threshold: 0"
    own = plan_of(f"deepspeed.extra={{zero_optimization: {{{keys}}}}}")
    zero = own.deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (7, 8)
    assert zero["stage3_param_persistence_threshold"] == 0


def test_large_models_and_many_ranks_fetch_by_layers_and_sum_in_fp32(plan_of: Callable[..., LaunchPlan]) -> None:
    settings = ("model=llama3_3_70b", "model.dtype=bf16", "train.global_batch_size=128", "train.micro_batch_size=1")
    many = plan_of(*settings, "cluster.nodes=16", device=GPUS)
    zero = many.deepspeed["zero_optimization"]
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert zero["stage3_prefetch_bucket_size"] == pytest.approx(layer, rel=1e-3)
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == pytest.approx(2.5 * layer, rel=1e-3)
    assert many.deepspeed["communication_data_type"] == "fp32"
    assert "communication_data_type" not in plan_of(*settings, "cluster.nodes=8", device=GPUS).deepspeed
    # Buckets use the dtype of the sum.
    assert many.peak is not None
    assert many.peak.buckets_gib == pytest.approx(4 * 8192 * 8192 / 2**30, rel=1e-3)


def test_a_buffer_for_weights_on_nvme_holds_a_ranks_part_of_the_largest(plan_of: Callable[..., LaunchPlan]) -> None:
    planned = plan_of("model=llama3_1_8b", "deepspeed=zero3_nvme", "run.name=first", device=GPUS)
    zero = planned.deepspeed["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] == 128_256 * 4096 // 8
    # DeepSpeed fails when it prefetches from NVMe.
    assert zero["stage3_prefetch_bucket_size"] == 0
    other = plan_of("model=llama3_1_8b", "deepspeed=zero3_nvme", "run.name=second", device=GPUS)
    folders = {p.deepspeed["zero_optimization"]["offload_optimizer"]["nvme_path"] for p in (planned, other)}
    assert len(folders) == 2
    assert {folder.rpartition("/")[0] for folder in folders} == {"/local_nvme"}


def test_raw_keys_come_last_and_are_merged(plan_of: Callable[..., LaunchPlan]) -> None:
    rendered = plan_of("deepspeed.extra={zero_optimization: {overlap_comm: false}, wall_clock_breakdown: true}").deepspeed
    assert rendered["wall_clock_breakdown"] is True
    assert rendered["zero_optimization"]["overlap_comm"] is False
    assert rendered["zero_optimization"]["contiguous_gradients"] is True


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_precision_of_compute_and_states(plan_of: Callable[..., LaunchPlan], dtype: str) -> None:
    rendered = plan_of(f"model.dtype={dtype}", "train.micro_batch_size=1").deepspeed
    assert {key for key in ("bf16", "fp16") if key in rendered} == {dtype} - {"fp32"}
    # Half-precision gradients are summed in fp32.
    assert rendered.get("data_types") == ({"grad_accum_dtype": "fp32"} if dtype != "fp32" else None)


@pytest.mark.parametrize(("epochs", "text"), [(1, "(1 epoch)"), (2, "(2 epochs)")])
def test_one_epoch_is_singular(plan_of: Callable[..., LaunchPlan], epochs: int, text: str) -> None:
    assert any(line.startswith("steps ") and text in line for line in plan_lines(plan_of(f"train.epochs={epochs}", data=None)))


def test_the_plan_notes_truncated_documents(plan_of: Callable[..., LaunchPlan]) -> None:
    def notes(**counts: int) -> list[str]:
        facts = DATA.model_copy(update=counts)
        return [line.removeprefix("note").strip() for line in plan_lines(plan_of(data=facts)) if "documents cut" in line]

    assert notes(truncated_docs=90, truncated_tokens=9_000) == []
    assert notes(truncated_docs=1_234, truncated_tokens=100_000) == [
        "1,234 documents cut, losing 10% of the tokens: raise data.max_length, or data.long_documents=split"
    ]
