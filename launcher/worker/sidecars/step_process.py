"""A process that works on one checkpoint of a run during training; it ends with the process that starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.errors import printable
from launcher.worker.evaluation.end_with_parent import LAUNCHER

_STARTER = "launcher.worker.evaluation.end_with_parent"
# Seconds from TERM to KILL. An evaluation first ends its own processes. Two such waits are shorter than the agent's.
_END_S = 8.0
_TAIL_BYTES = 16_384
_REASON_LINES = 4


class StepProcess:
    """The process of one step; `log` is its output file."""

    def __init__(self, step: int, process: subprocess.Popen[bytes], log: Path, log_offset: int) -> None:
        self.step = step
        self._process, self._log, self._log_offset = process, log, log_offset

    @classmethod
    def start(cls, step: int, words: Sequence[str], log: Path, *, is_beside_training: bool, niceness: int = 0) -> StepProcess:
        """Start this Python interpreter with the arguments `words`; during training, with one thread and without GPUs.

        `niceness` is added to this process's own.
        """
        environ = dict(os.environ)
        # The ranks' thread settings, which divide a node's cores.
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            environ.pop(name, None)
        if is_beside_training:
            environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", _STARTER, LAUNCHER, str(niceness), *words]
        with open(log, "ab") as output:
            offset = output.tell()
            process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        return cls(step, process, log, offset)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def failure(self) -> str:
        """Return why the process failed, from the last lines of its output; empty if it did not fail."""
        code = self._process.returncode
        if not code:
            return ""
        lines = [" ".join(line.split()) for line in self._lines()[-_REASON_LINES:]]
        return " / ".join(lines) or f"exit code {code}"

    def last_line(self) -> str:
        """Return the last line of the output so far, empty if there is none."""
        return next(reversed(self._lines()), "")

    def terminate(self) -> None:
        """Ask the process, and everything that it started, to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self) -> None:
        """End the process and everything that it started."""
        self.terminate()
        if self._process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _lines(self) -> list[str]:
        try:
            with open(self._log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_offset, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [printable(line).strip() for line in text.splitlines() if line.strip()]
