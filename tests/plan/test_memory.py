"""Memory of model states against hand calculations, and of a step's peak with what autograd saves in each preset's layers."""

from __future__ import annotations

from dataclasses import replace

import bare_memory
import pytest
from plan_fixtures import KINDS, ConfigOf, PlanOf, facts_for, preset

from launcher.cli.plan import describe_peak
from launcher.config.sections.cluster import ClusterSection, LocalSection
from launcher.config.sections.ray import RaySection
from launcher.config.sections.slurm import SlurmSection
from launcher.config.sections.static import StaticSection
from launcher.config.sections.train import DeepSpeedSection
from launcher.plan.checkpoints import checkpoint_bytes, plan_saving
from launcher.plan.launch_plan import LaunchPlan, Memory, Topology
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.planner import as_run, plan, planned_tokens_per_sec, sizing_inputs
from launcher.plan.sizing.combinations import PREFERRED_SHARE, choose_combination, estimate_combination
from launcher.plan.sizing.memory import estimate_model_states

EIGHT_GPUS = Topology(nodes=1, ranks_per_node=8, world_size=8, device="cuda", backend="nccl")
FOUR_NODES = Topology(nodes=4, ranks_per_node=8, world_size=32, device="cuda", backend="nccl")
ADAMW = OPTIMIZERS["adamw"]
LLAMA_8B = 8_030_261_248
# GiB per rank for one byte per parameter, over eight ranks: 8,030,261,248 / 8 / 2^30.
BYTE = 0.934844


def memory(dtype: str = "bf16", accumulation: int = 8, topology: Topology = EIGHT_GPUS, **settings: object) -> Memory:
    return estimate_model_states(LLAMA_8B, dtype, accumulation, ADAMW, DeepSpeedSection(**settings), topology, 79.1)  # type: ignore[arg-type]


def test_eight_billion_on_eight_gpus() -> None:
    # 18 bytes per parameter: bf16 weights 2, fp32 gradients 4, fp32 master weights and two moments 12.
    estimated = memory()
    assert estimated.weights_gib == pytest.approx(2 * BYTE, abs=1e-3)
    assert estimated.gradients_gib == pytest.approx(4 * BYTE, abs=1e-3)
    assert estimated.optimizer_gib == pytest.approx(12 * BYTE, abs=1e-3)
    assert estimated.per_rank_gib == pytest.approx(16.827, abs=1e-3)
    assert (estimated.host_per_node_gib, estimated.device_gib) == (0.0, 79.1)


def test_without_accumulation_gradients_are_bf16() -> None:
    assert memory(accumulation=1).per_rank_gib == pytest.approx(16 * BYTE, abs=1e-3)


def test_fp32_weights_have_a_master_copy() -> None:
    # Bytes per parameter: 4 weights, 4 gradients, 4 master weights, 8 moments; measured with benchmarks/memory_plan.py.
    assert memory("fp32").per_rank_gib == pytest.approx(20 * BYTE, abs=1e-3)
    # An optimizer in main memory has its own copy of the weights.
    assert memory("fp32", offload_optimizer="cpu").host_per_node_gib == pytest.approx(8 * (4 + 12) * BYTE, abs=1e-2)


def test_optimizer_in_main_memory() -> None:
    estimated = memory(offload_optimizer="cpu")
    assert estimated.per_rank_gib == pytest.approx(2 * BYTE, abs=1e-3)
    # Gradients and optimizer states of all eight ranks: 16 x 8.03e9 bytes.
    assert estimated.host_per_node_gib == pytest.approx(119.660, abs=1e-2)


def test_optimizer_and_weights_in_main_memory() -> None:
    estimated = memory(offload_optimizer="cpu", offload_params="cpu")
    assert estimated.per_rank_gib == 0.0
    assert estimated.host_per_node_gib == pytest.approx(134.617, abs=1e-2)


def test_states_on_nvme() -> None:
    estimated = memory(offload_optimizer="nvme", offload_params="nvme", nvme_path="/nvme")
    assert estimated.per_rank_gib == 0.0
    # Main memory holds the gradients, and 100 million elements of the states at a time.
    assert estimated.host_per_node_gib == pytest.approx(8 * (4 * BYTE + 16 * 1e8 / 2**30), abs=1e-2)


