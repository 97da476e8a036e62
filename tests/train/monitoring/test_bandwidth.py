from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forked_ranks import RankServer

from launcher.plan.launch_plan import LaunchPlan
from launcher.train.monitoring import bandwidth


def test_two_ranks_measure_the_same_bandwidth(rank_server: RankServer, tmp_path: Path) -> None:
    (measured, cost_s, computed), other = rank_server.values("train_ranks:measure_link", [[], []], tmp_path)
    assert [measured, computed] == [other[0], other[2]]
    # Sanity bounds: less than 1 TB/s, and less than about ten seconds for 4 MB.
    assert 1e-4 < measured < 1e3
    assert cost_s < 5
    # The warm-up is ignored. The slower median (4 ms, not 2 ms) counts. With two ranks, busbw equals algbw.
    assert computed == pytest.approx(2**20 / 4e-3 / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("nodes", "gpu", "rows", "gb_per_s", "warns"),
    [
        (2, "H100-80GB", 2, 30.0, True),
        (2, "H100-80GB", 2, 45.0, False),
        (2, "H100-80GB", 1, 45.0, True),
        (1, "H100-80GB", 2, 1.1, False),
        (2, None, 2, 0.1, False),
    ],
)
def test_a_network_that_is_slower_than_the_model_needs_is_a_warning(
    plan_of: Callable[..., LaunchPlan], nodes: int, gpu: str | None, rows: int, gb_per_s: float, warns: bool
) -> None:
    """The required bandwidth is 0.75 x 0.48 x 989e12 FLOP/s / 8192 tokens = 43 GB/s."""
    on_gpus = () if gpu is None else (f"cluster.gpu_type={gpu}",)
    sizes = ("data.max_length=4096", "train.global_batch_size=64", f"train.micro_batch_size={rows}", "model.dtype=bf16")
    plan = plan_of("model=llama3_1_8b", *on_gpus, *sizes, f"cluster.nodes={nodes}", "cluster.ranks_per_node=8")
    warning = bandwidth.bandwidth_warning(plan, gb_per_s)
    assert ("NCCL_DEBUG=INFO" in warning) == warns
    assert bool(warning) == warns
    assert bandwidth.needed_gb_per_s(plan) == pytest.approx(5.0 if gpu is None else 43.46 * 2 / rows, rel=0.01)


@pytest.mark.parametrize(
    ("nodes", "settings", "num_bytes"),
    [
        (8, (), 2 + 2 + 2),
        (16, (), 2 + 2 + 4),
        (2, ("deepspeed.hpz_partition_size=node",), 2 + 2),
        (2, ("deepspeed.quantized_weights=true",), 1 + 1 + 2),
        (16, ("+deepspeed.extra.communication_data_type=bf16",), 2 + 2 + 2),
        (2, ("model.dtype=fp32",), (4 + 4 + 4) * 67 / 989),
    ],
)
def test_the_needed_bandwidth_follows_the_bytes_of_the_plan(
    plan_of: Callable[..., LaunchPlan], nodes: int, settings: tuple[str, ...], num_bytes: float
) -> None:
    """An H100 computes 989 TFLOP/s in bf16 and 67 in fp32; ranks do not use TF32."""
    sizes = ("data.max_length=4096", "train.global_batch_size=256", "train.micro_batch_size=2", "model.dtype=bf16")
    on_gpus = ("cluster.gpu_type=H100-80GB", f"cluster.nodes={nodes}", "cluster.ranks_per_node=8")
    plan = plan_of("model=llama3_1_8b", *on_gpus, *sizes, *settings)
    assert bandwidth.needed_gb_per_s(plan) == pytest.approx(num_bytes / 8 * 0.48 * 989e12 / 8192 / 1e9, rel=0.01)
