"""Makes ranks dump torch's flight recorder (the last collectives of each process group), and finds the one in which they hang.

With NCCL, torch dumps it unasked only after the process group's timeout, which is later than a stall. It also dumps when
something arrives in a pipe that one of its threads reads. That thread needs Python to look up the stacks of the calls, so a rank
that hangs while it holds the GIL does not answer. With gloo, a Python thread of the rank does the same. A rank writes to its
node's disk, because shared storage may be what hangs. The agent copies the dump to the attempt's folder for `torchfrtrace`,
and adds a summary of its ranks' dumps: hundreds of whole dumps would take the other agents too long to read.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError
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
# Completed collectives that are kept. A rank whose calls diverged from its peers' has completed only a few since then.
_NUM_COMPLETED = 8
_MAX_NAMED = 4
# Collectives whose sizes differ between ranks.
_UNEVEN = ("gather", "scatter", "all_to_all", "alltoall")
# The ranks of each process group; gloo does not report them.
Members = dict[str, tuple[int, ...]]


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
                members: Members = {}
                for path in (path for path, at in files.items() if at > newest - self._stall_s):
                    of_agent = json_records.read(_Summary, path)
                    calls |= {int(rank): of_rank for rank, of_rank in of_agent.ranks.items()}
                    members |= of_agent.members
                hosts = run_store.read_attempt(self._run, self._attempt).nodes
                explanation.append(explain_hang(calls, members, self._world_size, hosts))

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


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has called: its number in its process group, its name, and the elements of its larger side."""

    number: int
    name: str
    num_elements: int
    is_completed: bool
    called_at_ns: int

    @property
    def title(self) -> str:
        return f"{self.name} of {self.num_elements} elements"

    @property
    def kind(self) -> tuple[str, int]:
        """A key that differs between ranks only if they have called different collectives."""
        return self.name, 0 if self.name.startswith(_UNEVEN) else self.num_elements


# For each process group (`0 (default_pg)`): a rank's last completed collectives, and its first and last that have not completed.
Calls = dict[str, tuple[Collective, ...]]


def read_dump(content: bytes) -> tuple[Calls, Members] | None:
    """Return what a dump of the run's own rank shows, or None if it is not a complete one."""
    # torch writes the pickle in pieces; a complete one ends with a period.
    if not content.endswith(b"."):
        return None
    calls: dict[str, list[Collective]] = defaultdict(list)
    try:
        dump = pickle.loads(content)  # noqa: S301
        for entry in dump["entries"]:
            if not entry["is_p2p"]:
                # `nccl:_all_gather_base`
                name = entry["profiling_name"].rpartition(":")[2].strip("_").lower()
                num_elements = max(sum(map(math.prod, entry[sizes])) for sizes in ("input_sizes", "output_sizes"))
                is_completed = bool(entry["retired"]) or entry["state"] == "completed"
                collective = Collective(entry["collective_seq_id"], name, num_elements, is_completed, entry["time_created_ns"])
                calls[_name_group(*entry["process_group"])].append(collective)
        groups = [group for group in dump.get("pg_config", {}).values() if group["name"]]
        members = {_name_group(group["name"], group["desc"]): tuple(map(int, json.loads(group["ranks"]))) for group in groups}
    # Damaged pickles raise almost anything.
    except Exception:
        return None
    kept = {}
    for group, of_group in calls.items():
        completed, pending = ([one for one in of_group if one.is_completed is state] for state in (True, False))
        kept[group] = (*completed[-_NUM_COMPLETED:], *pending[:1], *pending[1:][-1:])
    return kept, members


def _name_group(name: str, description: str) -> str:
    return f"{name} ({description})" if description not in ("", "undefined") else name


@dataclass(frozen=True)
class _HungCollective:
    """A process group's oldest collective that has not completed, with the ranks grouped by what is known about them.

    `others` are ranks that called a different collective; `unknown` are ranks without a record.
    """

    group: str
    collective: Collective
    waiting: frozenset[int]
    missing: frozenset[int]
    unknown: frozenset[int]
    others: Mapping[int, Collective]


