"""The driver of a run on Ray: `python -m launcher.worker.ray.driver PLAN ATTEMPT`.

It starts or joins Ray, uses Ray Train to place the workers, and stays until the run has ended, however many groups of workers
that takes. Nothing here imports torch. Ray Train itself would restart workers forever; the coordinator decides on restarts, by
the retry budgets that apply on every backend.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import json_records, run_store
from launcher.clusters import detached_process
from launcher.clusters.ray.cluster import JOINING
from launcher.config.sections.ray import RaySection
from launcher.errors import EXIT_FAILED, LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, CancelRequest
from launcher.worker.ray.attempts import record_end, retry
from launcher.worker.ray.connection import (
    RAYLET_LOST,
    LocalRaylet,
    connected,
    raylet_of_this_node,
    remove_placement_groups,
)
from launcher.worker.ray.coordinator import CALL_S, CoordinatorActor, RayletLost, shorten
from launcher.worker.ray.messages import CoordinatorState, ResizeProgress
from launcher.worker.ray.rank_supervisor import supervise
from launcher.worker.wandb_closing import close_wandb_run

# Seconds between checks for more workers in an elastic run, for tests; Ray's default is 60.
RESIZE_VARIABLE = "LAUNCHER_RAY_RESIZE_SECONDS"
_ALIVE_EVERY_S = 5.0
_LOOK_S = 0.2
_STATE_EVERY_S = 1.0
# How long workers may take to return when the run is over.
_OVER_DEADLINE_S = 120.0
_EXIT_CANCELLED = 130
_MAX_CONTROLLERS = 20
# The first and the longest wait before Ray Train is started again: its error, such as a full disk, may persist.
_RESTART_S, _MAX_RESTART_S = 0.5, 10.0
# Variables that hold keys or their locations; they reach the ranks only through memory.
_SECRETS = (
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "HF_TOKEN", "HF_ENDPOINT"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"),
    *(
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
    ),
)


def main(plan_path: str, attempt: int) -> int:
    """Run one attempt and its automatic successors; returns the exit code."""
    # As in a batch job: only the run's user can access what it writes.
    os.umask(0o077)
    try:
        plan = LaunchPlan.load(plan_path)
        run = RunDir(Path(plan.run_dir))
        run_store.update_status(
            run, state="pending", attempt=attempt, job=detached_process.describe_this_process(), message=JOINING
        )
    except OSError as error:
        # The run's status cannot hold this message.
        print(f"{os.uname().nodename} does not see the run directory, or may not write there: {error}", file=sys.stderr)
        return EXIT_FAILED
    driver = _Driver(plan, plan_path, run, attempt)
    try:
        return driver.run()
    except Exception as error:
        # At the start: no cluster, a wrong token, or a different version. Later: a lost connection.
        problem = "the driver lost Ray" if driver.has_begun else "Ray cannot be used"
        driver.end("failed", str(error) if isinstance(error, RayletLost) else f"{problem}: {shorten(error)}")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        with suppress(OSError, LauncherError):
            number = run_store.newest_attempt(run)
            close_wandb_run(plan, plan_path, run, number)


class _CancelSignals:
    """Turns signals into the same cancel.json that the `cancel` verb writes; the coordinator and the driver look for it."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._num_received = self._num_written = 0

    def install(self) -> None:
        """Install the handlers; call it again after Ray has started, because Ray installs its own."""

        def receive(*_: object) -> None:
            self._num_received += 1

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, receive)

    def write(self) -> None:
        """Write the request: the first signal asks for a save, further ones for an immediate end."""
        if self._num_written < self._num_received:
            file = self._run.cancel(run_store.newest_attempt(self._run))
            json_records.write(file, CancelRequest(time.time(), save=self._num_received == 1 and not file.is_file()))
            self._num_written = self._num_received


