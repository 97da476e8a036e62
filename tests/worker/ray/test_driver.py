"""The driver of a run on Ray: what it passes to Ray Train, signals, failures of Ray and Ray Train, and evaluations."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hand_made
import pytest
from forked import require_exit
from pace import slowness
from plan_fixtures import CPU, H100, PlanOf
from unusual_files import as_root

import launcher
from launcher import json_records, run_store
from launcher.config.sections.ray import RaySection
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.jsonl import read_events
from launcher.worker.ray import coordinator as coordinator_module
from launcher.worker.ray import driver
from launcher.worker.ray.connection import LocalRaylet
from launcher.worker.ray.driver import RESIZE_VARIABLE, build_trainer
from launcher.worker.ray.messages import CoordinatorState

__all__ = ["as_root"]
REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restore what the driver changes in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before, umask = {number: signal.getsignal(number) for number in numbers}, os.umask(0o077)
    yield
    os.umask(umask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("own_signals")
def test_the_first_signal_to_the_driver_asks_for_a_save_and_the_second_for_an_end(
    ray_plan: PlanOf, tmp_path: Path, number: signal.Signals
) -> None:
    run = hand_made.run(ray_plan(working_dir=str(tmp_path)), Attempt(None))
    asked = run.cancel(1)
    wishes = driver._CancelSignals(run)
    wishes.install()
    wishes.write()
    assert not asked.exists()
    for saves in (True, False):
        os.kill(os.getpid(), number)
        wishes.write()
        assert json_records.read_json(asked)["save"] is saves


@pytest.fixture
def run(ray_plan: PlanOf, tmp_path: Path) -> RunDir:
    """A run whose first attempt trains."""
    begun = Attempt(None, job="here:1", begun_at=time.time())
    return hand_made.run(ray_plan(working_dir=str(tmp_path)), begun, state="running")


def test_the_end_of_the_raylet_is_noticed_at_its_socket(tmp_path: Path) -> None:
    raylet = LocalRaylet(str(tmp_path / "raylet"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(raylet.socket_name)
        listening.listen()
        assert not raylet.has_ended
    assert raylet.has_ended, "its socket is a file that nobody listens to"


@pytest.mark.usefixtures("own_signals")
def test_a_connection_that_is_closed_at_once_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker

    assert worker._global_node is None, "no test has left a connection"
    monkeypatch.setattr(driver, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(driver, "close_wandb_run", lambda *_: None)
    assert driver.main(str(run.plan), 1) == 1
    assert run_store.read_status(run).message.startswith("Ray cannot be used: the connection was closed as soon as it was made")


def test_the_coordinator_writes_nothing_that_others_can_read(ray_plan: PlanOf, tmp_path: Path, own_signals: None) -> None:
    """Its process has the umask of the cluster's Ray."""
    run = hand_made.run(ray_plan(working_dir=str(tmp_path)), Attempt(None))
    os.umask(0o000)
    coordinator_module.CoordinatorProcess(str(run.plan), 1, "here:1", set, set).set_environment({})
    assert os.umask(0o077) == 0o077


class FakeCoordinator(coordinator_module.CoordinatorActor):
    """A coordinator in this process whose state is what `says` returns; `began_with` lists the attempts it was started for."""

    def __init__(self, run: RunDir, says: Callable[[], CoordinatorState]) -> None:
        super().__init__(str(run.plan), run, 1, {})
        self.says = says
        self.began_with = list[int]()
        self.start()

    def start(self) -> None:
        self.began_with.append(self._number)
        self.handle = SimpleNamespace(state=SimpleNamespace(remote=lambda: self.says))


@pytest.fixture
def rays_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda asked, timeout: asked())


def state(number: int = 1, idle_s: float = 0.0, early_failure: str = "") -> CoordinatorState:
    return CoordinatorState(number, idle_s, early_failure)


def raising(error: Exception) -> Callable[[], Any]:
    def ask() -> Any:
        raise error

    return ask


