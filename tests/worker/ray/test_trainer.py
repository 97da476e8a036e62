"""What the driver of a run on Ray passes to Ray Train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import CPU, H100

from launcher.config.sections.ray import RaySection
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.ray.trainer import RESIZE_VARIABLE, build_trainer


@pytest.mark.parametrize(
    "device, settings",
    [
        (CPU, {}),
        (CPU, {"resources_per_worker": {"memory": 1e9}}),
        (H100, {}),
        (H100, {"resources_per_worker": {"CPU": 8.0}}),
    ],
)
def test_workers_get_what_ray_train_gives_by_default(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, device: DeviceFacts, settings: dict[str, Any]
) -> None:
    """The plan lists each worker's resources in full; they must equal what Ray Train derives from the settings alone."""
    from ray.train import ScalingConfig

    plan = ray_plan(device=device, workers=4, **settings)
    gpus = device is H100
    by_ray = ScalingConfig(num_workers=4, use_gpu=gpus, resources_per_worker=settings.get("resources_per_worker"))
    wanted = by_ray._resources_per_worker_not_none
    asked = build_trainer(plan, RunDir(tmp_path), "attempt-001", None).scaling_config
    assert RaySection.of(plan.config.cluster).resources(device.kind) == wanted
    assert (asked._resources_per_worker_not_none, asked.use_gpu, asked.num_workers) == (wanted, gpus, 4)


def test_the_settings_of_placement_reach_ray_train(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESIZE_VARIABLE, "5")
    settings = {"accelerator_type": "H100", "stop_grace_seconds": 90.0}
    elastic = ray_plan(device=H100, workers=4, min_workers=2, **settings)
    trainer = build_trainer(elastic, RunDir(tmp_path), "attempt-001", None)
    scaling, running = trainer.scaling_config, trainer.run_config
    assert scaling.num_workers == (2, 4)
    assert scaling.accelerator_type == "H100"
    assert scaling.elastic_resize_monitor_interval_s == 5.0
    assert running.failure_config.preemption_grace_s == 90.0
    spot = ray_plan(device=H100, workers=4, label_selector={"ray.io/market-type": "spot"})
    trainer = build_trainer(spot, RunDir(tmp_path), "attempt-001", None)
    assert trainer.scaling_config.label_selector == {"ray.io/market-type": "spot"}
    assert trainer.run_config.storage_path == str(tmp_path / "ray")


@pytest.mark.parametrize("address", [None, "head:6379"])
def test_ray_train_starts_only_processes_that_the_run_uses(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, address: str | None
) -> None:
    """Without datasets, and without other jobs on the cluster, Ray Train has no use for some of its processes."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = build_trainer(ray_plan(address=address, workers=4), RunDir(tmp_path), "attempt-001", None)
    by_default = {type(callback).__name__ for callback in DataParallelTrainer._create_default_callbacks(trainer)}
    left_out = by_default - {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert left_out == {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if address is None else set())
