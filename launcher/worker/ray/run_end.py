"""Records how a run on Ray ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from launcher import run_store
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.tracking.jsonl import append_event

T = TypeVar("T")

# How long and how often to retry a read while storage does not answer.
_STORAGE_S, _RETRY_S = 600.0, 1.0


def retry(read: Callable[[], T]) -> T:
    """Call `read`; retry for a while if storage does not answer.

    Raises:
        OSError: the last error.
    """
    return Retrying(
        retry=retry_if_exception_type(OSError),
        stop=stop_after_delay(_STORAGE_S),
        wait=wait_fixed(_RETRY_S),
        reraise=True,
    )(read)


def record_end(run: RunDir, attempt: int, state: str, message: str) -> None:
    """Write the state of a run, preceded by an alert for a failure, unless the state is final or another command has restarted
    the run.
    """

    def write() -> None:
        run_store.fence(run, attempt, refresh=True)
        if run_store.read_status(run).state not in RUNNING_STATES:
            return
        with suppress(OSError):
            if state == "failed":
                append_event(run, attempt, "alert", f"the run ends: {message}")
        run_store.update_status(run, state=state, message=message)

    with suppress(OSError, LauncherError):
        retry(write)


def newest_own_attempt(run: RunDir, attempt: int) -> int:
    """Return the newest attempt of the driver whose first attempt was `attempt`.

    An attempt that another command has started since is not taken over.
    """
    while run.attempt(attempt + 1).exists() and run_store.read_attempt(run, attempt + 1).automatic:
        attempt += 1
    return attempt
