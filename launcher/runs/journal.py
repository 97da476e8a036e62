"""The journal of an attempt: typed events in `attempts/NNN/journal/WRITER.jsonl`, and the state that they add up to.

Every writer has a file of its own: each node's agent, each rank, and the process in charge of the attempt (`attempt`: the
command, then the job script, driver or agent that runs it). A line is one event. Readers skip what they cannot decode: a full
disk or a killed writer tears the last line, and another version of the launcher may know other kinds.

It stays small at any number of ranks: of the ranks only rank 0 reports the end of training, and the first one a failure that a
restart would repeat; an agent writes one line when its ranks have ended.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from launcher import clock
from launcher.errors import DamagedRun, Problem
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records
from launcher.runs.run_records import Status

E = TypeVar("E", bound="Event")


@dataclass(frozen=True)
class FailureRecord:
    """The failure that ended an attempt: of a rank, or of a node's agent, for which `rank` and `exit_code` are None.

    `kind` is the name of the exception's class, or `killed` or `exit` for a rank that left no error record. `traceback` is empty
    if the message is sufficient. `host` is the node where the process ran, empty if the run has only one node. `step` is the
    number of optimizer steps that a rank had completed when it raised an exception, None before it had loaded the model.
    """

    rank: int | None
    kind: str
    message: str
    at: float | None = None
    exit_code: int | None = None
    traceback: str = ""
    log: str = ""
    host: str = ""
    step: int | None = None

    @property
    def source(self) -> str:
        """Name the process that failed: `rank 3 on n2`, or `the agent of n2`."""
        if self.rank is None:
            return f"the agent of {self.host}" if self.host else "the node's agent"
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"

    @property
    def line(self) -> str:
        """The process that failed and the first line of the message."""
        return f"{self.source}: {self.message.partition(chr(10))[0]}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """`at` is the time of launcher.clock on the writer's machine; `writer` names the file."""

    at: float = field(default_factory=clock.now, compare=False)

    @property
    def writer(self) -> str:
        return "attempt"


@dataclass(frozen=True, kw_only=True)
class TrainingEnded(Event):
    """Rank 0: how training ended. See launcher.train.finish.Outcome for the values."""

    state: str
    reason: str
    step: int
    message: str
    checkpoint: str = ""

    @property
    def writer(self) -> str:
        return "rank-00000"


@dataclass(frozen=True, kw_only=True)
class RepeatableFailure(Event):
    """A rank: a failure that a restart would repeat. Because of it, no node agent restarts its ranks."""

    failure: FailureRecord

    @property
    def writer(self) -> str:
        return f"rank-{self.failure.rank:05d}"


@dataclass(frozen=True, kw_only=True)
class RanksRestarted(Event):
    """The agent of node 0: all ranks are restarted within the attempt. `saved_step` is the newest checkpoint then."""

    first_failure: FailureRecord
    saved_step: int | None

    @property
    def writer(self) -> str:
        return "node-00000"


@dataclass(frozen=True, kw_only=True)
class NodeEnded(Event):
    """The agent of a node: how its ranks ended.

    `stopped`: the ranks were asked to stop. `killed`: they did not stop in time. `problems` are the findings of the node checks;
    if there are any, the ranks were never started.
    """

    node: int
    host: str = ""
    started_at: float | None = None
    stopped: bool = False
    killed: bool = False
    first_failure: FailureRecord | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def writer(self) -> str:
        return f"node-{self.node:05d}"


@dataclass(frozen=True, kw_only=True)
class NodeLost(Event):
    """Another process: a node has left no record of its own because of `text`, such as `n2 was lost: Connection timed out`."""

    node: int
    text: str

    @property
    def writer(self) -> str:
        return f"lost-{self.node:05d}"


@dataclass(frozen=True, kw_only=True)
class AttemptConcluded(Event):
    """The verdict: why the attempt ended, and the state of the run that follows.

    `began_step` and `saved_step` are the newest checkpoints at the attempt's start and end. `ended_at` is when its machines were
    released, None if that is not known: a later start judged it, or uploads still hold them.
    """

    state: str
    cause: Cause
    step: int = 0
    message: str = ""
    began_step: int | None = None
    saved_step: int | None = None
    bad_nodes: tuple[str, ...] = ()
    first_failure: FailureRecord | None = None
    ended_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class StatusChanged(Event):
    """The run's state, attempt or job changed, which stands in the newest attempt's journal; steps and saves are no change."""

    status: Status


