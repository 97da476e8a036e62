"""The watchdog finds a rank that makes no progress, makes it dump its stacks, and kills it so that the ranks can restart.

Each rank reports its progress to its node's agent by heartbeats, through a few bytes of shared memory.

In a hang, all ranks on all nodes stall because they wait for one. Each node's agent judges its own ranks. The clearer the
culprit, the sooner it is killed: first a rank that cannot run, later one that is behind the others, and last, if none stands out,
all ranks. By then the culprit is most likely on another node and has been killed there.

Ranks that load the model, which takes seconds to an hour, send no heartbeats. A loading rank reads files or touches memory for a
first time; the kernel counts both for each process. Most ranks wait for one that progresses, possibly on another node, so the
nodes of a job share a counter of the progress that they see.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launcher.errors import RunError
from launcher.worker.ranks.rank_env import RankEnv

if TYPE_CHECKING:
    from torch.distributed import Store

# Set by the agent to `HeartbeatTable.path`; if it is not set, the rank is not watched.
HEARTBEATS_VARIABLE = "LAUNCHER_HEARTBEATS"
PHASES = ("starting", "joined", "loaded", "training", "evaluating", "saving", "finishing")
_CODES = {phase: code for code, phase in enumerate(PHASES)}
# The count is at both ends, so that a reader can detect a partly written record.
_RECORD = struct.Struct("=Qqqqqd?7xQ")
_READ_TRIES = 5
_LONGEST_INTERVAL_S = 1.0
# Seconds between the request for a rank's stacks and collectives and its kill. Other nodes notice the request within two seconds,
# torch checks for it once a second, and looking up the stacks of the calls takes another second.
_DUMP_S = 5.0
# Multiples of the limit after which a rank is killed: a rank that is behind the others, and a rank without a visible reason.
_BEHIND, _UNCLEAR = 1.25, 1.5
_JOIN_S = 5.0
_MIN_LOAD_S = 300.0
# Nodes report progress to each other at intervals of this share of the loading limit.
_SHARING = 0.02
_LOADING = ("starting", "joined", "loaded")
# A process in one of these states does no work; one that is halted does not even wait for storage.
_HALTED = {
    psutil.STATUS_STOPPED: "is stopped by a signal (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "is held by a debugger",
    psutil.STATUS_ZOMBIE: "has ended without the agent noticing",
}
_UNABLE = {**_HALTED, psutil.STATUS_DISK_SLEEP: "hangs in the kernel (storage or a driver)"}
# A rank that only waits logs or allocates less than this.
_MIN_BYTES = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_COUNTER = "load_progress"
_HANGS = "hangs"
# A head node that has not answered for this long hangs or is cut off.
_UNANSWERED_S = 5.0
# Seconds between a failed request and the next one.
_RETRY_S = 5.0


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a rank.

    `count` is the number of heartbeats from process `pid`, `step` its completed optimizer steps. `at` is a time.monotonic() time;
    all processes of a machine share this clock. `trained` is whether the rank has begun to train.
    """

    count: int
    pid: int
    rank: int
    phase: str
    step: int
    at: float
    trained: bool


class HeartbeatTable:
    """The agent's side: a record per local rank in anonymous memory, which is freed when the agent ends.

    A file could block, be on a full disk, or be removed at logout (as in /dev/shm).
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._descriptor = os.memfd_create("heartbeats")
        os.ftruncate(self._descriptor, num_ranks * _RECORD.size)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self) -> dict[int, Beat]:
        """Return the last heartbeat of each local rank that has sent one, whether or not its process still lives."""
        beats = {}
        for local_rank in range(self._num_ranks):
            for _ in range(_READ_TRIES):
                record = os.pread(self._descriptor, _RECORD.size, local_rank * _RECORD.size)
                count, pid, rank, code, step, at, trained, count_again = _RECORD.unpack(record)
                if count == count_again:
                    if count:
                        beats[local_rank] = Beat(count, pid, rank, PHASES[code], step, at, trained)
                    break
        return beats

    def close(self) -> None:
        os.close(self._descriptor)


class Heartbeat:
    """A rank's side."""

    def __init__(self, table: Path | None, local_rank: int, rank: int) -> None:
        """Send heartbeats to the table at this path; None sends none."""
        self._table: mmap.mmap | None = None
        self._offset = local_rank * _RECORD.size
        self._pid, self._rank = os.getpid(), rank
        self._count, self._trained = 0, False
        if table is not None:
            try:
                with open(table, "r+b", buffering=0) as file:
                    self._table = mmap.mmap(file.fileno(), 0)
            except OSError as error:
                raise RunError(
                    f"this rank cannot send heartbeats to its node's agent: {error.strerror}",
                    where=str(table),
                    remedy="run agent and ranks in one container, or turn the watchdog off with cluster.stall_seconds=0",
                ) from None
            self.beat("starting", 0)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], env: RankEnv) -> Heartbeat:
        table = environ.get(HEARTBEATS_VARIABLE)
        return cls(Path(table) if table else None, env.local_rank, env.rank)

    def beat(self, phase: str, step: int) -> None:
        """Send one of PHASES and the number of completed optimizer steps; takes about a microsecond and cannot fail."""
        if self._table is None:
            return
        self._trained |= phase == "training"
        self._count += 1
        _RECORD.pack_into(
            self._table,
            self._offset,
            self._count,
            self._pid,
            self._rank,
            _CODES[phase],
            step,
            time.monotonic(),
            self._trained,
            self._count,
        )