class _Driver:
    def __init__(self, plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int) -> None:
        self._plan, self._plan_path, self._run, self._attempt = plan, plan_path, run, attempt
        self._section = RaySection.of(plan.config.cluster)
        self._cancel_signals = _CancelSignals(run)
        # The newest attempt of this driver.
        self._number = attempt
        self._failure: Exception | None = None
        self._raylet: LocalRaylet | None = None
        # Whether any workers have started since this driver started.
        self.has_begun = False

    def run(self) -> int:
        self._cancel_signals.install()
        with connected(self._plan, self._run):
            self._cancel_signals.install()
            raylet = self._raylet = raylet_of_this_node()
            if raylet is None:
                raise RunError("the connection was closed as soon as it was made", remedy="see Ray's own logs on this node")
            job = detached_process.describe_this_process()
            run_store.update_status(self._run, state="pending", job=job, message="waiting for workers")
            environment = {name: os.environ[name] for name in _SECRETS if name in os.environ}
            coordinator = CoordinatorActor(self._plan_path, self._run, self._attempt, environment)
            try:
                # This takes as long as the coordinator's start.
                threading.Thread(target=import_ray_train, name="import", daemon=True).start()
                coordinator.start()
                # In a separate thread, Ray Train does not handle SIGINT.
                fit = threading.Thread(target=self._fit, args=(coordinator,), name="fit", daemon=True)
                fit.start()
                self._watch(fit, coordinator)
            except Exception as error:
                # Ray reports it through different errors, depending on the call.
                if raylet.has_ended:
                    raise RayletLost(RAYLET_LOST) from error
                raise
        state = retry(lambda: run_store.read_status(self._run)).state
        return 0 if state == "completed" else _EXIT_CANCELLED if state in ("cancelled", "preempted") else EXIT_FAILED

    def _fit(self, coordinator: CoordinatorActor) -> None:
        """Run Ray Train until the run has ended.

        Ray Train's controller can end for reasons unrelated to the run, such as a full disk when it writes its own state. Another
        controller then replaces it, and the workers that it lost count as an attempt in the run's budgets. Workers whose
        coordinator has died also end the controller, and start again with the next coordinator.
        """
        for number in range(_MAX_CONTROLLERS):
            name = f"attempt-{self._attempt:03d}" + (f"-{number}" if number else "")
            handle = coordinator.handle
            try:
                build_trainer(self._plan, self._run, name, handle).fit()
                failed = False
            except Exception as error:
                failed, self._failure = True, error
                traceback.print_exception(error)
            try:
                state = coordinator.state()
                if not (failed or coordinator.is_lost or coordinator.handle is not handle):
                    return
                if state is not None and state.over is not None:
                    return
                if self._section.address is None:
                    remove_placement_groups()
                time.sleep(min(_RESTART_S * 2**number, _MAX_RESTART_S))
                while coordinator.is_lost:
                    coordinator.state()
                    time.sleep(_STATE_EVERY_S)
            except Exception:
                # Ray itself has ended, along with the coordinator.
                return

    def _watch(self, fit: threading.Thread, coordinator: CoordinatorActor) -> None:
        """Watch until the run ends, is cancelled while it waits, or gets no workers in time."""
        alive_at = asked_at = 0.0
        over_at: float | None = None
        state = CoordinatorState(self._number, idle_s=0.0)
        while fit.is_alive():
            now = time.monotonic()
            # A full or slow disk is no reason to end training.
            with suppress(OSError, LauncherError):
                self._cancel_signals.write()
                if now - alive_at > _ALIVE_EVERY_S:
                    alive_at = now
                    detached_process.write_liveness(self._run)
            if state.over is None and now - asked_at > _STATE_EVERY_S:
                asked_at = now
                if (answer := coordinator.state()) is not None:
                    state = answer
                    self.has_begun |= not answer.idle_s
                self._number = state.number
            if state.over is not None:
                over_at = over_at or now
                if now - over_at > _OVER_DEADLINE_S:
                    # Every worker has its orders; a hung worker does not change how the run has ended.
                    return
            elif state.idle_s:
                # If storage does not answer, the next look retries.
                with suppress(OSError):
                    if self._run.cancel(self._number).is_file():
                        return self.end("cancelled", "cancelled while it waited for workers")
                if state.idle_s > self._section.placement_minutes * 60:
                    return self.end("failed", self._describe_missing_workers(state.idle_s, state.early_failure))
            fit.join(_LOOK_S)
        if retry(lambda: run_store.read_status(self._run)).state in RUNNING_STATES:
            reason = "its workers ended and left no record" if self._failure is None else shorten(self._failure)
            # Ray Train may notice a lost raylet before the coordinator is asked again.
            lost = self._raylet is not None and self._raylet.has_ended
            self.end("failed", RAYLET_LOST if lost else f"Ray Train ended the run: {reason}")
        return None

    def end(self, state: str, message: str) -> None:
        """Record how the run ended, unless that is already recorded or another command has restarted the run.

        If the run failed after it had begun, the message says how to continue it.
        """
        if state == "failed" and self.has_begun:
            message += f"; {detached_process.resume_hint(self._run)}"
        print(message, file=sys.stderr if state == "failed" else sys.stdout, flush=True)
        record_end(self._run, self._number, state, message)

    def _describe_missing_workers(self, waited_s: float, early_failure: str) -> str:
        """`early_failure` is the message of the last worker that could not start."""
        import ray

        if early_failure:
            limit = f"within {waited_s / 60:.1f} minutes (cluster.placement_minutes)"
            return f"the workers that Ray started {limit} could not start their ranks: {early_failure}"
        section, requested = self._section, self._section.resources(self._plan.topology.device)

        def describe(resources: Mapping[str, float]) -> str:
            return ", ".join(f"{name}: {resources.get(name, 0):g}" for name in requested)

        num_nodes = sum(node["Alive"] for node in ray.nodes())
        return (
            f"the cluster did not provide the workers within {waited_s / 60:.1f} minutes (cluster.placement_minutes): asked for "
            f"{section.min_workers or self._plan.topology.world_size} workers with {describe(requested)} each; it has "
            f"{describe(ray.cluster_resources())} on {format_count(num_nodes, 'node')}, of these free: "
            f"{describe(ray.available_resources())}"
        )