KINDS: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        TrainingEnded,
        RepeatableFailure,
        RanksRestarted,
        NodeEnded,
        NodeLost,
        AttemptConcluded,
        StatusChanged,
    )
}


@dataclass(frozen=True)
class AttemptState:
    """What the events of an attempt add up to.

    Attributes:
        training: how training ended; None if rank 0 did not report it.
        repeatable: the earliest failure that a restart would repeat.
        restarts: of all ranks within the attempt, oldest first.
        nodes: how the nodes ended, keyed by number; a node that has not ended, or could not report it, is missing.
        lost: why nodes left no record, as first reported, keyed by number; a node in `nodes` has left one after all.
        ended: the verdict on the attempt.
        status: the run's status at its last change.
    """

    training: TrainingEnded | None = None
    repeatable: FailureRecord | None = None
    restarts: tuple[RanksRestarted, ...] = ()
    nodes: Mapping[int, NodeEnded] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)
    ended: AttemptConcluded | None = None
    status: Status | None = None


def fold(events: Iterable[Event]) -> AttemptState:
    """Return the state that events add up to. Pure.

    Of one writer's events the last one counts, but of the reports of a loss the first. Nothing depends on the order of different
    writers, whose clocks differ.
    """
    by_kind: dict[type[Event], list[Any]] = defaultdict(list)
    for event in events:
        by_kind[type(event)].append(event)
    repeatable = min(by_kind[RepeatableFailure], key=lambda event: event.at, default=None)
    training, changed, ended = (next(reversed(by_kind[kind]), None) for kind in (TrainingEnded, StatusChanged, AttemptConcluded))
    return AttemptState(
        training=training,
        repeatable=None if repeatable is None else repeatable.failure,
        restarts=tuple(by_kind[RanksRestarted]),
        nodes={event.node: event for event in by_kind[NodeEnded]},
        lost={event.node: event.text for event in reversed(by_kind[NodeLost])},
        ended=ended,
        status=None if changed is None else replace(changed.status, updated_at=changed.at),
    )


def append(run: RunDir, attempt: int, event: Event) -> None:
    """Append an event to its writer's file; see `atomic_files.append_lines`."""
    path = run.journal(attempt) / f"{event.writer}.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = json.dumps({"kind": type(event).__name__, **json_records.encode(event)})
    atomic_files.append_lines(path, f"{line}\n".encode())


def read(run: RunDir, attempt: int, writers: str = "*") -> list[Event]:
    """Return the events of the writers that match a pattern, each writer's in order. Raises what `read_kind` raises."""
    return read_kind(Event, run, attempt, writers)


def read_kind(kind: type[E], run: RunDir, attempt: int, writers: str) -> list[E]:
    """Return the events of one kind of these writers. What cannot be decoded is skipped.

    Raises:
        UnreadableRun: if storage does not answer.
    """
    events: list[E] = []
    for path in sorted(run.journal(attempt).glob(f"{writers}.jsonl")):
        try:
            content = json_records.read_bytes(path)
        except OSError as error:
            raise json_records.unreadable(path, error) from None
        for line in content.splitlines():
            try:
                values = json.loads(line)
                if issubclass(event_kind := KINDS[values["kind"]], kind):
                    events.append(json_records.decode(event_kind, values, str(path)))
            except (ValueError, TypeError, KeyError, DamagedRun):
                continue
    return events


def read_state(run: RunDir, attempt: int) -> AttemptState:
    """Return the state of an attempt from everything in its journal. Raises what `read` raises, as do the functions below."""
    return fold(read(run, attempt))


def read_end(run: RunDir, attempt: int) -> AttemptConcluded | None:
    """Return the verdict on an attempt, None without one; reads a single file, however many nodes there were."""
    return next(reversed(read_kind(AttemptConcluded, run, attempt, "attempt")), None)


def read_training(run: RunDir, attempt: int) -> TrainingEnded | None:
    """Return how training ended, None if rank 0 did not report it."""
    return next(reversed(read_kind(TrainingEnded, run, attempt, "rank-00000")), None)


def read_restarts(run: RunDir, attempt: int) -> tuple[RanksRestarted, ...]:
    """Return the restarts of all ranks within an attempt, oldest first."""
    return tuple(read_kind(RanksRestarted, run, attempt, "node-00000"))


def read_repeatable_failure(run: RunDir, attempt: int) -> FailureRecord | None:
    """Return the failure of a rank that a restart would repeat, None if there is none."""
    return fold(read(run, attempt, "rank-*")).repeatable