@dataclass(frozen=True)
class StallLimits:
    """Seconds without a heartbeat: `stall_s` while training, with one for each micro-batch, and `rare_s` while saving.

    `load_s` is the limit without progress of any rank while the run loads its model (LoadProgress); a rank that cannot run
    is killed after `stall_s` while it loads. Finishing has no limit: the time of an export grows with the model, and a kill would
    only restart it.
    """

    stall_s: float
    rare_s: float

    @property
    def load_s(self) -> float:
        """At least `_MIN_LOAD_S`: a kernel may compile for a minute, while the rank reads nothing."""
        return max(self.stall_s, _MIN_LOAD_S)

    def of(self, beat: Beat, is_halted: bool = False) -> float:
        """Return the limit in seconds for a rank in this heartbeat's state; `is_halted` means that its process cannot run."""
        if beat.phase == "finishing":
            return math.inf
        if is_loading(beat):
            return self.load_s
        return max(self.stall_s, self.rare_s) if beat.phase == "saving" and not is_halted else self.stall_s


@dataclass(frozen=True)
class StallVerdict:
    """The stalled ranks with their seconds without a heartbeat, and which of them to kill now, with reasons."""

    stalled: Mapping[int, float] = field(default_factory=dict)
    kill: Mapping[int, str] = field(default_factory=dict)


def judge_ranks(
    beats: Mapping[int, Beat],
    states: Mapping[int, str],
    now: float,
    limits: StallLimits,
    since: float = 0.0,
    others_at: float = math.inf,
) -> StallVerdict:
    """Judge the ranks in `states` (psutil's process state names) by their last heartbeats or, while they load, last progress.

    Ranks that load are judged only while no rank that trains is late. A rank that cannot run is killed whatever the others do.

    `now` and `since` are time.monotonic() times; silence before `since` does not count. `others_at` is when the run's other
    ranks, for which loading ranks may wait, last progressed: -inf if there are none, inf if nothing is known about them.
    """
    silence_s = {r: now - max(beat.at, since) for r, beat in beats.items() if r in states}
    silent = {r: seconds for r, seconds in silence_s.items() if beats[r].trained}
    lateness = {r: seconds / limits.of(beats[r], states[r] in _HALTED) for r, seconds in silent.items()}
    late = {r: silent[r] for r in silent if lateness[r] > 1}
    if not late:
        late = {r: seconds for r, seconds in silence_s.items() if is_loading(beats[r]) and seconds > limits.stall_s}
        if unable := {r: _UNABLE[states[r]] for r in late if states[r] in _UNABLE}:
            return StallVerdict(late, unable)
        if late and len(late) == len(beats) and min(*late.values(), now - others_at) > limits.load_s:
            return StallVerdict(late, dict.fromkeys(late, "reads nothing, and neither does any other rank"))
        return StallVerdict()
    unable = {r: _UNABLE[states[r]] for r in late if states[r] in _UNABLE}
    if unable:
        return StallVerdict(late, unable)
    counts = {r: beats[r].count for r in silent}
    first, last = max(counts.values()), min(counts.values())
    behind = {r: "is behind the other ranks of its node" for r in late if counts[r] == last < first}
    # Ranks that wait for another node may also differ by one, so this is not conclusive at once.
    if any(lateness[r] > _BEHIND for r in behind):
        return StallVerdict(late, behind)
    if max(lateness[r] for r in late) > _UNCLEAR:
        return StallVerdict(late, dict.fromkeys(late, "makes no progress, and neither does any other rank of its node"))
    return StallVerdict(late)


