"""What the driver of a run on Ray hands to Ray and to Ray Train."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import CPU, H100

from launcher import run_store
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_store import Attempt
from launcher.worker.ray import driver


@pytest.mark.parametrize(
    "device, settings",
    [
        (CPU, {}),
        (CPU, {"resources_per_worker": {"memory": 1e9}}),
        (H100, {}),
        (H100, {"resources_per_worker": {"CPU": 8.0}}),
        (H100, {"gpus_per_worker": 0}),
    ],
)
def test_workers_get_what_ray_train_gives_by_default(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, device: DeviceFacts, settings: dict[str, Any]
) -> None:
    """The plan names in full what each worker gets; Ray Train, told of the settings alone, comes to the same."""
    from ray.train import ScalingConfig

    plan = ray_plan(device=device, workers=4, **settings)
    gpus = device is H100 and settings.get("gpus_per_worker") != 0
    by_ray = ScalingConfig(num_workers=4, use_gpu=gpus, resources_per_worker=settings.get("resources_per_worker"))
    wanted = by_ray._resources_per_worker_not_none
    asked = driver._trainer(plan, RunDir(tmp_path), "attempt-001", None).scaling_config
    assert plan.ray.resources(device.kind) == wanted
    assert (asked._resources_per_worker_not_none, asked.use_gpu, asked.num_workers) == (wanted, gpus, 4)
    assert by_ray.placement_strategy == asked.placement_strategy


def test_the_settings_of_placement_reach_ray_train(ray_plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    settings = {"accelerator_type": "H100", "placement_strategy": "SPREAD", "resize_seconds": 5.0, "stop_grace_seconds": 90.0}
    elastic = ray_plan(device=H100, workers=4, min_workers=2, storage_path="s3://bucket/ray", **settings)
    trainer = driver._trainer(elastic, RunDir(tmp_path), "attempt-001", None)
    scaling, running = trainer.scaling_config, trainer.run_config
    assert scaling.num_workers == (2, 4)
    assert (scaling.accelerator_type, scaling.placement_strategy) == ("H100", "SPREAD")
    assert scaling.elastic_resize_monitor_interval_s == 5.0
    assert running.storage_path == "s3://bucket/ray"
    assert running.failure_config.preemption_grace_s == 90.0
    spot = ray_plan(device=H100, workers=4, label_selector={"ray.io/market-type": "spot"})
    trainer = driver._trainer(spot, RunDir(tmp_path), "attempt-001", None)
    assert trainer.scaling_config.label_selector == {"ray.io/market-type": "spot"}
    assert trainer.run_config.storage_path == str(tmp_path / "ray")


@pytest.fixture
def own_signals() -> Iterator[None]:
    """What the driver does to its own process is taken back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("own_signals")
def test_a_signal_to_the_driver_asks_for_a_save_and_a_second_one_for_an_end(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, number: signal.Signals
) -> None:
    run = run_store.create(ray_plan(working_dir=str(tmp_path)))
    asked = run.cancel(run_store.next_attempt(run, Attempt(resume_step=None)))
    wishes = driver._Wishes(run)
    wishes.install()
    wishes.write()
    assert not asked.exists()
    for saves in (True, False):
        os.kill(os.getpid(), number)
        wishes.write()
        assert run_store.read_json(asked)["save"] is saves
