"""Turns a cancel request in the run directory, written on any machine, into the signals that a person would send to an agent."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, run_records
from launcher.worker.signals import CANCEL

_LOOK_S = 1.0
_CANCEL_GAP_S = 0.3


def watch_for_cancel(run: RunDir, attempt: int) -> threading.Event:
    """Send this process CANCEL once the attempt is to save and stop, and a second time once it is to stop without saving.

    A thread looks for the request until the returned event is set. The process must block CANCEL, as `Stopper.install` does.
    """
    ended = threading.Event()

    def watch() -> None:
        num_sent = 0
        while not ended.wait(_LOOK_S):
            # Storage may fail for a while.
            with suppress(OSError, LauncherError):
                atomic_files.refresh_directory(run.attempt(attempt))
                request = run_records.read_cancel(run, attempt)
                wanted = 0 if request is None else 1 if request.save else 2
                while num_sent < wanted:
                    # Two identical signals that are pending at the same time are delivered as one.
                    while num_sent and CANCEL in signal.sigpending():
                        time.sleep(_CANCEL_GAP_S)
                    os.kill(os.getpid(), CANCEL)
                    num_sent += 1

    threading.Thread(target=watch, name="cancel-watch", daemon=True).start()
    return ended
