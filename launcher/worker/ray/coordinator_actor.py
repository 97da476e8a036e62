"""The coordinator as an actor of Ray, which the driver starts, asks, and replaces where its process is lost."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher import run_store
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.tracking.jsonl import append_event
from launcher.worker.ray.coordinator import Coordinator
from launcher.worker.ray.messages import CoordinatorState

_CALL_S = 30.0
# How long storage that does not answer now is waited for before another is started.
_STORAGE_S = 600.0
# Lost one after the other without workers between them: then it is no accident. Where workers come, the run's budgets count.
_MOST_LOST = 20
# Characters of Ray's own words that a run's state holds; all of them are in the log.
_MOST_SAID = 400


class CoordinatorActor:
    """On the driver's node, for workers by its `handle`. One that dies, as where memory runs short, is followed by another, which
    judges the attempt before by what is on disk; `is_lost` until that has answered.

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
        # The driver and the thread that waits for Ray Train both ask.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Raises what Ray raises."""
        import ray

        here, job = ray.get_runtime_context().get_node_id(), f"{os.uname().nodename}:{os.getpid()}"
        actor = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(Coordinator)
        self.handle = actor.remote(self._plan_path, self._number, job, self._draining_nodes, self._lost_nodes)
        ray.get(self.handle.set_environment.remote(self._environment), timeout=_CALL_S)

    def state(self) -> CoordinatorState | None:
        """Return the coordinator's state; None where it is busy, as with slow storage, or has just been replaced."""
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
        """Start another; what is out of reach for now is tried again at the next look."""
        from ray.exceptions import RayError

        self._lost_at = min(self._lost_at, time.monotonic())
        if self._num_lost >= _MOST_LOST:
            raise error
        try:
            self._number = self._newest_own()
        except (OSError, LauncherError):
            if time.monotonic() - self._lost_at > _STORAGE_S:
                raise error from None
            return
        self._num_lost += 1
        print(error, file=sys.stderr, flush=True)
        said = "the run's coordinator was killed or has ended: another replaces it, and the run begins again"
        with suppress(OSError):
            append_event(self._run, self._number, "alert", said)
        with suppress(OSError, LauncherError):
            if run_store.read_status(self._run).state in RUNNING_STATES:
                message = "its coordinator was lost; it waits for workers"
                run_store.update_status(self._run, state="pending", message=message)
        # This one may die too.
        with suppress(RayError):
            self.start()

    def _newest_own(self) -> int:
        """The newest attempt of this driver's: one that another command has started since is not taken over."""
        number = self._number
        while self._run.attempt(number + 1).exists() and run_store.read_attempt(self._run, number + 1).automatic:
            number += 1
        return number


def deaths() -> tuple[type[Exception], ...]:
    """What Ray raises of an actor whose process has ended: the second where Ray's memory monitor has killed it."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    return ActorDiedError, OutOfMemoryError


def in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST_SAID] or type(error).__name__
