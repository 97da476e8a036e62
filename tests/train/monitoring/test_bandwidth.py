from __future__ import annotations

from pathlib import Path

import pytest
from forked_ranks import RankServer

from launcher.plan.launch_plan import Topology
from launcher.train.monitoring import bandwidth


def test_two_ranks_measure_the_same_bandwidth(rank_server: RankServer, tmp_path: Path) -> None:
    (measured, cost_s, computed), other = rank_server.values("train_ranks:measure_link", [[], []], tmp_path)
    assert [measured, computed] == [other[0], other[2]]
    # A memory bus is slower than a terabyte per second, and four megabytes do not take ten seconds.
    assert 1e-4 < measured < 1e3
    assert cost_s < 5
    # The warm-up does not count; of the medians, 2 ms and 4 ms, the slower one does; busbw of two ranks equals algbw.
    assert computed == pytest.approx(2**20 / 4e-3 / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("nodes", "device", "gb_per_s", "warns"),
    [(2, "cuda", 1.1, True), (2, "cuda", 40.0, False), (1, "cuda", 1.1, False), (2, "cpu", 0.1, False), (64, "cuda", 4.0, False)],
)
def test_a_slow_network_between_gpu_nodes_is_a_warning(nodes: int, device: str, gb_per_s: float, warns: bool) -> None:
    topology = Topology(nodes=nodes, ranks_per_node=8, world_size=8 * nodes, device=device, backend="nccl")
    warning = bandwidth.bandwidth_warning(topology, gb_per_s)
    assert ("NCCL_DEBUG=INFO" in warning) == warns
    assert bool(warning) == warns