def is_loading(beat: Beat) -> bool:
    """Return whether the rank has not loaded the model yet, or has not begun to train."""
    return not beat.trained and beat.phase in _LOADING


class Watchdog:
    """Watches the ranks in `table` that are children of this process; calls `on_stall` with a message about the ranks it killed.

    `on_silence` is called with the ranks that must dump their flight recorders; `explain` returns what the dumps of all ranks
    show, or an empty string. With `stall_s` 0, nothing is watched. For `rare_s` see StallLimits. `store` is shared by all nodes
    of the run; None if there is only one.
    """

    def __init__(
        self,
        table: HeartbeatTable,
        stall_s: float,
        rare_s: float,
        on_stall: Callable[[str], None],
        store: Store | None = None,
        on_silence: Callable[[Collection[int]], None] = lambda ranks: None,
        explain: Callable[[], str] = str,
    ) -> None:
        self._table = table
        self._on_silence, self._explain = on_silence, explain
        self._store = store
        self._shared: SharedProgress | None = None
        self._progressed_at = -math.inf
        self._progress = LoadProgress()
        self._limits = StallLimits(stall_s, rare_s)
        self._on_stall = on_stall
        self._interval_s = min(_LONGEST_INTERVAL_S, stall_s / 10)
        self._looked = self._since = time.monotonic()
        # When the processes were asked for their stacks and collectives.
        self._asked: dict[int, float] = {}
        self._dump_s = min(_DUMP_S, stall_s / 4)
        self._done: set[int] = set()
        self._problem = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        if self._limits.stall_s > 0:
            if self._store is not None:
                self._shared = SharedProgress(self._store, min(_LONGEST_INTERVAL_S, _SHARING * self._limits.load_s))
            self._thread.start()
        return self

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
        if self._shared is not None:
            self._shared.stop()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            now = time.monotonic()
            if now - self._looked > self._limits.stall_s / 2:
                # The agent itself was suspended: `scontrol suspend` stops all processes of a job.
                self._since = now
            self._looked = now
            try:
                self._look(now)
            except Exception as error:
                # For example, a limit on open files. The next look may succeed, and a hang must end.
                if str(error) != self._problem:
                    self._problem = str(error)
                    with suppress(OSError):
                        print(f"the watchdog cannot look at the ranks: {self._problem}", flush=True)

    def _look(self, now: float) -> None:
        read = self._table.read()
        beats = {r: beat for r, beat in read.items() if beat.pid not in self._done}
        beats = self._progress.update(beats, now)
        # The live ranks; a dead rank's record stays until its successor starts.
        ranks: dict[int, psutil.Process] = {}
        states: dict[int, str] = {}
        for r, beat in beats.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(beat.pid)
                if process.ppid() == os.getpid():
                    states[r], ranks[r] = process.status(), process
        # When any rank of the run was last seen to progress.
        others_at = -math.inf
        if self._shared is not None:
            at = max((beats[r].at for r in states), default=-math.inf)
            # Until this node's first rank has started, the fork server is importing, which has its own deadline.
            if at > self._progressed_at or not read:
                self._shared.report()
                self._progressed_at = at
            others_at = self._shared.changed_at
        verdict = judge_ranks(beats, states, now, self._limits, self._since, others_at)
        asked, self._asked = self._asked, {beats[r].pid: self._asked.get(beats[r].pid, now) for r in verdict.stalled}
        late = [r for r in verdict.stalled if beats[r].pid not in asked]
        for r in late:
            _send_signal(ranks[r], signal.SIGQUIT)
        if late and not asked and self._shared is not None:
            self._shared.report_hang()
        # At a silence on any node, ask all ranks for their collectives: waiting ranks may only be late later.
        if late or (self._shared is not None and self._shared.take_others_hang()):
            with suppress(Exception):
                self._on_silence({beats[r].rank for r in ranks})
        # The dumps take a moment; this is also the rank's last chance to progress.
        if not verdict.kill or any(now - self._asked[beats[r].pid] < self._dump_s for r in verdict.kill):
            return
        explanation = ""
        # No failure here may prevent the end of a hang.
        with suppress(Exception):
            # Report before the kill: the agent reports the failure as soon as the rank has ended.
            explanation = self._explain()
        for r in verdict.kill:
            _send_signal(ranks[r], signal.SIGKILL)
        # The agent ends the other ranks, which wait for the killed one and may take a while to end.
        self._done |= {beat.pid for beat in beats.values()}
        messages = [_describe_kill(beats[r], verdict.stalled[r], reason) for r, reason in verdict.kill.items()]
        self._on_stall("; ".join(filter(None, (*messages, explanation))))


