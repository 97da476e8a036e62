"""Makes ranks dump torch's flight recorder (the last collectives of each process group), and finds the one in which they hang.

With NCCL, torch dumps it unasked only after the process group's timeout, which is later than a stall. It also dumps when
something arrives in a pipe that one of its threads reads. That thread needs Python to look up the stacks of the calls, so a rank
that hangs while it holds the GIL does not answer. With gloo, a Python thread of the rank does the same. A rank writes to its
node's disk, because shared storage may be what hangs. The agent copies the dump to the attempt's folder for `torchfrtrace`,
and adds a summary of its ranks' dumps: hundreds of whole dumps would take the other agents too long to read.

With NCCL, only tests of one rank have shown it.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import LauncherError
from launcher.plan.quantities import list_first
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_store

_PIPE, _FILE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "TORCH_FR_DUMP_TEMP_FILE"
# Number of collectives that are kept, over all process groups.
_SIZE = {"TORCH_FR_BUFFER_SIZE": "2000"}
_PREFIX, _SUMMARIES = "rank-", "summary-*.json"
# torch checks the pipe once a second, and writes a few megabytes.
_POLL_S = 0.2
# Storage that does not answer must not stop the watchdog from killing a rank, or the agent from ending.
_READING_S, _CLOSING_S = 5.0, 10.0
_MAX_NAMED = 4
# Collectives whose sizes may differ between ranks.
_UNEVEN = ("gather", "scatter", "all_to_all", "alltoall")


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has called: its number in its process group, its name, and the elements of its input."""

    number: int
    name: str
    num_elements: int
    is_completed: bool
    called_at_ns: int

    @property
    def title(self) -> str:
        """The name and the size; only the name if ranks may call the same collective with other sizes."""
        return self.name if self.name.startswith(_UNEVEN) else f"{self.name} of {self.num_elements} elements"


# For each process group (`0 (default_pg)`): a rank's first collective that has not completed, or else its last one.
Calls = dict[str, Collective]


