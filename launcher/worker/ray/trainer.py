"""The trainer of Ray Train that provides the workers of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher.config.sections.ray import RaySection
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.ray.messages import ResizeProgress
from launcher.worker.ray.rank_supervisor import supervise

# Seconds between checks for more workers in an elastic run, for tests; Ray's default is 60.
RESIZE_VARIABLE = "LAUNCHER_RAY_RESIZE_SECONDS"
_CALL_S = 30.0
_POLL_S = 0.2


def import_ray_train() -> None:
    """Import what `build_trainer` needs."""
    import ray.train
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401


def build_trainer(plan: LaunchPlan, run: RunDir, name: str, coordinator: Any) -> Any:
    """Build the trainer whose `fit` places workers and replaces lost ones until `coordinator` ends them."""
    from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend

    class RankBackend(Backend):
        """Leaves the process group to the ranks; each sees all GPUs of its node."""

        share_cuda_visible_devices = True

    class RankBackendConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return RankBackend

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
    if seconds := os.environ.get(RESIZE_VARIABLE):
        scaling["elastic_resize_monitor_interval_s"] = float(seconds)
    grace_s = plan.config.cluster.stop_grace_seconds
    callbacks = [save_before_resize(coordinator, grace_s)] if elastic else []
    return _trainer_class(section.address is None)(
        supervise,
        train_loop_config={"coordinator": coordinator, "interface": section.interface},
        backend_config=RankBackendConfig(),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name,
            callbacks=callbacks,
            storage_path=str(run.root / "ray"),
            # The coordinator ends the run: its workers then return as if training were complete.
            failure_config=FailureConfig(
                max_failures=-1,
                controller_failure_limit=-1,
                max_preemption_failures=-1,
                preemption_grace_s=grace_s,
            ),
        ),
    )


def _trainer_class(alone: bool) -> Any:
    """Return a trainer class that leaves out Ray Train's processes that the run does not use; each takes seconds of CPU time.

    `alone` is true if no other job uses the cluster.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    # The first reads datasets. The second removes the placement group of a controller that was killed: it works only with a
    # dashboard, and the driver does it for a Ray of its own.
    unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"} if alone else {"DatasetsCallback"}

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in unused]

    return Trainer


def save_before_resize(coordinator: Any, grace_s: float) -> Any:
    """Return the callback that makes Ray Train's controller wait for the ranks to save before it replaces their workers.

    When there is room for more workers, Ray Train ends an elastic run's workers without notice.
    """
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import ResizingState

    def ask() -> ResizeProgress | None:
        # An exception in the controller would end the run, even if the coordinator is only busy with storage.
        with suppress(Exception):
            progress: ResizeProgress = ray.get(coordinator.prepare_resize.remote(), timeout=_CALL_S)
            return progress
        return None

    class SaveBeforeResize(ControllerCallback):
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            """Only healthy workers are resized; after a failure the state is different."""
            if isinstance(current_state, ResizingState):
                await_ranks(ask, grace_s)

    return SaveBeforeResize()


def await_ranks(ask: Callable[[], ResizeProgress | None], grace_s: float) -> None:
    """Wait until the ranks have ended, or have not been writing for `grace_s` seconds.

    `ask` returns their progress, None if unknown. The time of a save or an export grows with the model.
    """
    until = time.monotonic() + grace_s
    while (progress := ask()) is not ResizeProgress.ENDED and time.monotonic() < until:
        if progress is ResizeProgress.WRITING:
            until = time.monotonic() + grace_s
        time.sleep(_POLL_S)
