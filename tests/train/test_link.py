from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.plan.launch_plan import Topology
from launcher.train import link

RANK = """
import json, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from launcher.train import link

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
started = time.perf_counter()
measured = link.measure(torch.device("cpu"))
cost_s = time.perf_counter() - started
times = iter([9.0, *([1e-3, 9.0, 2e-3] if rank == 0 else [1e-3, 4e-3, 5e-3])])
link._seconds = lambda buffer: next(times)
print(json.dumps([measured, cost_s, link.measure(torch.device("cpu"))]))
dist.destroy_process_group()
"""


def test_two_ranks_measure_one_bandwidth(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        said = [json.loads(rank.communicate(timeout=90)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    (measured, cost_s, computed), other = said
    assert [measured, computed] == [other[0], other[2]]
    # A memory bus is slower than a terabyte per second, and four megabytes do not take ten seconds.
    assert 1e-4 < measured < 1e3
    assert cost_s < 5
    # The warm-up does not count; of the medians, 2 ms and 4 ms, the slower one does; busbw of two ranks equals algbw.
    assert computed == pytest.approx(2**20 / 4e-3 / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("nodes", "device", "gb_per_s", "doubted"),
    [(2, "cuda", 1.1, True), (2, "cuda", 40.0, False), (1, "cuda", 1.1, False), (2, "cpu", 0.1, False), (64, "cuda", 4.0, False)],
)
def test_gpus_of_several_nodes_are_not_to_talk_over_slow_networks(
    nodes: int, device: str, gb_per_s: float, doubted: bool
) -> None:
    topology = Topology(nodes=nodes, ranks_per_node=8, world_size=8 * nodes, device=device, backend="nccl")
    said = link.doubt(topology, gb_per_s)
    assert ("NCCL_DEBUG=INFO" in said) == doubted
    assert bool(said) == doubted
