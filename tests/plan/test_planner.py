"""Plans from settings and facts; plans and DeepSpeed JSON compared with golden files, which LAUNCHER_WRITE_GOLDEN=1 rewrites."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import DATA, ConfigOf, PlanOf, plan_lines

from launcher.errors import ConfigError, Problem, RunError
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan, Limits
from launcher.plan.planner import plan, plan_fewest_nodes, resize_plan
from launcher.plan.run_dir import RunDir
from launcher.plan.throughput import estimate_speed
from launcher.runs import run_store

H200 = ("cluster.gpu_type=H200", "cluster.ranks_per_node=8")
CUDA = DeviceFacts(kind="cuda", name="NVIDIA H100 80GB HBM3", count=8, memory_gib=79.1, host_memory_gib=2000.0)
LLAMA_70B = ("experiment=llama3_70b_four_nodes", "data.path=rows.jsonl")
SEVENTY = ("model=llama3_3_70b", "train.global_batch_size=128", "data.max_length=2048")
Golden = Callable[[str, str], None]
GPUS = DeviceFacts(kind="cuda", name="NVIDIA H100 80GB HBM3", count=8, memory_gib=79.1, host_memory_gib=2000.0)


@pytest.fixture
def facts(plan_of: PlanOf) -> Facts:
    known = plan_of()
    device = DeviceFacts(kind="cpu", name="a CPU", count=2)
    return Facts(
        working_dir="/srv/project",
        home_dir="/home/me",
        device=device,
        model=known.model,
        data=known.data,
        provenance=known.provenance,
    )


def problems(plan_of: PlanOf, *tokens: str, **how: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as error:
        plan_of(*tokens, **how)
    assert all(p.where and p.value and p.remedy for p in error.value.problems)
    return list(error.value.problems)


def test_the_digest_survives_the_file(config_of: ConfigOf, facts: Facts, tmp_path: Path) -> None:
    planned = plan(config_of("tracking.tags=[a,b]", "model.config.extra={x: [1, 2.5, null]}"), facts)
    for number in range(3):
        (tmp_path / f"{number}.json").write_text(planned.to_json())
        loaded = LaunchPlan.load(tmp_path / f"{number}.json")
        assert loaded == planned
        assert loaded.digest() == planned.digest()
        planned = loaded


@pytest.mark.parametrize(
    ("root", "expected"),
    [("runs", "/srv/project/runs/a"), ("/shared", "/shared/a"), ("~/runs", "/home/me/runs/a"), ("~", "/home/me/a")],
)
def test_the_run_directory_is_below_run_root(config_of: ConfigOf, facts: Facts, root: str, expected: str) -> None:
    assert plan(config_of(f'run.root="{root}"', "run.name=a"), facts).run_dir == expected


def test_the_generated_name_has_model_data_and_time(plan_of: PlanOf) -> None:
    assert plan_of().run_name == "tiny-stdlib_docs-20260131-091500"


@pytest.mark.parametrize(("file", "name"), [("settings/small one.yaml", "small-one"), ("..yaml", "tiny-stdlib_docs")])
def test_the_generated_name_begins_with_the_runs_file(config_of: ConfigOf, facts: Facts, file: str, name: str) -> None:
    of_file = facts.provenance.model_copy(update={"overrides": (file,)})
    assert plan(config_of(), facts.model_copy(update={"provenance": of_file})).run_name == f"{name}-20260131-091500"


@pytest.mark.parametrize(
    ("tokens", "device", "expected"),
    [
        ((), None, (1, 2, "cpu", "gloo")),
        (("cluster.ranks_per_node=4",), None, (1, 4, "cpu", "gloo")),
        ((), CUDA, (1, 8, "cuda", "nccl")),
        (("cluster.ranks_per_node=2",), CUDA, (1, 2, "cuda", "nccl")),
        (LLAMA_70B, None, (4, 8, "cuda", "nccl")),
        (LLAMA_70B, CUDA, (4, 8, "cuda", "nccl")),
    ],
)
def test_topology(
    plan_of: PlanOf,
    tokens: tuple[str, ...],
    device: DeviceFacts | None,
    expected: tuple[int, int, str, str],
) -> None:
    topology = plan_of(*tokens, **({"device": device} if device else {})).topology
    assert (topology.nodes, topology.ranks_per_node, topology.device, topology.backend) == expected
    assert topology.world_size == topology.nodes * topology.ranks_per_node


def test_gpus_of_other_machines_need_ranks_per_node(plan_of: PlanOf) -> None:
    (problem,) = problems(plan_of, "cluster.gpu_type=H200")
    assert problem.message == "this machine has no GPU, so the number of GPUs per node is unknown"
    assert problem.remedy == "set cluster.ranks_per_node to the GPUs of one node"
    assert plan_of("cluster.gpu_type=H200", "cluster.ranks_per_node=8").memory.device_gib == 139.8


def test_an_unknown_gpu_type_is_refused(plan_of: PlanOf) -> None:
    (problem,) = problems(plan_of, "cluster.gpu_type=Z900-NONE", "cluster.ranks_per_node=8")
    assert problem.message == "cluster.gpu_type=Z900-NONE is not in the table of GPU types"
    assert "choose one of A100-40GB" in problem.remedy
    (problem,) = problems(plan_of, "cluster.gpu_type=MI300", "cluster.ranks_per_node=8")
    assert problem.remedy.startswith("did you mean MI300X?")


def test_an_hpz_partition_that_does_not_divide_is_refused(plan_of: PlanOf) -> None:
    (problem,) = problems(plan_of, *LLAMA_70B, "deepspeed.hpz_partition_size=5")
    assert problem.message == "deepspeed.hpz_partition_size=5 does not divide the 32 ranks"
    assert problem.remedy == "set it to the ranks of one node (8), to node, or to 1"
    for size in ("8", "node", "1"):
        assert plan_of(*LLAMA_70B, f"deepspeed.hpz_partition_size={size}").topology.world_size == 32


def test_resizing_a_plan_equals_planning_for_the_other_ranks(plan_of: PlanOf) -> None:
    full = plan_of(*LLAMA_70B, "cluster.nodes=8")
    assert resize_plan(full, 64, 8) == full
    half, planned = resize_plan(full, 32, 8), plan_of(*LLAMA_70B, "cluster.nodes=4")
    identity = {"config": half.config, "wandb_id": half.wandb_id, "run_dir": half.run_dir, "run_name": half.run_name}
    assert half == planned.model_copy(update=identity | {"provenance": half.provenance})
    assert half.batch.global_batch_size == full.batch.global_batch_size


def test_resizing_to_ranks_that_do_not_divide_is_refused(plan_of: PlanOf) -> None:
    full = plan_of(*LLAMA_70B, "deepspeed.hpz_partition_size=8")
    with pytest.raises(ConfigError, match="does not divide the 4 ranks"):
        resize_plan(full, 4, 4)
    with pytest.raises(ConfigError):
        resize_plan(plan_of(*LLAMA_70B), 7, 7)


def test_min_nodes_above_the_nodes_are_refused(plan_of: PlanOf) -> None:
    (problem,) = problems(plan_of, "cluster=ray", "cluster.min_nodes=2")
    assert problem.message == "cluster.min_nodes=2 is more than the 1 nodes of the run"
    assert plan_of("cluster=ray", "cluster.nodes=2", "cluster.min_nodes=2").topology.nodes == 2


def test_all_problems_of_a_plan_come_in_one_pass(plan_of: PlanOf) -> None:
    mistakes = problems(
        plan_of, *LLAMA_70B, "deepspeed.hpz_partition_size=5", "cluster.gpu_type=ABACUS", "train.global_batch_size=100"
    )
    assert [p.where for p in mistakes] == ["cluster.gpu_type", "deepspeed.hpz_partition_size", "train.global_batch_size"]


@pytest.mark.parametrize(
    ("tokens", "seconds", "gpu_seconds"),
    [
        ((), None, None),
        (("run.max_hours=1.5",), 5400.0, None),
        # 64 dollars at 2 dollars per GPU hour: 32 GPU hours, regardless of the number of GPUs.
        (("run.max_usd=64", "cluster.price_per_gpu_hour=2"), None, 32 * 3600.0),
        (("run.max_usd=64", "cluster.price_per_gpu_hour=2", "run.max_hours=2"), 7200.0, 32 * 3600.0),
        (("cluster.price_per_gpu_hour=2",), None, None),
    ],
)
def test_limits_of_hours_and_dollars_become_seconds(
    plan_of: PlanOf, tokens: tuple[str, ...], seconds: float | None, gpu_seconds: float | None
) -> None:
    planned = plan_of(*LLAMA_70B, *tokens)
    assert planned.limits == Limits(max_seconds=seconds, max_gpu_seconds=gpu_seconds)
    assert resize_plan(planned, 16, 8).limits == planned.limits


def test_model_states_that_exceed_a_gpu_are_refused(plan_of: PlanOf) -> None:
    (problem,) = problems(plan_of, *SEVENTY, device=CUDA)
    assert problem.message == "model states over 8 ranks need 148 GiB per GPU, and a GPU has 79"
    assert "deepspeed=zero3_offload" in problem.remedy
    assert plan_of(*SEVENTY, "deepspeed=zero3_offload", device=CUDA).topology.world_size == 8


def test_a_smaller_elastic_run_saves_in_the_background_only_where_nodes_have_room(plan_of: PlanOf) -> None:
    settings = (*SEVENTY, "cluster=ray", "cluster.nodes=8", "cluster.ranks_per_node=8", "cluster.min_nodes=2", *H200)
    planned = plan_of(*settings, device=CUDA.model_copy(update={"host_memory_gib": 300.0}))
    assert planned.saving.background
    smallest = plan_fewest_nodes(planned)
    assert smallest is not None
    assert not smallest.saving.background, "384 GiB of a node that has 300"


def test_a_run_that_saves_while_training_waits_does_so_on_fewer_ranks(plan_of: PlanOf) -> None:
    settings = (*SEVENTY, "cluster=ray", "cluster.nodes=8", "cluster.ranks_per_node=8", "cluster.min_nodes=2", *H200)
    planned = plan_of(*settings, device=CUDA.model_copy(update={"host_memory_gib": 100.0}))
    assert not planned.saving.background
    # Plans of earlier launchers do not record a node's main memory.
    unknown = planned.model_copy(update={"memory": planned.memory.model_copy(update={"node_gib": None})})
    assert resize_plan(unknown, 16, 8).saving == planned.saving


def test_unknown_gpus_of_a_ray_cluster_are_not_refused(plan_of: PlanOf) -> None:
    settings = (*SEVENTY, "cluster=ray", "cluster.address=http://127.0.0.1:8265", "cluster.nodes=1", "cluster.ranks_per_node=8")
    assert plan_of(*settings, device=CUDA).topology.world_size == 8
    (problem,) = problems(plan_of, *settings, "cluster.gpu_type=H100-80GB", device=CUDA)
    assert "model states over 8 ranks" in problem.message


def test_an_elastic_run_must_fit_on_its_fewest_nodes(plan_of: PlanOf) -> None:
    elastic = (*SEVENTY, "cluster=ray", "cluster.nodes=8", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8")
    (problem,) = problems(plan_of, *elastic, "cluster.min_nodes=1")
    assert problem.where == "cluster.min_nodes"
    assert "cluster.min_nodes=1: model states over 8 ranks need 148 GiB per GPU, and a GPU has 79" in problem.message
    # Of 5 nodes, 4 train: the global batch of 128 divides evenly over 32 ranks, but not 40.
    planned = plan_of(*elastic, "cluster.min_nodes=5")
    smallest = plan_fewest_nodes(planned)
    assert smallest is not None
    assert (smallest.topology.world_size, smallest.batch.global_batch_size) == (32, planned.batch.global_batch_size)
    (problem,) = problems(plan_of, *elastic, "cluster.min_nodes=2")
    assert "cluster.min_nodes=2: the loss stage needs 87 GiB" in problem.message
    assert plan_fewest_nodes(plan_of(*elastic)) is None


@pytest.mark.parametrize(("gpu", "is_noted"), [(24.0, False), (2.2, True), (2.5, False)])
def test_a_peak_near_the_memory_of_a_gpu_is_noted(plan_of: PlanOf, gpu: float, is_noted: bool) -> None:
    planned = plan_of(device=CUDA)
    assert planned.peak is not None
    assert 2.0 < planned.peak.peak_gib < 0.9 * 2.5, "CUDA and NCCL take 2 GiB"
    memory = planned.memory.model_copy(update={"device_gib": gpu})
    lines = "\n".join(plan_lines(planned.model_copy(update={"memory": memory})))
    assert ("leaves less than 5% of a GPU's 2 GiB" in lines) is is_noted


def test_the_plan_warns_of_states_that_exceed_main_memory_on_cpus(plan_of: PlanOf) -> None:
    lines = plan_lines(plan_of("model=llama3_1_8b"))
    warnings = [line for line in lines if line.startswith("warning")]
    assert "GiB of main memory per node, which has 24 GiB: they do not fit" in warnings[0]
    assert not any("a copy of the states" in line for line in lines)


@pytest.mark.parametrize("deepspeed", ["zero3", "zero3_offload", "zero3_nvme", "zero3_pp"])
def test_the_zero3_json_matches_its_golden_file(plan_of: PlanOf, golden: Golden, deepspeed: str) -> None:
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


def test_the_plan_of_a_tiny_run_matches_its_golden_file(plan_of: PlanOf, golden: Golden) -> None:
    planned = plan_of("train.max_steps=20")
    golden("tiny.plan.json", planned.to_json())
    golden("tiny.plan.txt", "\n".join(plan_lines(planned)) + "\n")


def test_the_plan_of_many_nodes_as_text_matches_its_golden_file(plan_of: PlanOf, golden: Golden) -> None:
    planned = plan_of(
        *("experiment=llama3_70b_four_nodes", "data.path=rows.jsonl", "run.max_hours=12", "tracking.entity=us"), data=None
    )
    speed = estimate_speed(planned, "H100-80GB")
    golden("llama3_70b.plan.txt", "\n".join(plan_lines(planned, speed=speed)) + "\n")


def test_sizes_follow_the_model_and_can_be_set(plan_of: PlanOf) -> None:
    zero = plan_of("model=llama3_3_70b", "deepspeed.offload_optimizer=cpu", device=GPUS).deepspeed["zero_optimization"]
    assert zero["reduce_bucket_size"] == 8192 * 8192
    assert zero["stage3_param_persistence_threshold"] == 81920
    keys = "reduce_bucket_size: 7, stage3_prefetch_bucket_size: 8, stage3_param_persistence_threshold: 0"
    own = plan_of(f"deepspeed.extra={{zero_optimization: {{{keys}}}}}")
    zero = own.deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (7, 8)
    assert zero["stage3_param_persistence_threshold"] == 0


def test_large_models_and_many_ranks_fetch_by_layers_and_sum_in_fp32(plan_of: PlanOf) -> None:
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


def test_a_buffer_for_weights_on_nvme_holds_a_ranks_part_of_the_largest(plan_of: PlanOf) -> None:
    planned = plan_of("model=llama3_1_8b", "deepspeed=zero3_nvme", "run.name=first", device=GPUS)
    zero = planned.deepspeed["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] == 128_256 * 4096 // 8
    # DeepSpeed fails when it prefetches from NVMe.
    assert zero["stage3_prefetch_bucket_size"] == 0
    other = plan_of("model=llama3_1_8b", "deepspeed=zero3_nvme", "run.name=second", device=GPUS)
    folders = {p.deepspeed["zero_optimization"]["offload_optimizer"]["nvme_path"] for p in (planned, other)}
    assert len(folders) == 2
    assert {folder.rpartition("/")[0] for folder in folders} == {"/local_nvme"}


def test_raw_keys_come_last_and_are_merged(plan_of: PlanOf) -> None:
    rendered = plan_of("deepspeed.extra={zero_optimization: {overlap_comm: false}, wall_clock_breakdown: true}").deepspeed
    assert rendered["wall_clock_breakdown"] is True
    assert rendered["zero_optimization"]["overlap_comm"] is False
    assert rendered["zero_optimization"]["contiguous_gradients"] is True


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_precision_of_compute_and_states(plan_of: PlanOf, dtype: str) -> None:
    rendered = plan_of(f"model.dtype={dtype}", "train.micro_batch_size=1").deepspeed
    assert {key for key in ("bf16", "fp16") if key in rendered} == {dtype} - {"fp32"}
    # Half-precision gradients are summed in fp32.
    assert rendered.get("data_types") == ({"grad_accum_dtype": "fp32"} if dtype != "fp32" else None)


@pytest.mark.parametrize(("epochs", "text"), [(1, "(1 epoch)"), (2, "(2 epochs)")])
def test_one_epoch_is_singular(plan_of: PlanOf, epochs: int, text: str) -> None:
    assert any(line.startswith("steps ") and text in line for line in plan_lines(plan_of(f"train.epochs={epochs}", data=None)))


def test_the_plan_notes_truncated_documents(plan_of: PlanOf) -> None:
    def notes(**counts: int) -> list[str]:
        facts = DATA.model_copy(update=counts)
        return [line.removeprefix("note").strip() for line in plan_lines(plan_of(data=facts)) if "documents cut" in line]

    assert notes(truncated_docs=90, truncated_tokens=9_000) == []
    assert notes(truncated_docs=1_234, truncated_tokens=100_000) == [
        "1,234 documents cut, losing 10% of the tokens: raise data.max_length, or data.long_documents=split"
    ]


@pytest.mark.parametrize(
    ("part", "value", "field"),
    [("schema_version", 5, "schema_version"), ("config", None, "config"), ("topology", 3, "topology")],
)
def test_a_damaged_plan_gives_an_error_that_names_the_field(
    plan_of: PlanOf, tmp_path: Path, part: str, value: Any, field: str
) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(json.dumps(json.loads(plan_of().to_json()) | {part: value}))
    with pytest.raises(RunError) as error:
        run_store.load_plan(run)
    (problem,) = error.value.problems
    assert problem.where == str(run.plan)
    assert problem.value.startswith(f"{field}: ")
    assert "\n" not in problem.value


@pytest.mark.parametrize("text", ["", "[]", "null", '{"schema_version": 5}'])
def test_a_file_that_holds_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(text)
    for read in (run_store.load_plan, run_store.read_placement):
        with pytest.raises(RunError):
            read(run)


def test_looking_at_a_run_does_not_load_the_models_of_plans(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan_of().to_json())
    code = (
        "import sys; from pathlib import Path; from launcher.runs import run_store; from launcher.plan.run_dir import RunDir\n"
        "print(run_store.read_placement(RunDir(Path(sys.argv[1]))).num_ranks, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