def test_hpz_keeps_a_second_copy_of_the_weights_in_each_node() -> None:
    estimated = memory(topology=FOUR_NODES, hpz_partition_size="node")
    # 1/32 of all states and 1/8 of the bf16 weights.
    assert estimated.per_rank_gib == pytest.approx(18 * BYTE / 4 + 2 * BYTE, abs=1e-3)
    assert estimated == memory(topology=FOUR_NODES, hpz_partition_size=8)


def test_cpu_ranks_hold_everything_in_main_memory() -> None:
    two = Topology(nodes=1, ranks_per_node=2, world_size=2, device="cpu", backend="gloo")
    estimated = memory(topology=two)
    assert estimated.per_rank_gib == pytest.approx(18 * 4 * BYTE, abs=1e-2)
    assert estimated.host_per_node_gib == pytest.approx(2 * estimated.per_rank_gib, abs=1e-2)


def test_a_checkpoint_holds_master_weights_and_optimizer_states() -> None:
    assert checkpoint_bytes(LLAMA_8B, ADAMW) == 96_363_134_976


def test_background_saves_need_main_memory_on_each_node() -> None:
    states = memory(topology=FOUR_NODES)
    estimated = plan_saving(LLAMA_8B, True, ADAMW, DeepSpeedSection(), states, FOUR_NODES, 500.0)
    # 12 bytes per parameter, over four nodes.
    assert estimated.background
    assert estimated.host_gib_per_node == pytest.approx(12 * BYTE * 8 / 4, abs=1e-2)
    assert not plan_saving(LLAMA_8B, False, ADAMW, DeepSpeedSection(), states, FOUR_NODES, 500.0).background


def test_saves_block_training_where_copies_do_not_fit() -> None:
    offloaded = DeepSpeedSection(offload_optimizer="cpu")
    states = memory(topology=EIGHT_GPUS, offload_optimizer="cpu")
    # 209 GiB: 16 bytes per parameter for gradients and states, and 12 for copies.
    assert plan_saving(LLAMA_8B, True, ADAMW, offloaded, states, EIGHT_GPUS, 300.0).background
    tight = plan_saving(LLAMA_8B, True, ADAMW, offloaded, states, EIGHT_GPUS, 250.0)
    assert not tight.background
    assert "training waits" in tight.note
    assert plan_saving(LLAMA_8B, True, ADAMW, offloaded, states, EIGHT_GPUS, None).background, (
        "where nothing is known, the ranks find out"
    )
    for key in ("offload_optimizer", "offload_params"):
        on_disk = DeepSpeedSection.model_validate({key: "nvme", "nvme_path": "/nvme"})
        estimated = plan_saving(LLAMA_8B, True, ADAMW, on_disk, states, EIGHT_GPUS, 10_000.0)
        assert not estimated.background
        assert "NVMe" in estimated.note


# Enough tokens that the weight gradients do not hide the activations.
TOKENS = 16_384
H100 = ("cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8", "data.max_length=4096", "train.global_batch_size=64")


