"""The coordinator as a Ray actor. The driver starts it, polls it, and replaces it if its process is lost; the workers call it."""

from __future__ import annotations

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
from launcher.worker.ray.attempts import newest_own_attempt
from launcher.worker.ray.connection import RAYLET_LOST, raylet_of_this_node
from launcher.worker.ray.coordinator import Coordinator
from launcher.worker.ray.messages import CoordinatorState

_CALL_S = 30.0
# A worker repeats a call after this time, well before it counts as silent.
WORKER_CALL_S = 20.0
_PATIENCE_S = 900.0
_POLL_S = 0.2
# Consecutive losses without workers in between. With more, the failure is not transient. Once workers come, the run's budgets
# apply.
_MAX_LOST = 20
# Maximum characters of a Ray error in a run's status; the log has the full message.
_MAX_MESSAGE_CHARS = 400


class RayletLost(Exception):
    """The raylet on the driver's node has ended, and with it everything that Ray ran there; the message says so."""


class CoordinatorLost(Exception):
    """The coordinator's process has ended."""


class CoordinatorProcess(Coordinator):
    """The coordinator in its own process: only the run's user can access what it writes, whatever Ray's umask."""

    def __init__(self, *arguments: Any) -> None:
        os.umask(0o077)
        super().__init__(*arguments)


class CoordinatorActor:
    """Runs on the driver's node; workers call it through its `handle`.

    An actor that dies, for example for lack of memory, is replaced by another, which judges the previous attempt from the records
    on disk. `is_lost` is true until the replacement has answered.

    `attempt` is the driver's first attempt; `environment` holds the ranks' environment variables.
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
        self.is_lost = False
        # The driver and the thread that waits for Ray Train both call `state`.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the actor; raises what Ray raises."""
        import ray

        here, job = ray.get_runtime_context().get_node_id(), f"{os.uname().nodename}:{os.getpid()}"
        actor = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(CoordinatorProcess)
        self.handle = actor.remote(self._plan_path, self._number, job, self._draining_nodes, self._lost_nodes)
        ray.get(self.handle.set_environment.remote(self._environment), timeout=_CALL_S)

    def state(self) -> CoordinatorState | None:
        """Return the coordinator's state, or None if it is busy (for example with slow storage) or has just been replaced."""
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
            self._number, self.is_lost = state.number, False
            if not state.idle_s:
                self._num_lost = 0
            return state

    def _replace(self, error: Exception) -> None:
        """Start another actor; if storage is unreadable right now, the next call retries.

        Raises:
            RayletLost: if no actor can be started on this node any more.
        """
        from ray.exceptions import RayError

        if (raylet := raylet_of_this_node()) is not None and raylet.has_ended:
            raise RayletLost(RAYLET_LOST)
        self.is_lost = True
        if self._num_lost >= _MAX_LOST:
            raise error
        try:
            self._number = newest_own_attempt(self._run, self._number)
        except (OSError, LauncherError):
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
    """Call the coordinator from a worker; retry for a while if it is busy or unreachable.

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
    """Return what Ray raises for an actor whose process has ended; the second is for a kill by Ray's memory monitor."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    return ActorDiedError, OutOfMemoryError


def shorten(error: Exception) -> str:
    """Return a Ray error's message as one line of limited length."""
    return " ".join(str(error).split())[:_MAX_MESSAGE_CHARS] or type(error).__name__
