"""The rank's identity, and the collectives by which ranks share results, failures and reasons to stop.

A rank that fails alone would leave the others waiting in their next collective. So each function here that runs an action
raises on every rank where the action fails on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from launcher.errors import CheckpointError, DamagedCheckpoint, LauncherError, Problem, Superseded

T = TypeVar("T")
# Reasons to stop before the last step, by precedence: where ranks have different reasons, the first of these counts.
STOP_REASONS = ("cancelled", "preempted", "limit")
# Error types that callers handle differently; every other error becomes a CheckpointError.
_KEPT_TYPES: tuple[type[LauncherError], ...] = (Superseded, DamagedCheckpoint)


@dataclass(frozen=True)
class RankInfo:
    """Identity of this process among the ranks of a run; `restart` counts the node agent's restarts within the attempt."""

    rank: int
    local_rank: int
    world_size: int
    attempt: int
    restart: int = 0

    @property
    def is_main(self) -> bool:
        """True on global rank 0, which logs and commits."""
        return self.rank == 0


class StepReduction(NamedTuple):
    """Result of `all_reduce_step`: the loss summed over ranks, why to stop (None: go on), and the summed statistics."""

    loss: float
    stop_reason: str | None
    stats: list[float]


def all_reduce_step(loss: torch.Tensor, stop_reason: str | None, stats: list[float], device: torch.device) -> StepReduction:
    """Sum `loss` (a scalar) and `stats` over all ranks and agree on a reason to stop. Collective.

    One all-reduce carries all three, so that a step has no collective beside those of DeepSpeed. A rank puts its statistics
    at positions of its own, with zeros elsewhere: the sum is then the concatenation. Each reason is one of STOP_REASONS.
    """
    votes = [float(stop_reason == reason) for reason in STOP_REASONS]
    buffer = torch.tensor([0.0, *votes, *stats], dtype=torch.float64, device=device)
    buffer[0] = loss
    dist.all_reduce(buffer)
    loss_sum, *rest = buffer.tolist()
    num_votes, summed_stats = rest[: len(votes)], rest[len(votes) :]
    agreed = next((reason for reason, count in zip(STOP_REASONS, num_votes, strict=True) if count), None)
    return StepReduction(loss_sum, agreed, summed_stats)


def rank0_broadcast(rank_info: RankInfo, problem: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. Collective; the result has to be picklable.

    Raises:
        LauncherError: on every rank, where `action` raised one on rank 0.
        CheckpointError: on every rank, where `action` raised an OSError; `problem` says what could not be done.
    """
    shared: list[Any] = [None, None]
    if rank_info.is_main:
        try:
            shared[0] = action()
        except LauncherError as error:
            shared[1] = (type(error), error.problems)
        except OSError as error:
            shared[1] = (CheckpointError, (Problem(problem, where=error.filename or "", value=error.strerror or str(error)),))
    dist.broadcast_object_list(shared)
    if shared[1] is not None:
        kind, problems = shared[1]
        raise kind(problems)
    return shared[0]


def run_on_all_ranks(device: torch.device, problem: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's result. Collective.

    `problem` says what could not be done, for errors that are not a LauncherError.

    Raises:
        Superseded, DamagedCheckpoint: on every rank, where any rank raised one of these.
        CheckpointError: on every rank, where any rank raised another error; it lists the problems of all ranks.
    """
    result: T | None = None
    caught: Exception | None = None
    try:
        result = action()
    except Exception as error:  # any error has to reach the other ranks, which would wait for this one
        caught = error
    failed = torch.tensor(int(caught is not None), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return result  # type: ignore[return-value]
    own_type = next((kind for kind in _KEPT_TYPES if isinstance(caught, kind)), CheckpointError)
    gathered: list[tuple[type[LauncherError], tuple[Problem, ...]]] = [(CheckpointError, ())] * dist.get_world_size()
    dist.all_gather_object(gathered, (own_type, to_problems(problem, caught, dist.get_rank())))
    kinds = {kind for kind, _ in gathered}
    raised = next((kind for kind in _KEPT_TYPES if kind in kinds), CheckpointError)
    raise raised(dict.fromkeys(one for _, problems in gathered for one in problems)) from caught


def to_problems(what: str, error: Exception | None, rank: int) -> tuple[Problem, ...]:
    """Convert an exception raised on `rank` into user-facing problems; empty for None."""
    if error is None:
        return ()
    if isinstance(error, LauncherError):
        return error.problems
    where = f"rank {rank}"
    if isinstance(error, OSError):
        where += f", {error.filename}" if error.filename else ""
        return (Problem(what, where=where, value=error.strerror or str(error)),)
    return (Problem(what, where=where, value=f"{type(error).__name__}: {error}"),)
