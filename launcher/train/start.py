"""From which checkpoint an attempt begins, the same one on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher import run_store
from launcher.checkpoint import store
from launcher.plan.run_dir import RunDir
from launcher.train.engine import Place

_NONE = -1


@dataclass(frozen=True)
class Start:
    """`checkpoint` None starts from the initial weights; `restarts` counts the agents' restarts within the attempt.

    `by_itself` where no person started what begins here.
    """

    checkpoint: store.Checkpoint | None
    restarts: int
    by_itself: bool


def agree_on_start(run: RunDir, place: Place, device: torch.device) -> Start:
    """The newest checkpoint that this attempt has committed, else the one that it names. Collective.

    Rank 0 looks, because a shared file system shows a fresh folder to some nodes later than to others. Agents that restart
    only because another one does keep their own count: the highest is meant.

    Raises:
        CheckpointError: where the checkpoint is not there: never a silent start from step 0.
    """
    chosen = _chosen(run, place.attempt) if place.is_main else None
    shared = torch.tensor([_NONE if chosen is None else chosen.step, place.restart], dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    step, restarts = shared.tolist()
    automatic = run_store.read_attempt(run, place.attempt).automatic
    return Start(None if step == _NONE else store.at_step(run.checkpoints, step), restarts, automatic or restarts > 0)


def _chosen(run: RunDir, attempt: int) -> store.Checkpoint | None:
    own = [checkpoint for checkpoint in store.list_checkpoints(run.checkpoints) if checkpoint.manifest.attempt == attempt]
    if own:
        return own[-1]
    named = run_store.read_attempt(run, attempt).resume_step
    return None if named is None else store.at_step(run.checkpoints, named)
