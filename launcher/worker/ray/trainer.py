"""Ray Train, as it is asked for the workers of a run."""

from __future__ import annotations

from typing import Any

from launcher.config.ray import RaySection
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.ray.rank_supervisor import supervise


def import_ray_train() -> None:
    """Import what `trainer` needs."""
    import ray.train
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401


def trainer(plan: LaunchPlan, run: RunDir, name: str, coordinator: Any) -> Any:
    """Whose `fit` places the workers and starts others for those that are lost, until `coordinator` has them end."""
    from ray.train import BackendConfig, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class OfRanks(Backend):
        """The ranks set up the process group themselves; of their node's GPUs each sees all."""

        share_cuda_visible_devices = True

    class OfRanksConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return OfRanks

    section, workers = RaySection.of(plan.config.cluster), plan.topology.world_size
    resources = section.resources(plan.topology.device)
    elastic = section.min_workers is not None and section.min_workers < workers
    scaling: dict[str, Any] = {
        "num_workers": (section.min_workers, workers) if elastic else workers,
        "use_gpu": "GPU" in resources,
        "resources_per_worker": resources,
        "accelerator_type": section.accelerator_type,
        "label_selector": section.label_selector or None,
    }
    if section.placement_strategy is not None:
        scaling["placement_strategy"] = section.placement_strategy
    if section.resize_seconds is not None:
        scaling["elastic_resize_monitor_interval_s"] = section.resize_seconds
    grace_s = plan.config.cluster.stop_grace_seconds
    callbacks: list[Any] = []
    if elastic:
        from launcher.worker.ray.resizing import SaveBeforeResize

        callbacks.append(SaveBeforeResize(coordinator, grace_s))
    return DataParallelTrainer(
        supervise,
        train_loop_config={"coordinator": coordinator, "interface": section.interface},
        backend_config=OfRanksConfig(),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name,
            callbacks=callbacks,
            storage_path=section.storage_path or str(run.root / "ray"),
            # The coordinator ends what is to end: its workers then return as if all were done.
            failure_config=FailureConfig(
                max_failures=-1,
                controller_failure_limit=-1,
                max_preemption_failures=-1,
                preemption_grace_s=grace_s,
            ),
            # Ray Train removes none; the run's own settings say which are kept.
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