@pytest.mark.rest
@pytest.mark.parametrize("name", KINDS)
def test_the_activations_of_a_preset_are_those_that_a_pass_keeps(name: str) -> None:
    """Fake tensors at real width. With `every 2`, some layers save their activations and others recompute them."""
    pytest.importorskip("torch.nn.attention.varlen")
    config = preset(name, num_hidden_layers=3, vocab_size=256, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    arguments = (config, TOKENS, "every 2", "bf16", 64)
    measured, planned = bare_memory.measure(*arguments), bare_memory.predict(*arguments)
    assert planned == pytest.approx(measured, rel=0.01)


def test_the_plan_takes_the_fastest_combination_that_fits(plan_of: PlanOf) -> None:
    planned = plan_of("model=llama3_1_8b", *H100)
    assert (planned.batch.micro_batch_size, planned.checkpointing, planned.peak.largest.name) == (1, "none", "loss")
    assert planned.peak.peak_gib == pytest.approx(50.8, abs=0.5)
    assert not planned.peak.is_measured
    inputs = sizing_inputs(planned)
    chosen = choose_combination(inputs)
    larger = estimate_combination(inputs, replace(chosen.combination, micro_batch_size=2))
    assert chosen.fits
    assert (larger.tokens_per_sec or 0) > (chosen.tokens_per_sec or 0)
    assert larger.peak.peak_gib > PREFERRED_SHARE * 79.1
    # Larger loss chunks use memory that is free here; smaller GPUs have room for fewer tokens.
    assert planned.loss_chunk_tokens == 4096
    assert (
        plan_of("model=gemma3_1b", "cluster.gpu_type=RTX-4090-24GB", *H100[1:], "data.max_length=8192").loss_chunk_tokens == 1024
    )
    assert plan_of("model=tiny").loss_chunk_tokens == 1024
    # Small models need more tokens: 1.4e14 / 6 / 0.6e9 = 39,000. With 8 rows per rank, at most 32,768 are possible.
    small = plan_of("model=qwen3_0_6b", *H100)
    assert small.batch.micro_batch_size == 8
    # Longer rows leave no room for the activations of all layers.
    longer = plan_of("model=llama3_1_8b", *H100, "data.max_length=16384")
    assert longer.checkpointing in ("every 2", "all")
    # Explicit settings are kept.
    override = plan_of("model=llama3_1_8b", *H100, "model.activation_checkpointing=every 3", "train.micro_batch_size=1")
    assert (override.batch.micro_batch_size, override.checkpointing) == (1, "every 3")
    assert plan_of("model=llama3_1_8b", *H100, "model.activation_checkpointing=true").checkpointing == "all"
    assert plan_of("model=tiny").checkpointing == "none"


def test_gradients_that_ranks_sum_in_fp32_take_memory_for_copies_and_time(plan_of: PlanOf) -> None:
    """DeepSpeed copies a gradient to the sum's dtype, and to pad it if the ranks (72, but not 64) do not divide its size."""
    fixed = (
        "train.micro_batch_size=1",
        "model.activation_checkpointing=none",
        "model.dtype=bf16",
    )
    head, weight = 128256 * 4096, 14336 * 4096
    speeds: dict[tuple[int, str], float] = {}
    for nodes, dtype, copied_bytes in ((8, "bf16", 0), (8, "fp32", 4), (9, "bf16", 2), (9, "fp32", 4 + 4)):
        sizes = (*H100[:3], f"cluster.nodes={nodes}", f"train.global_batch_size={8 * nodes}")
        planned = plan_of("model=llama3_1_8b", *sizes, *fixed, f"+deepspeed.extra.communication_data_type={dtype}")
        stages = {stage.name: stage for stage in planned.peak.stages}
        # With one micro-batch, partitions are in bf16.
        partition = 2 / (8 * nodes)
        assert stages["backward"].gradients_gib == pytest.approx((2 * 2 + copied_bytes + partition) * weight / 2**30, rel=1e-3)
        if copied_bytes:
            assert stages["final norm"].temporary_gib == pytest.approx((copied_bytes + partition) * head / 2**30, rel=1e-3)
        inputs = sizing_inputs(planned)
        speeds[nodes, dtype] = estimate_combination(inputs, choose_combination(inputs).combination).tokens_per_sec or 0.0
    assert planned.peak.largest.name == "final norm"
    # With so few tokens, the network is the bottleneck: 2 + 2 + 2 bytes per parameter in bf16, 2 + 2 + 4 in fp32.
    assert speeds[8, "fp32"] / speeds[8, "bf16"] == pytest.approx(6 / 8, abs=0.05)


def test_one_rank_computes_with_its_own_partition_unless_that_is_in_main_memory(plan_of: PlanOf) -> None:
    """DeepSpeed's NoGatherHandle."""
    for ranks, offload, gathers in ((1, "none", False), (1, "cpu", True), (2, "none", True)):
        settings = ("model=llama3_2_1b", H100[0], f"cluster.ranks_per_node={ranks}", f"deepspeed.offload_params={offload}")
        offloaded = () if offload == "none" else ("deepspeed.offload_optimizer=cpu",)
        stages = plan_of(*settings, *offloaded).peak.stages
        assert any(stage.gathered_gib > 0 for stage in stages) == gathers


INSTALLED = {"torch": "2.13.0", "liger-kernel": "0.8.5"}


@pytest.mark.parametrize(
    ("settings", "packages", "is_used", "words"),
    [
        (H100, INSTALLED, True, "Liger's kernels"),
        (H100, {}, False, "without Liger, which is not installed here (pip install 'launcher[gpu]')"),
        ((*H100, "model.liger=true"), {}, True, "Liger's kernels"),
        ((*H100, "model.liger=false"), INSTALLED, False, "without Liger (model.liger=false)"),
        ((*H100, "model=qwen3_30b_a3b", "cluster.nodes=8"), INSTALLED, False, ""),
        (("model.liger=true",), INSTALLED, False, ""),
        ((), INSTALLED, False, ""),
    ],
    ids=["installed", "not installed", "true", "false", "experts", "true on CPUs", "CPUs"],
)
def test_liger_is_used_where_it_is_installed_and_made_for_the_model(
    config_of: ConfigOf, settings: tuple[str, ...], packages: dict[str, str], is_used: bool, words: str
) -> None:
    config = config_of(*(settings if "model=" in " ".join(settings) else ("model=llama3_1_8b", *settings)))
    facts = facts_for(config)
    facts = facts.model_copy(update={"provenance": facts.provenance.model_copy(update={"packages": packages})})
    planned = plan(config, facts)
    assert planned.liger is is_used
    assert choose_combination(sizing_inputs(planned)).combination.liger is is_used
    assert LaunchPlan.from_json(planned.to_json()).liger is is_used
    line = describe_peak(planned)
    assert line.endswith(f", {words}") if words else "Liger" not in line
    assert planned.peak == choose_combination(sizing_inputs(planned)).peak


@pytest.mark.parametrize(
    ("section", "is_own"),
    [
        (LocalSection(kind="local"), True),
        (StaticSection(kind="static"), True),
        (SlurmSection(kind="slurm"), True),
        (SlurmSection(kind="slurm", container_image="owner/image:tag"), False),
        (SlurmSection(kind="slurm", container_image="/images/a.sif", container_runtime="apptainer"), False),
        (RaySection(kind="ray"), True),
        (RaySection(kind="ray", address="auto"), True),
        (RaySection(kind="ray", address="10.0.0.1:6379"), False),
        (RaySection(kind="ray", address="http://10.0.0.1:8265"), False),
    ],
)
def test_packages_of_this_python_count_only_where_the_ranks_run_in_it(
    config_of: ConfigOf, section: ClusterSection, is_own: bool
) -> None:
    settings = {"gpu_type": "H100-80GB", "ranks_per_node": 8}
    config = config_of("model=llama3_1_8b", "train.global_batch_size=64", "data.max_length=4096")
    config = config.model_copy(update={"cluster": section.model_copy(update=settings)})
    planned = plan(config, facts_for(config))
    assert planned.liger is not is_own
    line = describe_peak(planned)
    assert ("without Liger, which is not installed here" in line) is is_own
    assert (", Liger's kernels if the ranks have liger-kernel" in line) is not is_own


def test_a_run_whose_ranks_decide_about_liger_fits_in_both_cases(plan_of: PlanOf) -> None:
    """With Liger alone, rows of 16,384 tokens would let fewer layers be recomputed."""
    settings = ("model=llama3_1_8b", *H100, "data.max_length=16384")
    image = ("cluster=slurm", "cluster.container_image=owner/image:tag")
    without, certain, open_ = (plan_of(*settings, *more) for more in ((), ("model.liger=true",), image))
    assert (open_.checkpointing, open_.batch, open_.peak) == (without.checkpointing, without.batch, without.peak)
    assert certain.checkpointing != open_.checkpointing
    assert planned_tokens_per_sec(open_) == planned_tokens_per_sec(without)
    assert (planned_tokens_per_sec(certain) or 0.0) > (planned_tokens_per_sec(without) or 0.0)
    assert plan_of(*settings, *image, "model.liger=true").peak == certain.peak


def test_ranks_compare_themselves_with_the_plan_for_the_kernels_that_they_have(plan_of: PlanOf) -> None:
    settings = ("model=llama3_1_8b", *H100, "data.max_length=16384")
    image = ("cluster=slurm", "cluster.container_image=owner/image:tag")
    without, certain, open_ = (plan_of(*settings, *more) for more in ((), ("model.liger=true",), image))
    assert as_run(open_, has_liger=False).peak == open_.peak
    assert planned_tokens_per_sec(as_run(open_, has_liger=False)) == planned_tokens_per_sec(without)
    with_liger = as_run(open_, has_liger=True)
    assert (planned_tokens_per_sec(with_liger) or 0.0) > (planned_tokens_per_sec(open_) or 0.0)
    assert as_run(certain, has_liger=True).peak == certain.peak
    for less, more in ((with_liger, open_), (certain, as_run(certain, has_liger=False))):
        assert less.peak.peak_gib < more.peak.peak_gib
