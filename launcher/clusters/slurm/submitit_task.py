"""The callable that submitit pickles: it turns a task into the node's agent."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeTask:
    """The task of one node."""

    plan_path: str

    def __call__(self) -> None:
        """Replace this process, and submitit's signal handlers, with the node's agent."""
        # The signals stay pending until the agent handles them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
        attempt = os.environ["LAUNCHER_ATTEMPT"]
        os.execv(sys.executable, [sys.executable, "-u", "-m", "launcher.worker.slurm.agent", self.plan_path, attempt])  # noqa: S606
