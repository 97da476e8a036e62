"""How the driver of a run on Ray handles signals and the failures of Ray and Ray Train."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hand_made
import pytest
from file_owners import as_root

from launcher import json_records, run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.jsonl import read_events
from launcher.worker.ray import coordinator_actor, driver
from launcher.worker.ray.connection import LocalRaylet
from launcher.worker.ray.messages import CoordinatorState

__all__ = ["as_root"]


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
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, number: signal.Signals
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
def run(ray_plan: Callable[..., LaunchPlan], tmp_path: Path) -> RunDir:
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


def test_the_coordinator_writes_nothing_that_others_can_read(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, own_signals: None
) -> None:
    """Its process has the umask of the cluster's Ray."""
    run = hand_made.run(ray_plan(working_dir=str(tmp_path)), Attempt(None))
    os.umask(0o000)
    coordinator_actor.CoordinatorProcess(str(run.plan), 1, "here:1", set, set).set_environment({})
    assert os.umask(0o077) == 0o077


class FakeCoordinator(coordinator_actor.CoordinatorActor):
    """A coordinator in this process whose state is what `says` returns; `began_with` lists the attempts it was started for."""

    def __init__(self, run: RunDir, says: Callable[[], CoordinatorState]) -> None:
        super().__init__(str(run.plan), run, 1, {}, set, set)
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

    monkeypatch.setattr(coordinator_actor, "_MAX_LOST", 3)
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