def explain_hang(calls: Mapping[int, Calls], members: Members, world_size: int, hosts: Sequence[str]) -> str:
    """Return a clause that names the collective for which ranks wait and the ranks that hold it up; empty if no rank waits.

    If ranks wait in several process groups, it is the one whose missing ranks wait in no other group: the others are
    consequences. `hosts` are the nodes in rank order.
    """
    groups = {group for of_rank in calls.values() for group in of_rank}
    hung = [one for group in groups if (one := _find_in_group(group, calls, members.get(group, ()), world_size)) is not None]
    if not hung:
        return ""
    waiting = {rank for one in hung for rank in one.waiting}

    def order(one: _HungCollective) -> tuple[bool, bool, int]:
        has_culprit = bool(one.others or one.unknown or one.missing)
        return bool(one.missing & waiting), not has_culprit, one.collective.called_at_ns

    first = min(hung, key=order)

    def name(unsorted: Iterable[int]) -> str:
        """Return `rank 3 on n2` or `ranks 0-6, 8 on n1, n2`; without the node if there is only one."""
        ranks, ranges = sorted(unsorted), list[list[int]]()
        for rank in ranks:
            if ranges and ranges[-1][-1] == rank - 1:
                ranges[-1][1:] = [rank]
            else:
                ranges.append([rank])
        numbers = ["-".join(map(str, one)) for one in ranges]
        nodes = [*dict.fromkeys(hosts[rank * len(hosts) // world_size] for rank in ranks)] if len(set(hosts)) > 1 else []
        numbers, nodes = ([*names[:_MAX_NAMED], "..."] if len(names) > _MAX_NAMED else names for names in (numbers, nodes))
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(numbers)}" + (f" on {', '.join(nodes)}" if nodes else "")

    causes = [f"{name([rank])} has called {other.title} instead" for rank, other in sorted(first.others.items())[:_MAX_NAMED]]
    if first.missing:
        causes.append(f"{name(first.missing)} {'has' if len(first.missing) == 1 else 'have'} not called it")
    if first.unknown:
        causes.append(f"{name(first.unknown)} left no record")
    if not causes:
        causes.append("all have called it, and none completes it: the network or a GPU hangs")
    title = f"collective {first.collective.number} of process group {first.group}, {first.collective.title}"
    verb = "waits" if len(first.waiting) == 1 else "wait"
    return f"{name(first.waiting)} {verb} in {title}; {'; '.join(causes)}"


def _find_in_group(group: str, all_calls: Mapping[int, Calls], members: Iterable[int], world_size: int) -> _HungCollective | None:
    calls = {rank: of_rank[group] for rank, of_rank in sorted(all_calls.items()) if group in of_rank}
    number = min((one.number for of_rank in calls.values() for one in of_rank if not one.is_completed), default=None)
    if number is None:
        return None
    called = {rank: one for rank, of_rank in calls.items() for one in of_rank if one.number == number}
    counts = Counter(one.kind for one in called.values())
    # The collective that differs from the majority is the mistake.
    incomplete = [one for one in called.values() if not one.is_completed]
    expected = max(incomplete, key=lambda one: (counts[one.kind], -one.called_at_ns))
    others = {rank: one for rank, one in called.items() if one.kind != expected.kind}
    waiting = frozenset(rank for rank, one in called.items() if not one.is_completed and rank not in others)
    # Without members, all ranks are in the first group, and a rank is in any group that it has used.
    expected_ranks = frozenset(members or (range(world_size) if group.partition(" ")[0] == "0" else calls))
    last = {rank: max(one.number for one in of_rank) for rank, of_rank in calls.items()}
    missing = frozenset(rank for rank in expected_ranks & all_calls.keys() if last.get(rank, -1) < number)
    return _HungCollective(group, expected, waiting, missing, expected_ranks - all_calls.keys(), others)
