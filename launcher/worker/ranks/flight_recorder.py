"""Has silent ranks write torch's flight recorder, the last collectives of each process group, and reads what they have written.

With NCCL torch writes it by itself only after the process group's timeout, which is later than a stall. It also writes when
something arrives in a pipe that it reads in a thread of its own, without Python. With gloo a thread of the rank does the same.
A rank writes to this node's disk, since storage may be what hangs; the agent copies the file to the attempt's folder, where
agents of other nodes read it, and `torchfrtrace`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from launcher import atomic_files, run_store
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.worker.ranks import hung_collective

# Collectives that are kept, of all process groups.
_NUM_COLLECTIVES = 2000
_PIPE, _FILE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_PREFIX = "rank-"
# torch looks at the pipe once a second, and writes a few megabytes.
_WRITING_S, _POLL_S = 20.0, 0.1
# Storage that does not answer must not keep the watchdog from killing a rank.
_READING_S = 5.0


class FlightRecorder:
    """The agent's side: a folder on this node with the pipes of its ranks and what they write."""

    def __init__(self, run: RunDir, attempt: int, world_size: int, stall_s: float) -> None:
        """`stall_s` is the time from a start of the ranks to the first hang that is noticed, at least."""
        self._folder = Path(tempfile.mkdtemp(prefix="launcher-collectives-"))
        self._run, self._attempt, self._world_size, self._stall_s = run, attempt, world_size, stall_s
        self._prefix = f"{self._folder}/{_PREFIX}"
        self._names: tuple[str, ...] = ()

    def set_variables(self, environ: MutableMapping[str, str]) -> None:
        """Set the variables that ranks need, except those that the user has set."""
        values = {"TORCH_NCCL_TRACE_BUFFER_SIZE": str(_NUM_COLLECTIVES), _PIPE: self._prefix, _FILE: self._prefix}
        self._names = tuple(name for name in values if name not in environ)
        environ.update({name: values[name] for name in self._names})

    def request(self, rank: int) -> None:
        """Ask a rank to write what it has recorded, and copy that in the background. One without a pipe yet is left alone."""
        # A rank that has been silent before may have left one, and may not answer now.
        written = Path(f"{self._prefix}{rank}")
        with suppress(OSError):
            written.unlink(missing_ok=True)
            descriptor = os.open(_pipe(self._prefix, rank), os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, b"1\n")
            finally:
                os.close(descriptor)
            threading.Thread(target=self._publish, args=(written,), name="flight-recorder", daemon=True).start()

    def explain(self) -> str:
        """Describe the collective in which the ranks of all nodes hang; empty where that is unknown."""
        explanation: list[str] = []
        thread = threading.Thread(target=lambda: explanation.append(self._explain()), name="hung-collective", daemon=True)
        thread.start()
        thread.join(_READING_S)
        return explanation[0] if explanation else ""

    def close(self, environ: MutableMapping[str, str]) -> None:
        """Remove the pipes and the variables."""
        for name in self._names:
            environ.pop(name, None)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _target(self) -> Path:
        return self._run.attempt(self._attempt) / "collectives"

    def _publish(self, written: Path) -> None:
        with suppress(OSError):
            target = self._target / written.name
            target.unlink(missing_ok=True)
            until = time.monotonic() + _WRITING_S
            while time.monotonic() < until:
                if written.is_file() and _is_complete(content := written.read_bytes()):
                    # The run directory may have been moved since: the attempt's own folder is not made.
                    target.parent.mkdir(exist_ok=True)
                    atomic_files.write_bytes(target, content)
                    return
                time.sleep(_POLL_S)

    def _explain(self) -> str:
        with suppress(OSError, LauncherError):
            files = {path: path.stat().st_mtime for path in self._target.glob(f"{_PREFIX}*")}
            # Those of ranks that have been restarted since are older.
            newest = max(files.values(), default=0.0)
            recent = [path for path, at in files.items() if at > newest - self._stall_s]
            found = {int(path.name.removeprefix(_PREFIX)): hung_collective.parse_dump(path.read_bytes()) for path in recent}
            dumps = {rank: dump for rank, dump in found.items() if dump is not None}
            hung = hung_collective.find_hung_collective(dumps, self._world_size)
            if hung is not None:
                hosts = run_store.read_attempt(self._run, self._attempt).nodes
                return hung_collective.describe(hung, hosts, self._world_size)
        return ""


def answer_requests(environ: Mapping[str, str], rank: int) -> None:
    """Write what this rank has recorded whenever the agent asks, in a thread, as torch does by itself with NCCL."""
    from torch._C import _distributed_c10d

    dump: Callable[..., bytes] | None = getattr(_distributed_c10d, "_dump_fr_trace", None)
    if dump is None or _PIPE not in environ or _FILE not in environ:
        return
    path, target = _pipe(environ[_PIPE], rank), Path(f"{environ[_FILE]}{rank}")
    with suppress(OSError):
        # Of this rank before a restart.
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Open for writing too: with no writer left, reading would not wait.
        descriptor = os.open(path, os.O_RDWR)
        threading.Thread(target=_answer, args=(descriptor, target, dump), name="flight-recorder", daemon=True).start()


def _answer(descriptor: int, target: Path, dump: Callable[..., bytes]) -> None:
    while os.read(descriptor, 64):
        with suppress(OSError):
            target.write_bytes(dump(includeStackTraces=False))


def _pipe(prefix: str, rank: int) -> Path:
    return Path(f"{prefix}{rank}.pipe")


def _is_complete(content: bytes) -> bool:
    """A pickle ends with a point, and torch writes it in pieces."""
    return content.endswith(b".") and hung_collective.parse_dump(content) is not None
