"""The messages between coordinator, workers and driver of a run on Ray; Ray pickles them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from launcher.worker.ranks.watchdog import Beat


@dataclass(frozen=True)
class Member:
    """A worker: its rank in its group, its node's name and id in Ray, and the address at which the others reach it."""

    rank: int
    local_rank: int
    node: str
    node_id: str
    address: str
    port: int


@dataclass(frozen=True)
class Setup:
    """The answer to a worker that enters: what it needs to import its rank's modules before it has orders.

    `environment` holds the variables that the driver passes to the ranks, including keys; it is never printed.
    """

    plan_path: str
    environment: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Assignment:
    """A group's attempt, and one worker's part in it.

    `rank` and `world_size` refer to the training ranks. They meet at `address` and `port`; `peers` are the addresses of all their
    nodes. `marker` is the content of the attempt's file `marker`, by which a node recognizes the run directory.
    """

    attempt: int
    plan_path: str
    marker: str
    rank: int
    world_size: int
    local_world_size: int
    address: str
    port: int
    peers: tuple[str, ...]


@dataclass(frozen=True)
class CheckNode:
    """Orders: check the node. `others` are the other nodes, each with the address and port of a listening worker."""

    assignment: Assignment
    others: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Train:
    """Orders: start the rank, with the variables of `Setup`."""

    assignment: Assignment
    environment: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Wait:
    """Orders: this worker has no rank; send heartbeats until the attempt has a verdict."""


@dataclass(frozen=True)
class Leave:
    """Orders: end without another attempt."""

    reason: str


Orders = CheckNode | Train | Wait | Leave


class RankResult(StrEnum):
    """How a rank ended."""

    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class RankSign:
    """The last heartbeat of a worker's rank, the seconds since then, and psutil's name for the state of its process.

    The heartbeat's time is from the worker's clock; clocks of different machines cannot be compared.
    """

    beat: Beat
    silent_s: float
    process_state: str


@dataclass(frozen=True)
class Verdict:
    """What follows an attempt: whether Ray Train starts new workers, and why."""

    again: bool
    reason: str


@dataclass(frozen=True)
class BeatReply:
    """The answer to a worker's heartbeat.

    `signal` is the signal for its rank, without SIG, such as `TERM`. `dump_stacks` requests the rank's stacks, and `hang` is why
    the rank must be killed. `verdict` is None until the attempt has ended.
    """

    signal: str | None = None
    dump_stacks: bool = False
    hang: str | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class CoordinatorState:
    """The coordinator's state, for the driver.

    `number` is the newest attempt, `idle_s` how long it has had no workers (0 while it has some). `early_failure` is the message
    of the last worker that could not start, empty once workers have begun. `over` is why no attempt follows, None while one may.
    """

    number: int
    idle_s: float
    early_failure: str = ""
    over: str | None = None


class ResizeProgress(StrEnum):
    """The progress of ranks that must save before Ray Train replaces their workers: ended, writing, or asked to save."""

    ENDED = "ended"
    WRITING = "writing"
    REQUESTED = "requested"
