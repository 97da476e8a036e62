"""Fixtures with checkpoints that real ranks wrote, for the tests of checkpoints and exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from forked_ranks import RankServer

DEADLINE_S = 150
RunRanks = Callable[..., None]


@dataclass(frozen=True)
class Runs:
    """What the ranks left: checkpoints, tensor dumps and each rank's reports, by kind of engine."""

    folder: Path

    def checkpoints(self, kind: str) -> Path:
        return self.folder / kind / "checkpoints"

    def dump(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.safetensors"

    def report(self, kind: str, name: str, rank: int):
        return json.loads((self.folder / kind / f"{name}-{rank}.json").read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs the runs waits until they are made, once; so all such tests belong to `make test-rest`."""
    for item in items:
        if {"runs", "run_ranks"} <= set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(900))
            item.add_marker(pytest.mark.rest)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory, rank_server: RankServer) -> RunRanks:
    """Run a scenario of checkpoint_ranks.py in new processes; none of them outlives the call.

    `killed` names the ranks that must end by SIGKILL; the others may then end with any error or abort.
    """

    def run(scenario: str, world_size: int, folder: Path, kinds: str, *, killed: Sequence[int] = (), **environment: str) -> None:
        arguments = [(scenario, str(folder), kinds.split(","))] * world_size
        work = tmp_path_factory.mktemp(scenario)
        ended = rank_server.run("checkpoint_ranks:main", arguments, work, environment=environment, deadline_s=DEADLINE_S)
        tails = "\n".join(f"rank {i}, exit code {rank.code}:\n{rank.output[-3000:]}" for i, rank in enumerate(ended))
        assert [i for i, rank in enumerate(ended) if rank.code == -signal.SIGKILL] == list(killed), tails
        assert all(rank.code for rank in ended) if killed else not any(rank.code for rank in ended), tails

    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks) -> Runs:
    """A straight run, a killed save, and resumes on 2, 1, 4 and again 2 ranks, each in separate processes.

    It takes minutes, so it is made once for all test processes; a test that changes a file must copy it first.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "checkpoint-runs"
    with FileLock(f"{folder}.lock", timeout=2 * DEADLINE_S):
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run_ranks("straight", 2, folder, "fp32,bf16,hpz")
            run_ranks("killed", 2, folder, "bf16", killed=[0])
            run_ranks("background", 2, folder, "fp32,bf16")
            run_ranks("resume", 2, folder, "fp32,bf16,hpz")
            run_ranks("shrink", 1, folder, "fp32,bf16")
            run_ranks("grow", 2, folder, "fp32,bf16")
            run_ranks("double", 4, folder, "fp32,bf16")
            run_ranks("halve", 2, folder, "fp32,bf16")
            (folder / "whole").touch()
    return Runs(folder)


@pytest.fixture(scope="session")
def offload_runs(tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks, extensions: None) -> Runs:
    """A straight run and a resume with the optimizer offloaded to the CPU."""
    folder = tmp_path_factory.mktemp("offload")
    run_ranks("straight", 2, folder, "offload")
    run_ranks("resume", 2, folder, "offload")
    return Runs(folder)


@pytest.fixture(scope="session")
def nvme_runs(tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks, extensions: None) -> Runs:
    """As offload_runs, plus a resume on one rank and back on two, with states on disk."""
    folder = tmp_path_factory.mktemp("nvme")
    for scenario, world_size in (("straight", 2), ("waits", 2), ("resume", 2), ("shrink", 1), ("grow", 2)):
        run_ranks(scenario, world_size, folder, "nvme,nvme_params")
    return Runs(folder)
