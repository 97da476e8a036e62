"""The coordinator as an actor of Ray: the driver starts it and replaces it, workers find it by its name."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher import run_store
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_store import RUNNING_STATES
from launcher.tracking.jsonl import append_event
from launcher.worker.ray.coordinator import Coordinator

_CALL_S = 30.0
_FIND_S, _ASK_S = 60.0, 0.2
# Lost one after the other without workers between them: then it is no accident. Where workers come, the run's budgets count.
_MOST_LOST = 20
# Characters of Ray's own words that a run's state holds; all of them are in the log.
_MOST_SAID = 400


class CoordinatorActor:
    """On the driver's node. One that dies, as where memory runs short, is followed by another of the same name: its workers end,
    Ray Train starts the next ones, and these find the other, which judges the attempt before by what is on disk.

    `attempt` is the one that the driver begins with, `environment` what `Coordinator.entrust` takes.
    """

    def __init__(
        self,
        plan_path: str,
        run: RunDir,
        attempt: int,
        environment: dict[str, str],
        draining: Callable[[], set[str]],
        lost: Callable[[], set[str]],
    ) -> None:
        # Another driver of the run may use the same Ray.
        self.name = f"coordinator-{secrets.token_hex(8)}"
        self._plan_path, self._run, self._number = plan_path, run, attempt
        self._environment, self._draining, self._lost = environment, draining, lost
        self._handle: Any = None
        self._num_lost = 0
        # The driver and the thread that waits for Ray Train both ask.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Raises what Ray raises."""
        import ray

        here, job = ray.get_runtime_context().get_node_id(), f"{os.uname().nodename}:{os.getpid()}"
        actor = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here}, name=self.name)(Coordinator)
        self._handle = actor.remote(self._plan_path, self._number, job, self._draining, self._lost)
        ray.get(self._handle.entrust.remote(self._environment), timeout=_CALL_S)

    def state(self) -> dict[str, Any] | None:
        """What the coordinator says; None where it is busy, as with storage that is slow, or has just been replaced."""
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

        with self._lock:
            try:
                found: dict[str, Any] = ray.get(self._handle.state.remote(), timeout=_CALL_S)
            except (GetTimeoutError, ActorUnavailableError):
                return None
            except ActorDiedError as error:
                self._replace(error)
                return None
            self._number = found["number"]
            if not found["idle_s"]:
                self._num_lost = 0
            return found

    def _replace(self, error: Exception) -> None:
        """Start another; what is out of reach for now is tried again at the next look."""
        from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError

        if self._num_lost >= _MOST_LOST:
            raise error
        try:
            self._number = self._newest_own()
        except (OSError, LauncherError):
            return
        self._num_lost += 1
        said = f"the coordinator's process is gone, and another takes its place: {in_words(error)}"
        with suppress(OSError):
            append_event(self._run, self._number, "alert", said)
        with suppress(OSError, LauncherError):
            if run_store.read_status(self._run).state in RUNNING_STATES:
                message = "its coordinator was lost; it waits for workers"
                run_store.update_status(self._run, state="pending", message=message)
        # Of one that has just died Ray may still hold the name.
        with suppress(ActorAlreadyExistsError, GetTimeoutError, RayActorError):
            self.start()

    def _newest_own(self) -> int:
        """The newest attempt of this driver's: one that another command has started since is not taken over."""
        number = self._number
        while self._run.attempt(number + 1).exists() and run_store.read_attempt(self._run, number + 1).automatic:
            number += 1
        return number


def find(name: str) -> Any:
    """The coordinator that has a name now; after the loss of one it takes the driver a moment to start another."""
    import ray

    until = time.monotonic() + _FIND_S
    while True:
        try:
            return ray.get_actor(name)
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(_ASK_S)


def in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST_SAID] or type(error).__name__
