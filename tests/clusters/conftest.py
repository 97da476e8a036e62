"""Plans for Slurm, and a shell's way to submit small jobs to a testbed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testbed_cluster import Testbed

from launcher.config.cluster import SlurmSection
from launcher.config.compose import run_hydra
from launcher.config.schema import RunConfig
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DataFacts, DeviceFacts, Facts, LaunchPlan, Provenance
from launcher.plan.planner import plan

CPU = DeviceFacts(kind="cpu", name="CPU", count=4)
PROVENANCE = Provenance(created_at="2026-01-31T09:15:00Z", launcher_version="0.1.0", python="3.11.9", packages={})
WAIT_S = 20.0


@functools.cache
def composed() -> RunConfig:
    found: list[RunConfig] = []
    run_hydra(
        ("model=tiny", "cluster=slurm", "run.name=tried", "train.global_batch_size=144"), lambda done: found.append(done.config)
    )
    return found[0]


@pytest.fixture
def plan_at(tmp_path: Path) -> Callable[..., LaunchPlan]:
    """The plan of a small run on Slurm with these settings of the cluster; `device` is what one node has."""

    def planned(device: DeviceFacts = CPU, cache_dir: str = str(tmp_path / "cache"), **settings: Any) -> LaunchPlan:
        config = composed().model_copy(update={"cluster": SlurmSection.model_validate({"kind": "slurm", **settings})})
        assert config.model.config is not None
        data = DataFacts(
            cache_dir=cache_dir,
            num_rows=1000,
            num_docs=5000,
            num_tokens=900_000,
            num_trained_tokens=450_000,
            num_eval_rows=0,
            num_eval_tokens=0,
            truncated_docs=0,
            truncated_tokens=0,
            padding_frac=0.0,
        )
        model = model_facts(config.model.config, None, None, None)
        return plan(config, Facts(working_dir=str(tmp_path), device=device, model=model, data=data, provenance=PROVENANCE))

    return planned


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Testbed], Testbed]:
    """Let Slurm's commands of this process talk to a testbed."""

    def choose(bed: Testbed) -> Testbed:
        for name, value in bed.variables.items():
            monkeypatch.setenv(name, value)
        return bed

    return choose


@pytest.fixture
def here(slurm: Testbed, use: Callable[[Testbed], Testbed]) -> Testbed:
    """The session's Slurm cluster, for this process; mended after the test."""
    return use(slurm)


@pytest.fixture
def eventually() -> Callable[[Callable[[], Any]], Any]:
    """What a function returns as soon as that is true."""

    def wait(look: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not (found := look()):
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.1)
        return found

    return wait


@pytest.fixture(scope="module")
def gpu_slurm(other_slurm: Callable[..., Any]) -> Iterator[Testbed]:
    """Two nodes with two GPUs each, whose type has no name."""
    with other_slurm(nodes=2, gpus=2) as bed:
        yield bed


@pytest.fixture(scope="module")
def bare_slurm(other_slurm: Callable[..., Any]) -> Iterator[Testbed]:
    """One node, no accounting."""
    with other_slurm(nodes=1, accounting=False) as bed:
        yield bed
