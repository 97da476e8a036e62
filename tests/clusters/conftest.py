"""Fixtures for tests on Slurm: plans, and testbeds that the Slurm commands of this process use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pace import slowness
from plan_fixtures import PlanOf, config_of, golden, ray_plan, slurm_plan
from testbed_cluster import Testbed

from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

__all__ = ["config_of", "golden", "ray_plan", "slurm_plan"]

CPU = DeviceFacts(kind="cpu", name="CPU", count=4)
WAIT_S = 90.0


@pytest.fixture
def plan_at(slurm_plan: PlanOf, tmp_path: Path) -> PlanOf:
    """Plan a small run on Slurm with these cluster settings; `device` is the device of one node."""

    def planned(device: DeviceFacts = CPU, cache_dir: str = str(tmp_path / "cache"), **settings: Any) -> LaunchPlan:
        plan = slurm_plan(str(tmp_path), device, **settings)
        assert plan.data is not None
        return plan.model_copy(update={"data": plan.data.model_copy(update={"cache_dir": cache_dir})})

    return planned


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Testbed], Testbed]:
    """Make this process use a testbed for its Slurm commands."""

    def choose(bed: Testbed) -> Testbed:
        for name, value in bed.variables.items():
            monkeypatch.setenv(name, value)
        return bed

    return choose


@pytest.fixture
def here(slurm: Testbed, use: Callable[[Testbed], Testbed]) -> Testbed:
    """The session's Slurm cluster, used by this process and repaired after the test."""
    return use(slurm)


@pytest.fixture
def eventually() -> Callable[[Callable[[], Any]], Any]:
    """Call a function until its result is true, and return the result."""

    def wait(check: Callable[[], Any]) -> Any:
        began = time.monotonic()
        while not (result := check()):
            assert time.monotonic() - began < WAIT_S * slowness(), f"no result within {time.monotonic() - began:.0f} s"
            time.sleep(0.1)
        return result

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