@pytest.mark.usefixtures("rays_answer")
def test_a_coordinator_that_dies_is_replaced_for_the_newest_attempt_of_this_driver(run: RunDir) -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

    coordinator = FakeCoordinator(run, state)
    assert coordinator.state() == state()
    for busy in (GetTimeoutError(), ActorUnavailableError("it is out of reach", None)):
        coordinator.says = raising(busy)
        assert coordinator.state() is None
    assert coordinator.began_with == [1], "it may live, and answer later"
    # The coordinator created the second attempt just before it died; a user has since started the third elsewhere.
    run_store.create_attempt(run, Attempt(resume_step=5, automatic=True))
    run_store.create_attempt(run, Attempt(resume_step=5))
    coordinator.says = raising(ActorDiedError())
    assert coordinator.state() is None
    assert coordinator.began_with == [1, 2]
    assert run_store.read_status(run).state == "pending"
    (event,) = read_events(run.events)
    assert event["kind"] == "alert"
    assert "the run's coordinator was killed or has ended: another replaces it" in event["text"]
    assert coordinator.is_lost
    coordinator.says = lambda: state(number=2)
    assert coordinator.state() == state(number=2)
    assert not coordinator.is_lost


@pytest.mark.usefixtures("rays_answer")
def test_coordinators_that_die_one_after_the_other_end_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    monkeypatch.setattr(coordinator_module, "_MAX_LOST", 3)
    coordinator = FakeCoordinator(run, state)
    for death in (ActorDiedError(), OutOfMemoryError("killed by Ray's memory monitor")):
        coordinator.says = raising(death)
        assert [coordinator.state() for _ in range(3)] == [None] * 3
        coordinator.says = state
        assert coordinator.state() == state(), "workers are there: the run's own budgets count"
    coordinator.says = raising(ActorDiedError())
    assert [coordinator.state() for _ in range(3)] == [None] * 3
    with pytest.raises(ActorDiedError):
        coordinator.state()


