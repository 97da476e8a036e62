"""What one rank alone has done or failed to do becomes known to all, so that no rank waits for another for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from launcher.errors import CheckpointError, DamagedCheckpoint, LauncherError, Problem, Superseded

T = TypeVar("T")
# What others do about it depends on which of these it is.
_TOLD_APART: tuple[type[LauncherError], ...] = (Superseded, DamagedCheckpoint)


def together(device: torch.device, what: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; CheckpointError on all of them when it fails on any. Collective.

    It is Superseded or a DamagedCheckpoint where any of them has raised that.
    """
    result: T | None = None
    caught: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        caught = error
    failed = torch.tensor(int(caught is not None), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return result  # type: ignore[return-value]
    own = next((kind for kind in _TOLD_APART if isinstance(caught, kind)), CheckpointError)
    gathered: list[tuple[type[LauncherError], tuple[Problem, ...]]] = [(CheckpointError, ())] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, problems_of(what, caught, dist.get_rank())))
    kinds = {kind for kind, _ in gathered}
    raised = next((kind for kind in _TOLD_APART if kind in kinds), CheckpointError)
    raise raised(dict.fromkeys(problem for _, problems in gathered for problem in problems)) from caught


def problems_of(what: str, error: Exception | None, rank: int) -> tuple[Problem, ...]:
    """An exception of `rank` as problems for people; none where there is no exception."""
    if error is None:
        return ()
    if isinstance(error, LauncherError):
        return error.problems
    where = f"rank {rank}"
    if isinstance(error, OSError):
        where += f", {error.filename}" if error.filename else ""
        return (Problem(what, where=where, value=error.strerror or str(error)),)
    return (Problem(what, where=where, value=f"{type(error).__name__}: {error}"),)
