"""What submitit pickles: the plan's path, and how a task becomes the node's agent."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeTask:
    plan_path: str

    def __call__(self) -> None:
        """Become the agent of this node: the same process, without submitit's own handling of signals."""
        # Held back until the agent has handlers for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
        attempt = os.environ["LAUNCHER_ATTEMPT"]
        os.execv(sys.executable, [sys.executable, "-u", "-m", "launcher.worker.slurm.agent", self.plan_path, attempt])  # noqa: S606