@pytest.mark.usefixtures("rays_answer")
def test_ray_train_restarts_with_the_replacement_coordinator(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that lost their coordinator return as if they had finished."""
    from ray.exceptions import ActorDiedError

    monkeypatch.setattr(driver, "_RESTART_S", 0.0)
    monkeypatch.setattr(driver, "_STATE_EVERY_S", 0.0)
    coordinator = FakeCoordinator(run, state)
    deaths = iter([ActorDiedError(), None])
    asked: list[Any] = []

    def fit(handle: Any) -> None:
        asked.append(handle)
        death = next(deaths)
        answers = iter([raising(death)] if death else [])
        coordinator.says = lambda: next(answers, state)()

    removed: list[int] = []
    monkeypatch.setattr(driver, "remove_placement_groups", lambda: removed.append(len(asked)))
    monkeypatch.setattr(driver, "build_trainer", lambda *given: SimpleNamespace(fit=lambda: fit(given[-1])))
    driver_of(run)._fit(coordinator)
    assert len(asked) == 2
    assert removed == [1], "what the lost controller had reserved"
    assert asked[0] is not asked[1] is coordinator.handle


class Fitting:
    """The thread that waits for Ray Train; it is alive for `looks` checks."""

    def __init__(self, looks: float = float("inf")) -> None:
        self._looks = looks

    def is_alive(self) -> bool:
        self._looks -= 1
        return self._looks >= 0

    def join(self, timeout: float) -> None:
        """Return at once, as if the time had passed."""


def driver_of(run: RunDir) -> Any:
    return driver._Driver(LaunchPlan.load(run.plan), str(run.plan), run, 1)


@pytest.mark.usefixtures("rays_answer")
def test_the_loss_of_ray_is_reported_with_the_way_to_continue(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "close_wandb_run", lambda *_: None)
    begun = True

    def lose(itself: Any) -> int:
        itself.has_begun = begun
        raise RuntimeError("The connection\n to the head is lost")

    monkeypatch.setattr(driver._Driver, "run", lose)
    way_on = f"continue with: python -m launcher resume {run.root}"

    def said(end: Callable[[], object]) -> str:
        run_store.update_status(run, state="running")
        end()
        status = run_store.read_status(run)
        assert status.state == "failed"
        return status.message

    assert said(lambda: driver.main(str(run.plan), 1)) == f"the driver lost Ray: The connection to the head is lost; {way_on}"
    ended = said(lambda: driver_of(run)._watch(Fitting(1), FakeCoordinator(run, state)))
    assert ended == f"Ray Train ended the run: its workers ended and left no record; {way_on}"
    begun = False
    assert said(lambda: driver.main(str(run.plan), 1)) == "Ray cannot be used: The connection to the head is lost"


@pytest.mark.usefixtures("rays_answer")
def test_missing_workers_are_reported_with_total_and_free_resources(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "memory": 1e9})
    monkeypatch.setattr("ray.available_resources", lambda: {"memory": 1e9})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    driver_of(run)._watch(Fitting(), FakeCoordinator(run, lambda: state(idle_s=1900.0)))
    asked = "asked for 2 workers with CPU: 1 each; it has CPU: 16 on 2 nodes, of these free: CPU: 0"
    assert run_store.read_status(run).message.endswith(asked)


@pytest.mark.usefixtures("rays_answer")
def test_workers_that_could_not_start_are_not_reported_as_missing(run: RunDir) -> None:
    driver_of(run)._watch(Fitting(), FakeCoordinator(run, lambda: state(idle_s=1900.0, early_failure="n2: no interface ib0")))
    assert run_store.read_status(run).message.endswith("could not start their ranks: n2: no interface ib0")


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
    ray_plan: PlanOf, tmp_path: Path, device: DeviceFacts, settings: dict[str, Any]
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


def test_the_settings_of_placement_reach_ray_train(ray_plan: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_ray_train_starts_only_processes_that_the_run_uses(ray_plan: PlanOf, tmp_path: Path, address: str | None) -> None:
    """Without datasets, and without other jobs on the cluster, Ray Train has no use for some of its processes."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = build_trainer(ray_plan(address=address, workers=4), RunDir(tmp_path), "attempt-001", None)
    by_default = {type(callback).__name__ for callback in DataParallelTrainer._create_default_callbacks(trainer)}
    left_out = by_default - {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert left_out == {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if address is None else set())


def test_no_driver_gives_its_working_directory_to_workers() -> None:
    """Unless told otherwise, Ray puts the working directory first in the workers' sys.path."""
    files = Path(launcher.__file__).parent.rglob("*.py")
    calls = [
        (file.name, {keyword.arg for keyword in node.keywords})
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    assert len(calls) > 2
    assert [name for name, keywords in calls if "job_config" not in keywords] == []


# Runs in a process of its own: Ray reads its variables once per process, and other tests use a Ray with a token.
WAITING = """
import math, sys
import ray
from ray.util.placement_group import placement_group
from launcher.worker.ray import connection, node_tasks

slowness = float(sys.argv[1])
ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
try:
    node_tasks._RECOUNT_S = 1
    assert len(node_tasks.task_options(ray, 1, 60.0 * slowness)) == 1
    # At first, Ray still counts the GPU that has just been reserved.
    count, old = ray.available_resources, [{"GPU": 2.0}]
    ray.available_resources = lambda: old.pop() if old else count()
    (second,) = node_tasks.task_options(ray, None, 60.0 * slowness)
    code = ray.remote(lambda: 7).options(**second).remote()
    assert ray.get(code, timeout=120 * slowness) == 7
    assert node_tasks.task_options(ray, None, 1.0) == [], "both GPUs are reserved"
    assert node_tasks.task_options(ray, None, 1.0, gpus_per_task=2) == []
    assert not placement_group([{"GPU": 1}]).wait(0.1)
    connection.remove_placement_groups()
    assert placement_group([{"GPU": 2}]).wait(math.ceil(60 * slowness))
finally:
    ray.shutdown()
"""


@pytest.mark.rest
@pytest.mark.ray
def test_an_evaluation_waits_for_gpus_only_as_long_as_it_may() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_gcs_server_port_wait_time_s": "120",
    }
    command = [sys.executable, "-c", WAITING, str(slowness())]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPO, timeout=240 * slowness())
    require_exit(done)
