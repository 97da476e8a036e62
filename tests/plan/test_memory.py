"""Memory of model states compared with hand calculations."""

from __future__ import annotations

import pytest

from launcher.config.sections.deepspeed import DeepSpeedSection
from launcher.plan.checkpoints import checkpoint_bytes, plan_saving
from launcher.plan.launch_plan import Memory, Topology
from launcher.plan.optimizers import OPTIMIZERS
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
