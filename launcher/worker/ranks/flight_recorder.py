"""Makes ranks dump torch's flight recorder (the last collectives of each process group), and finds the one in which they hang.

With NCCL, torch dumps it unasked only after the process group's timeout, which is later than a stall. It also dumps when
something arrives in a pipe that one of its threads reads. That thread needs Python to look up the stacks of the calls, so a rank
that hangs while it holds the GIL does not answer. With gloo, a Python thread of the rank does the same. A rank writes to its
node's disk, because shared storage may be what hangs. The agent copies the dump to the attempt's folder for `torchfrtrace`,
and adds a summary of its ranks' dumps. The agents of other nodes read only this summary.
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
from launcher.worker.ranks import hung_collective
from launcher.worker.ranks.flight_dump import MAX_BYTES, GroupSummary, RankSummary, summarize_dump

# Number of collectives that are kept, over all process groups.
_NUM_COLLECTIVES = 2000
_SIZE, _PIPE = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
_FILE, _NCCL_FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
# For each variable, the names under which a user may have set it. torch warns about the deprecated name of the size.
_SAME = {
    _SIZE: (_SIZE, "TORCH_NCCL_TRACE_BUFFER_SIZE"),
    _PIPE: (_PIPE,),
    _FILE: (_FILE, _NCCL_FILE),
    _NCCL_FILE: (_FILE, _NCCL_FILE),
}
_PREFIX, _SUMMARIES = "rank-", "summary-*.json"
# torch checks the pipe once a second, and writes a few megabytes.
_WRITING_S, _POLL_S = 20.0, 0.1
# Storage that does not answer must not stop the watchdog from killing a rank, or the agent from ending.
_READING_S, _CLOSING_S = 5.0, 10.0


@dataclass(frozen=True)
class _Summaries:
    """The summaries of the ranks of one agent; `ranks` are numbers as text."""

    ranks: dict[str, dict[str, GroupSummary]]


class FlightRecorder:
    """The agent's side: a folder on this node with the pipes of its ranks and what they write."""

    def __init__(self, run: RunDir, attempt: int, world_size: int, stall_s: float) -> None:
        """`stall_s` is the least time between a start of the ranks and the first hang that the watchdog can notice."""
        self._folder = Path(tempfile.mkdtemp(prefix="launcher-collectives-"))
        self._run, self._attempt, self._world_size, self._stall_s = run, attempt, world_size, stall_s
        self._pipes = self._files = f"{self._folder}/{_PREFIX}"
        self._names: tuple[str, ...] = ()
        # The ranks that were asked and have not answered, with their deadlines.
        self._awaited: dict[int, float] = {}
        # The ranks' answers, and when they came.
        self._summaries: dict[int, tuple[float, RankSummary]] = {}
        # The modification times of the files that have been copied.
        self._copied: dict[Path, int] = {}
        self._wake, self._is_closed = threading.Event(), False
        self._thread = threading.Thread(target=self._copy_until_closed, name="flight-recorder", daemon=True)
        # Start the thread before the ranks: a limit on threads that is reached later does not affect it.
        with suppress(RuntimeError):
            self._thread.start()

    def set_variables(self, environ: MutableMapping[str, str]) -> None:
        """Set the variables that ranks need, except those that the user has set."""
        values = {_SIZE: str(_NUM_COLLECTIVES), _PIPE: self._pipes, _FILE: self._files, _NCCL_FILE: self._files}
        self._pipes, self._files = environ.get(_PIPE, self._pipes), _file_prefix(environ) or self._files
        self._names = tuple(name for name in values if not any(same in environ for same in _SAME[name]))
        environ.update({name: values[name] for name in self._names})

    def request(self, ranks: Iterable[int]) -> None:
        """Ask ranks to dump what they recorded, and copy the dumps in the background. Skips ranks that have no pipe yet."""
        for rank in ranks:
            if rank in self._awaited:
                # A request is pending; its answer will be just as recent.
                continue
            with suppress(OSError):
                # A rank that was asked before may have left a file, and may not answer now.
                Path(f"{self._files}{rank}").unlink(missing_ok=True)
                descriptor = os.open(_pipe(self._pipes, rank), os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(descriptor, b"1\n")
                finally:
                    os.close(descriptor)
                self._awaited[rank] = time.monotonic() + min(_WRITING_S, self._stall_s)
        self._wake.set()

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
        for name in self._names:
            environ.pop(name, None)
        self._is_closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSING_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _target(self) -> Path:
        return self._run.attempt(self._attempt) / "collectives"

    def _copy_until_closed(self) -> None:
        while not self._is_closed:
            self._wake.wait(_POLL_S if self._awaited else None)
            self._wake.clear()
            self._copy({rank: Path(f"{self._files}{rank}") for rank in list(self._awaited)})
            for rank, until in list(self._awaited.items()):
                if time.monotonic() > until:
                    self._awaited.pop(rank, None)
        written = [path for path in self._folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
        self._copy({int(path.name.removeprefix(_PREFIX)): path for path in written})

    def _copy(self, files: Mapping[int, Path]) -> None:
        """Copy the files that are complete and not copied yet; the summary goes first because other nodes wait for it."""
        contents: dict[Path, bytes] = {}
        for rank, path in files.items():
            with suppress(OSError):
                written_at = path.stat().st_mtime_ns
                if self._copied.get(path) == written_at or path.stat().st_size > MAX_BYTES:
                    continue
                summary = summarize_dump(content := path.read_bytes())
                if summary is not None:
                    self._summaries[rank] = time.monotonic(), summary
                    self._copied[path], contents[path] = written_at, content
                    self._awaited.pop(rank, None)
        if not contents:
            return
        oldest = time.monotonic() - self._stall_s
        recent = {str(rank): summary for rank, (at, summary) in self._summaries.items() if at > oldest}
        with suppress(OSError):
            # Do not create the attempt's own folder: the run directory may have been moved since.
            self._target.mkdir(exist_ok=True)
            json_records.write(self._target / _SUMMARIES.replace("*", self._folder.name[-8:]), _Summaries(recent))
            for path, content in contents.items():
                atomic_files.write_bytes(self._target / path.name, content)

    def _explain(self) -> str:
        with suppress(OSError, LauncherError):
            summaries = self._read_summaries()
            hung = hung_collective.find_hung_collective(summaries, self._world_size)
            if hung is not None:
                hosts = run_store.read_attempt(self._run, self._attempt).nodes
                return hung_collective.describe(hung, hosts, self._world_size)
        return ""

    def _read_summaries(self) -> dict[int, RankSummary]:
        """Return the summaries of the ranks of all agents."""
        files = {path: path.stat().st_mtime for path in self._target.glob(_SUMMARIES)}
        # Skip summaries from before a restart of the ranks.
        newest = max(files.values(), default=0.0)
        summaries: dict[int, RankSummary] = {}
        for path in (path for path, at in files.items() if at > newest - self._stall_s):
            with suppress(LauncherError, ValueError):
                of_agent = json_records.read(_Summaries, path).ranks
                summaries |= {int(rank): summary for rank, summary in of_agent.items()}
        return summaries


def answer_requests(environ: Mapping[str, str], rank: int) -> None:
    """Dump this rank's records from a thread whenever the agent asks; with NCCL, torch does so by itself."""
    from torch._C import _distributed_c10d

    dump: Callable[..., bytes] | None = getattr(_distributed_c10d, "_dump_fr_trace", None)
    files = _file_prefix(environ)
    if dump is None or _PIPE not in environ or not files:
        return
    path, target = _pipe(environ[_PIPE], rank), Path(f"{files}{rank}")
    # Reaching a limit on threads raises RuntimeError.
    with suppress(OSError, RuntimeError):
        # A pipe of this rank from before a restart.
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Open for writing too: without a writer, reads would return at once.
        descriptor = os.open(path, os.O_RDWR)
        threading.Thread(target=_answer, args=(descriptor, target, dump), name="flight-recorder", daemon=True).start()


def _answer(descriptor: int, target: Path, dump: Callable[..., bytes]) -> None:
    while os.read(descriptor, 64):
        with suppress(OSError):
            target.write_bytes(dump(includeStackTraces=False))


def _pipe(prefix: str, rank: int) -> Path:
    return Path(f"{prefix}{rank}.pipe")


def _file_prefix(environ: Mapping[str, str]) -> str:
    return environ.get(_FILE) or environ.get(_NCCL_FILE, "")
