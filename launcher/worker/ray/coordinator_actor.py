"""The coordinator as a Ray actor: the driver starts and polls it and replaces one whose process is lost; the workers call it."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher import json_records, run_records, run_store
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, LostCoordinator
from launcher.tracking.jsonl import append_event
from launcher.worker.ray import raylet_loss
from launcher.worker.ray.connection import raylet_of_this_node
from launcher.worker.ray.coordinator import Coordinator
from launcher.worker.ray.messages import CoordinatorState
from launcher.worker.ray.run_end import newest_own_attempt

_CALL_S = 30.0
# A worker repeats a call after that, well before it counts as silent.
WORKER_CALL_S = 20.0
_PATIENCE_S = 900.0
_POLL_S = 0.2
# How long a replacement waits for storage that does not answer.
_STORAGE_S = 600.0
# Consecutive losses without workers between them; with more, the cause is no accident. Once workers come, the run's budgets
# count.
_MAX_LOST = 20
# Characters of a Ray error in a run's status; the log has all of them.
_MAX_MESSAGE_CHARS = 400


class RayletLost(Exception):
    """The raylet of the driver's node has ended, and with it everything that Ray ran there; the message says so."""


class CoordinatorLost(Exception):
    """The process of the coordinator has ended."""


class CoordinatorActor:
    """Runs on the driver's node; workers call it by its `handle`.

    An actor that dies, as for lack of memory, is replaced by another, which judges the previous attempt by the records on disk;
    `is_lost` until that one has answered.

    `attempt` is the one that the driver begins with, `environment` are the variables for the ranks.
    """

    def __init__(
        self,
        plan_path: str,
        run: RunDir,
        attempt: int,
        environment: dict[str, str],
        draining_nodes: Callable[[], set[str]],
        lost_nodes: Callable[[], set[str]],
    ) -> None:
        self.handle: Any = None
        self._plan_path, self._run, self._number = plan_path, run, attempt
        self._environment, self._draining_nodes, self._lost_nodes = environment, draining_nodes, lost_nodes
        self._num_lost = 0
        self._lost_at = math.inf
        # The driver and the thread that waits for Ray Train both call `state`.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the actor; raises what Ray raises."""
        import ray

        here, job = ray.get_runtime_context().get_node_id(), f"{os.uname().nodename}:{os.getpid()}"
        actor = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(Coordinator)
        self.handle = actor.remote(self._plan_path, self._number, job, self._draining_nodes, self._lost_nodes)
        ray.get(self.handle.set_environment.remote(self._environment), timeout=_CALL_S)

    def state(self) -> CoordinatorState | None:
        """Return the coordinator's state, or None if it is busy, as with slow storage, or has just been replaced."""
        import ray
        from ray.exceptions import ActorUnavailableError, GetTimeoutError

        with self._lock:
            try:
                state: CoordinatorState = ray.get(self.handle.state.remote(), timeout=_CALL_S)
            except (GetTimeoutError, ActorUnavailableError):
                return None
            except deaths() as error:
                self._replace(error)
                return None
            self._number, self._lost_at = state.number, math.inf
            if not state.idle_s:
                self._num_lost = 0
            return state

    @property
    def is_lost(self) -> bool:
        return self._lost_at < math.inf

    def _replace(self, error: Exception) -> None:
        """Start another actor; the next call retries where storage cannot be read now.

        Raises:
            RayletLost: if no actor can be started on this node any more.
        """
        from ray.exceptions import RayError

        if (raylet := raylet_of_this_node()) is not None and raylet.has_ended:
            raise RayletLost(raylet_loss.MESSAGE)
        self._lost_at = min(self._lost_at, time.monotonic())
        if self._num_lost >= _MAX_LOST:
            raise error
        try:
            self._number = newest_own_attempt(self._run, self._number)
        except (OSError, LauncherError):
            if time.monotonic() - self._lost_at > _STORAGE_S:
                raise error from None
            return
        self._num_lost += 1
        print(error, file=sys.stderr, flush=True)
        text = "the run's coordinator was killed or has ended: another replaces it, and the run restarts"
        with suppress(OSError):
            append_event(self._run, self._number, "alert", text)
        with suppress(OSError, LauncherError):
            json_records.write(run_records.lost_coordinator_file(self._run, self._number), LostCoordinator(time.time()))
        with suppress(OSError, LauncherError):
            if run_store.read_status(self._run).state in RUNNING_STATES:
                message = "the run's coordinator was killed or has ended; it waits for workers"
                run_store.update_status(self._run, state="pending", message=message)
        # The replacement may die too.
        with suppress(RayError):
            self.start()


def call_coordinator(handle: Any, method: str, *arguments: Any) -> Any:
    """Call the coordinator from a worker, again for a while where it is busy or cannot be reached.

    Raises:
        CoordinatorLost: if its process has ended.
    """
    import ray
    from ray.exceptions import ActorUnavailableError, GetTimeoutError

    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ray.get(getattr(handle, method).remote(*arguments), timeout=WORKER_CALL_S)
        except (GetTimeoutError, ActorUnavailableError):
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_S)
        except deaths():
            raise CoordinatorLost("the coordinator's process was killed or has ended") from None


def deaths() -> tuple[type[Exception], ...]:
    """Return what Ray raises for an actor whose process has ended; the second where Ray's memory monitor killed it."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    return ActorDiedError, OutOfMemoryError


def shorten(error: Exception) -> str:
    """Return the message of a Ray error on one line of limited length."""
    return " ".join(str(error).split())[:_MAX_MESSAGE_CHARS] or type(error).__name__