def import_ray_train() -> None:
    """Import what `build_trainer` needs, which takes seconds."""
    import ray.train
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401


def build_trainer(plan: LaunchPlan, run: RunDir, name: str, coordinator: Any) -> Any:
    """Build the trainer whose `fit` places workers and replaces lost ones until `coordinator` ends them."""
    from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    section = RaySection.of(plan.config.cluster)

    class RankBackend(Backend):
        """Leaves the process group to the ranks; each sees all GPUs of its node."""

        share_cuda_visible_devices = True

    class RankBackendConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return RankBackend

    # Ray Train's processes that the run does not use; each takes seconds of CPU time. The first reads datasets. The second
    # removes the placement group of a controller that was killed: it works only with a dashboard, and the driver does it for a
    # Ray of its own.
    unused = {"DatasetsCallback", *(("PlacementGroupCleanerCallback",) if section.address is None else ())}

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in unused]

    workers = plan.topology.world_size
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
    return Trainer(
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
            progress: ResizeProgress = ray.get(coordinator.prepare_resize.remote(), timeout=CALL_S)
            return progress
        return None

    class SaveBeforeResize(ControllerCallback):
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            """Only healthy workers are resized; after a failure the state is different."""
            if not isinstance(current_state, ResizingState):
                return
            # Wait until the ranks have ended, or have not been writing for `grace_s`: the time of a save or an export grows with
            # the model.
            until = time.monotonic() + grace_s
            while (progress := ask()) is not ResizeProgress.ENDED and time.monotonic() < until:
                if progress is ResizeProgress.WRITING:
                    until = time.monotonic() + grace_s
                time.sleep(_LOOK_S)

    return SaveBeforeResize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