def _send_signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _describe_kill(beat: Beat, silent_s: float, reason: str) -> str:
    activity = f"in step {beat.step + 1}" if beat.phase == "training" else f"while {beat.phase} after step {beat.step}"
    if not beat.trained and beat.phase in _LOADING:
        activity = "while it starts" if beat.phase == "starting" else "while the model is loaded"
    return f"rank {beat.rank} (pid {beat.pid}) {reason}: no progress for {silent_s:.0f} s {activity}; killed it"


class LoadProgress:
    """Remembers when each rank last progressed."""

    def __init__(self) -> None:
        # The bytes of each process when it last progressed, and that time.
        self._marks: dict[int, tuple[int, float]] = {}

    def update(self, beats: Mapping[int, Beat], now: float) -> dict[int, Beat]:
        """For ranks that have not begun to train, replace the heartbeats' times with the times of their last progress."""
        for pid in (beat.pid for beat in beats.values() if not beat.trained):
            num_bytes = count_bytes(pid)
            if pid not in self._marks or num_bytes - self._marks[pid][0] >= _MIN_BYTES:
                self._marks[pid] = num_bytes, now
        loading = {rank: beat for rank, beat in beats.items() if not beat.trained}
        return {**beats, **{rank: replace(beat, at=max(beat.at, self._marks[beat.pid][1])) for rank, beat in loading.items()}}


class SharedProgress:
    """Two counters in the head node's store: progress on all nodes, and the hangs that they have noticed.

    A separate thread with its own connection talks to the store: a head node that does not answer must not block the watchdog.
    """

    def __init__(self, store: Store, interval_s: float) -> None:
        self._store, self._interval_s = store, interval_s
        self._has_progressed = self._has_hang = self._has_others_hang = False
        self._changed_at, self._asked_at = time.monotonic(), math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._exchange_counters, name="load-progress", daemon=True)
        self._thread.start()

    @property
    def changed_at(self) -> float:
        """When progress on any node was last seen, by time.monotonic(); inf if the store is unreachable or silent."""
        return self._changed_at if time.monotonic() - self._asked_at < _UNANSWERED_S else math.inf

    def report(self) -> None:
        """Tell the other nodes that a rank on this node is making progress."""
        self._has_progressed = True

    def report_hang(self) -> None:
        """Tell the other nodes that a rank on this node is silent."""
        self._has_hang = True

    def take_others_hang(self) -> bool:
        """Return whether another node has reported a hang since the last call."""
        has_others_hang, self._has_others_hang = self._has_others_hang, False
        return has_others_hang

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _exchange_counters(self) -> None:
        connection, last, num_hangs, wait_s = None, -1, -1, self._interval_s
        while not self._ended.wait(wait_s):
            has_progressed, self._has_progressed = self._has_progressed, False
            has_hang, self._has_hang = self._has_hang, False
            self._asked_at = asked_at = time.monotonic()
            try:
                connection = connection or self._store.clone()
                count = connection.add(_COUNTER, int(has_progressed))
                hangs = connection.add(_HANGS, int(has_hang))
            except RuntimeError:
                # Nothing is known about the other nodes until the head node answers again. Use another connection for that: a
                # late answer to this request would be taken for the answer to the next one.
                self._changed_at, self._has_progressed = math.inf, self._has_progressed or has_progressed
                self._has_hang = self._has_hang or has_hang
                connection, last, wait_s = None, -1, _RETRY_S
                continue
            wait_s = self._interval_s
            now = time.monotonic()
            # While the head node was silent, the other nodes could not report progress either.
            if count != last or now - asked_at >= _UNANSWERED_S:
                last, self._changed_at = count, now
            # Hangs from before this node first looked are over, or this node noticed them itself.
            self._has_others_hang |= 0 <= num_hangs < hangs - int(has_hang)
            num_hangs = hangs
            self._asked_at = math.inf


def count_bytes(pid: int) -> int:
    """Return the bytes that a process has read plus the bytes of the pages that it has touched; 0 if it cannot be seen."""
    with suppress(OSError, ValueError):
        read = re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())
        # minflt and majflt, counted from the field after the name (proc_pid_stat(5)).
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(read[1] if read else 0) + (int(stat[7]) + int(stat[9])) * _PAGE_BYTES
    return 0
