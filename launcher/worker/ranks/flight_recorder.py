"""Has a rank write NCCL's flight recorder, the last collectives of each of its process groups, when the watchdog finds it silent.

torch writes it by itself only after the process group's timeout, which is later than a stall. It also writes when something
arrives in a pipe that it reads in a thread of its own, without Python. `torchfrtrace` reads the files of all ranks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

# Collectives that are kept for each process group.
_NUM_COLLECTIVES = 2000


class FlightRecorder:
    """The agent's side: a folder on this node with the pipes of its ranks; what they write goes to `target`."""

    def __init__(self, target: Path, is_nccl: bool) -> None:
        """Without `is_nccl` nothing is recorded, and nothing happens."""
        self._folder = Path(tempfile.mkdtemp(prefix="launcher-nccl-")) if is_nccl else None
        self._target = target
        self._names: tuple[str, ...] = ()

    def set_variables(self, environ: MutableMapping[str, str]) -> None:
        """Set the variables that ranks need, except those that the user has set."""
        if self._folder is None:
            return
        self._target.mkdir(parents=True, exist_ok=True)
        values = {
            "TORCH_NCCL_TRACE_BUFFER_SIZE": str(_NUM_COLLECTIVES),
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{self._folder}/rank-",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{self._target}/rank-",
        }
        self._names = tuple(name for name in values if name not in environ)
        environ.update({name: values[name] for name in self._names})

    def request(self, rank: int) -> None:
        """Ask a rank to write what it has recorded. One that has not opened its pipe yet is left alone."""
        if self._folder is None:
            return
        with suppress(OSError):
            descriptor = os.open(self._folder / f"rank-{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, b"1\n")
            finally:
                os.close(descriptor)

    def close(self, environ: MutableMapping[str, str]) -> None:
        """Remove the pipes and the variables."""
        for name in self._names:
            environ.pop(name, None)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