class FlightRecorder:
    """The agent's side: a folder on this node with the pipes of its ranks and what they write."""

    def __init__(self, run: RunDir, attempt: int, world_size: int, stall_s: float) -> None:
        """`stall_s` is the least time between a start of the ranks and the first hang that the watchdog can notice."""
        self._folder = Path(tempfile.mkdtemp(prefix="launcher-collectives-"))
        self._run, self._attempt, self._world_size, self._stall_s = run, attempt, world_size, stall_s
        self._target = run.attempt(attempt) / "collectives"
        # The modification times of the dumps that have been copied.
        self._copied: dict[Path, int] = {}
        self._closed = threading.Event()

        def copy_until_closed() -> None:
            while not self._closed.wait(_POLL_S):
                self._copy()
            self._copy()

        self._thread = threading.Thread(target=copy_until_closed, name="flight-recorder", daemon=True)
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
                # A dump from before a restart must not be taken for the answer.
                (self._folder / f"{_PREFIX}{rank}").unlink(missing_ok=True)
                descriptor = os.open(self._folder / f"{_PREFIX}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(descriptor, b"1\n")
                finally:
                    os.close(descriptor)

    def explain(self) -> str:
        """Describe the collective in which the ranks of all nodes hang; empty if that is unknown."""
        explanation: list[str] = []

        def read_and_explain() -> None:
            with suppress(OSError, LauncherError):
                files = {path: path.stat().st_mtime for path in self._target.glob(_SUMMARIES)}
                # Skip summaries from before a restart of the ranks.
                newest = max(files.values(), default=0.0)
                calls: dict[int, Calls] = {}
                for path in (path for path, at in files.items() if at > newest - self._stall_s):
                    for rank, of_rank in json_records.read_json(path).items():
                        calls[int(rank)] = {group: Collective(**values) for group, values in of_rank.items()}
                hosts = run_store.read_attempt(self._run, self._attempt).nodes
                explanation.append(explain_hang(calls, self._world_size, hosts))

        thread = threading.Thread(target=read_and_explain, name="hung-collective", daemon=True)
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

    def _copy(self) -> None:
        """Copy the dumps if one is new; the summary goes first because other nodes wait for it."""
        with suppress(OSError):
            written = {path: path.stat().st_mtime_ns for path in self._folder.glob(f"{_PREFIX}*[0-9]")}
            contents = {path: path.read_bytes() for path in written} if written.items() - self._copied.items() else {}
            calls = {path: of_rank for path, content in contents.items() if (of_rank := read_dump(content)) is not None}
            if all(self._copied.get(path) == written[path] for path in calls):
                return
            # Do not create the attempt's own folder: the run directory may have been moved since.
            self._target.mkdir(exist_ok=True)
            summary = {
                path.name.removeprefix(_PREFIX): {group: asdict(one) for group, one in of_rank.items()}
                for path, of_rank in calls.items()
            }
            atomic_files.write_json(self._target / _SUMMARIES.replace("*", self._folder.name[-8:]), summary)
            for path in calls:
                atomic_files.write_bytes(self._target / path.name, contents[path])
                self._copied[path] = written[path]


def answer_requests(environ: Mapping[str, str], rank: int) -> None:
    """Dump this rank's records from a thread whenever the agent asks; with NCCL, torch does so by itself."""
    # torch.distributed.flight_recorder reads dumps; with gloo, only this function makes them.
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

        def answer() -> None:
            while os.read(descriptor, 64):
                with suppress(OSError):
                    target.write_bytes(_dump_fr_trace(includeStackTraces=False))

        threading.Thread(target=answer, name="flight-recorder", daemon=True).start()


def read_dump(content: bytes) -> Calls | None:
    """Return what a dump of the run's own rank shows, or None if it is not a complete one."""
    # torch writes the pickle in pieces; a complete one ends with a period.
    if not content.endswith(b"."):
        return None
    calls: Calls = {}
    try:
        for entry in pickle.loads(content)["entries"]:  # noqa: S301
            name, description = entry["process_group"]
            group = f"{name} ({description})" if description not in ("", "undefined") else name
            if entry["is_p2p"] or (group in calls and not calls[group].is_completed):
                continue
            calls[group] = Collective(
                entry["collective_seq_id"],
                # `nccl:_all_gather_base`
                entry["profiling_name"].rpartition(":")[2].strip("_").lower(),
                sum(map(math.prod, entry["input_sizes"])),
                bool(entry["retired"]) or entry["state"] == "completed",
                entry["time_created_ns"],
            )
    # Damaged pickles raise almost anything.
    except Exception:
        return None
    return calls


@dataclass(frozen=True)
class _Hang:
    """The oldest collective of a process group for which ranks wait; `others` wait in a different one of the same number."""

    group: str
    collective: Collective
    waiting: tuple[int, ...]
    missing: tuple[int, ...]
    others: Mapping[int, Collective]


def explain_hang(calls: Mapping[int, Calls], world_size: int, hosts: Sequence[str]) -> str:
    """Return a clause that names the collective for which ranks wait and the ranks that hold it up; empty if no rank waits.

    If ranks wait in several process groups, it is the one whose missing ranks wait in no other group: the others are
    consequences. `hosts` are the nodes in rank order.
    """
    hangs: list[_Hang] = []
    for group in {group for of_rank in calls.values() for group in of_rank}:
        of_group = {rank: of_rank[group] for rank, of_rank in sorted(calls.items()) if group in of_rank}
        number = min((one.number for one in of_group.values() if not one.is_completed), default=None)
        if number is None:
            continue
        incomplete = {rank: one for rank, one in of_group.items() if not one.is_completed and one.number == number}
        # The collective that differs from the majority is the mistake.
        title = Counter(one.title for one in incomplete.values()).most_common(1)[0][0]
        waiting = tuple(rank for rank, one in incomplete.items() if one.title == title)
        # Every rank is in the first group, also a rank that has not used it yet.
        expected = calls if group.partition(" ")[0] == "0" else of_group
        missing = tuple(rank for rank in sorted(expected) if rank not in of_group or of_group[rank].number < number)
        others = {rank: one for rank, one in incomplete.items() if one.title != title}
        hangs.append(_Hang(group, incomplete[waiting[0]], waiting, missing, others))
    if not hangs:
        return ""
    all_waiting = {rank for hang in hangs for rank in hang.waiting}
    hang = min(hangs, key=lambda one: (not all_waiting.isdisjoint(one.missing), not one.missing, one.collective.called_at_ns))

    def name(ranks: Sequence[int]) -> str:
        """Return `rank 3 on n2` or `ranks 0, 1, 2, 3 and 4 more on n1, n2`; without the node if there is only one."""
        nodes = [*dict.fromkeys(hosts[rank * len(hosts) // world_size] for rank in ranks)] if len(set(hosts)) > 1 else []
        numbers = f"rank{'s' * (len(ranks) > 1)} {list_first([*map(str, ranks)], _MAX_NAMED)}"
        return f"{numbers} on {list_first(nodes, _MAX_NAMED)}" if nodes else numbers

    causes = [f"{name([rank])} has called {other.title} instead" for rank, other in [*hang.others.items()][:_MAX_NAMED]]
    if hang.missing:
        causes.append(f"{name(hang.missing)} {'has' if len(hang.missing) == 1 else 'have'} not called it")
    if unknown := [rank for rank in range(world_size) if rank not in calls]:
        causes.append(f"{name(unknown)} left no record")
    if not causes:
        causes.append("all have called it, and none completes it: the network or a GPU hangs")
    title = f"collective {hang.collective.number} of process group {hang.group}, {hang.collective.title}"
    verb = "waits" if len(hang.waiting) == 1 else "wait"
    return f"{name(hang.waiting)} {verb} in {title}; {'; '.join(causes)}"
