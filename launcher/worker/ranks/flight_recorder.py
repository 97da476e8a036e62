"""Makes ranks dump torch's flight recorder (the last collectives of each process group), and finds the one in which they hang.

With NCCL, torch dumps it unasked only after the process group's timeout, which is later than a stall. It also dumps when
something arrives in a pipe that one of its threads reads. That thread needs Python to look up the stacks of the calls, so a rank
that hangs while it holds the GIL does not answer. With gloo, a Python thread of the rank does the same. A rank writes to its
node's disk, because shared storage may be what hangs. The agent copies the dump to the attempt's folder for `torchfrtrace`,
and adds a summary of its ranks' dumps: hundreds of whole dumps would take the other agents too long to read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import atomic_files, json_records, run_store
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.worker.ranks.hung_collective import Calls, Members, explain_hang, read_dump

_PIPE, _FILE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "TORCH_FR_DUMP_TEMP_FILE"
# Number of collectives that are kept, over all process groups.
_SIZE = {"TORCH_FR_BUFFER_SIZE": "2000"}
_PREFIX, _SUMMARIES = "rank-", "summary-*.json"
# torch checks the pipe once a second, and writes a few megabytes.
_POLL_S = 0.2
# Storage that does not answer must not stop the watchdog from killing a rank, or the agent from ending.
_READING_S, _CLOSING_S = 5.0, 10.0


@dataclass(frozen=True)
class _Summary:
    """What the ranks of one agent recorded; `ranks` are numbers as text."""

    ranks: dict[str, Calls]
    members: Members


class FlightRecorder:
    """The agent's side: a folder on this node with the pipes of its ranks and what they write."""

    def __init__(self, run: RunDir, attempt: int, world_size: int, stall_s: float) -> None:
        """`stall_s` is the least time between a start of the ranks and the first hang that the watchdog can notice."""
        self._folder = Path(tempfile.mkdtemp(prefix="launcher-collectives-"))
        self._run, self._attempt, self._world_size, self._stall_s = run, attempt, world_size, stall_s
        self._target = run.attempt(attempt) / "collectives"
        # The ranks' answers, and when they came; the numbers of ranks are text, as in JSON.
        self._calls: dict[str, tuple[float, Calls]] = {}
        self._members: Members = {}
        # The modification times of the files that have been copied.
        self._copied: dict[Path, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._copy_until_closed, name="flight-recorder", daemon=True)
        # Start the thread before the ranks: a limit on threads that is reached later does not affect it.
        with suppress(RuntimeError):
            self._thread.start()

    @property
    def variables(self) -> dict[str, str]:
        """The variables that ranks need; torch also reads the file's former name."""
        files = f"{self._folder}/{_PREFIX}"
        return {**_SIZE, _PIPE: files, _FILE: files, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": files}

    def request(self, ranks: Iterable[int]) -> None:
        """Ask ranks to dump what they recorded. Skips ranks that have no pipe yet."""
        for rank in ranks:
            with suppress(OSError):
                descriptor = os.open(self._folder / f"{_PREFIX}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(descriptor, b"1\n")
                finally:
                    os.close(descriptor)

    def explain(self) -> str:
        """Describe the collective in which the ranks of all nodes hang; empty if that is unknown."""
        explanation: list[str] = []
        thread = threading.Thread(target=lambda: explanation.append(self._explain()), name="hung-collective", daemon=True)
        # Raised when a limit on threads is reached.
        with suppress(RuntimeError):
            thread.start()
            thread.join(_READING_S)
        return explanation[0] if explanation else ""

    def close(self, environ: MutableMapping[str, str]) -> None:
        """Copy dumps that torch wrote unasked after its own timeout; remove the pipes and the variables."""
        for name in self.variables:
            environ.pop(name, None)
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSING_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copy_until_closed(self) -> None:
        while not self._closed.wait(_POLL_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        """Copy the dumps that are complete and not copied yet; the summary goes first because other nodes wait for it."""
        contents: dict[Path, bytes] = {}
        for path in self._folder.glob(f"{_PREFIX}*[0-9]"):
            with suppress(OSError):
                written_at = path.stat().st_mtime_ns
                if self._copied.get(path) == written_at or (dump := read_dump(content := path.read_bytes())) is None:
                    continue
                calls, members = dump
                self._calls[path.name.removeprefix(_PREFIX)] = time.monotonic(), calls
                self._members |= members
                self._copied[path], contents[path] = written_at, content
        if not contents:
            return
        oldest = time.monotonic() - self._stall_s
        recent = {rank: calls for rank, (at, calls) in self._calls.items() if at > oldest}
        with suppress(OSError):
            # Do not create the attempt's own folder: the run directory may have been moved since.
            self._target.mkdir(exist_ok=True)
            json_records.write(self._target / _SUMMARIES.replace("*", self._folder.name[-8:]), _Summary(recent, self._members))
            for path, content in contents.items():
                atomic_files.write_bytes(self._target / path.name, content)

    def _explain(self) -> str:
        with suppress(OSError, LauncherError):
            files = {path: path.stat().st_mtime for path in self._target.glob(_SUMMARIES)}
            # Skip summaries from before a restart of the ranks.
            newest = max(files.values(), default=0.0)
            calls: dict[int, Calls] = {}
            members: Members = {}
            for path in (path for path, at in files.items() if at > newest - self._stall_s):
                of_agent = json_records.read(_Summary, path)
                calls |= {int(rank): of_rank for rank, of_rank in of_agent.ranks.items()}
                members |= of_agent.members
            hosts = run_store.read_attempt(self._run, self._attempt).nodes
            return explain_hang(calls, members, self._world_size, hosts)
        return ""


def answer_requests(environ: Mapping[str, str], rank: int) -> None:
    """Dump this rank's records from a thread whenever the agent asks; with NCCL, torch does so by itself."""
    from torch._C._distributed_c10d import _dump_fr_trace  # type: ignore[attr-defined]

    if _PIPE not in environ:
        return
    path, target = Path(f"{environ[_PIPE]}{rank}.pipe"), Path(f"{environ[_FILE]}{rank}")
    # Reaching a limit on threads raises RuntimeError.
    with suppress(OSError, RuntimeError):
        # A pipe of this rank from before a restart.
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Open for writing too: without a writer, reads would return at once.
        descriptor = os.open(path, os.O_RDWR)
        arguments = (descriptor, target, _dump_fr_trace)
        threading.Thread(target=_answer, args=arguments, name="flight-recorder", daemon=True).start()


def _answer(descriptor: int, target: Path, dump: Callable[..., bytes]) -> None:
    while os.read(descriptor, 64):
        with suppress(OSError):
            target.write_bytes(dump(includeStackTraces=False))
