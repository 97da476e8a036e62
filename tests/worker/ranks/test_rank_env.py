"""The environment and setup of a rank's process.

The CPUs near a PCI device, read from a copy of the kernel's files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plan_fixtures import H100, config_of, plan_of

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.train import loop
from launcher.train.stop import Outcome
from launcher.worker.ranks import rank_env, rank_main
from launcher.worker.ranks.rank_env import RankEnv, allocator_defaults, choose_cpus, cpus_near, num_busy_threads
from launcher.worker.signals import StopFlag

# Prints the page faults of five allocations of a large tensor, after a first one.
_PAGE_FAULTS = """
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = lambda: [torch.ones(2**23) for _ in range(4)] + [torch.ones(2**25)]
tensors()
before = faults()
for _ in range(5):
    tensors()
print(faults() - before)
"""
__all__ = ["config_of", "plan_of"]
FIRST, SECOND = set(range(8)), set(range(8, 16))
NEAR = [FIRST] * 4 + [SECOND] * 4


@pytest.mark.rest
def test_tensors_in_main_memory_take_the_place_of_those_before() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept = _count_page_faults({**plain, **allocator_defaults(plain, "cpu")})
    assert kept < 0.1 * _count_page_faults(plain)


@pytest.mark.parametrize(
    ("library", "threshold"),
    [(("glibc", "2.41"), 2**28), (("glibc", "2.35"), 2**28), (("glibc", "2.31"), 2**25), (("", ""), 2**25)],
)
def test_the_c_library_gets_a_threshold_that_it_accepts(
    library: tuple[str, str], threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    assert allocator_defaults({}, "cpu")["MALLOC_MMAP_THRESHOLD_"] == str(threshold)


def test_what_the_user_has_set_stays() -> None:
    assert "MALLOC_TRIM_THRESHOLD_" not in allocator_defaults({"MALLOC_TRIM_THRESHOLD_": "1"}, "cpu")
    assert allocator_defaults({}, "cuda") == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_defaults({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "cuda") == {}


def _count_page_faults(environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", _PAGE_FAULTS]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout)


def test_the_cpus_next_to_a_gpu_are_those_of_its_numa_node(tmp_path: Path) -> None:
    for address, node in (("0000:3b:00.0", 1), ("0000:5e:00.0", -1)):
        device = tmp_path / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    folder = tmp_path / "devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text("4-6,12\n")
    assert cpus_near("0000:3b:00.0", tmp_path) == {4, 5, 6, 12}
    # Most virtual machines do not report the node.
    assert cpus_near("0000:5e:00.0", tmp_path) == set()
    assert cpus_near("0000:aa:00.0", tmp_path) == set()


@pytest.mark.parametrize(
    ("local_rank", "near", "allowed", "num_threads", "expected"),
    [
        (0, NEAR, FIRST | SECOND, 2, FIRST),
        (5, NEAR, FIRST | SECOND, 2, SECOND),
        # Most of the job's CPUs are on one socket: the four ranks of the other would share two CPUs.
        (5, NEAR, FIRST | {8, 9}, 1, set()),
        (0, NEAR, FIRST | {8, 9}, 1, FIRST),
        # All GPUs are on one socket, but the ranks use the CPUs of both.
        (0, [FIRST] * 8, FIRST | SECOND, 2, set()),
        (0, [FIRST], SECOND, 1, set()),
        (0, [set(), set()], FIRST, 1, set()),
    ],
)
def test_a_rank_is_bound_where_all_ranks_next_to_its_cpus_have_room(
    local_rank: int, near: list[set[int]], allowed: set[int], num_threads: int, expected: set[int]
) -> None:
    assert choose_cpus(near, local_rank, allowed, num_threads) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, 1), ("12", 12), ("4,2", 4), ("many", 1)])
def test_an_optimizer_on_cpus_keeps_the_first_number_of_omp_num_threads_busy(value: str | None, expected: int) -> None:
    environ = {} if value is None else {"OMP_NUM_THREADS": value}
    assert num_busy_threads(environ, steps_on_cpu=True) == expected
    assert num_busy_threads(environ, steps_on_cpu=False) == min(expected, 4)


def test_a_rank_binds_itself_before_it_trains(
    plan_of: Callable[..., LaunchPlan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The agent and Ray start the same module."""
    bound: list[set[int]] = []

    def train(*arguments: object) -> Outcome:
        assert bound == [SECOND]
        return Outcome("completed", "completed", 1, "", None)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    addresses = [SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0) for bus in range(8)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", addresses.__getitem__)
    monkeypatch.setattr(rank_env, "cpus_near", lambda address: NEAR[int(address.split(":")[1], 16)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: FIRST | SECOND)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: bound.append(cpus))
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    planned = plan_of("train.global_batch_size=8", device=H100)
    progress = rank_main._Progress()
    rank_main._train(planned, RunDir(tmp_path), RankEnv(5, 5, 8, 0), 1, StopFlag(loading=True), progress)
    assert bound == [SECOND]


def test_a_rank_is_bound_where_a_socket_has_several_numa_nodes() -> None:
    """192 CPUs in eight NUMA nodes, two of eight GPUs next to each of four; the agent gives each rank 24 threads."""
    near = [set(range(48 * (gpu // 2), 48 * (gpu // 2) + 24)) for gpu in range(8)]
    everything, environ = set(range(192)), {"OMP_NUM_THREADS": "24"}
    assert choose_cpus(near, 3, everything, num_busy_threads(environ, steps_on_cpu=False)) == set(range(48, 72))
    assert choose_cpus(near, 3, everything, num_busy_threads(environ, steps_on_cpu=True)) == set()
