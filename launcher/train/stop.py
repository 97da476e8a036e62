"""How training ended, requests to stop it early, and whether there is time to save."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from launcher.config.sections.cluster import ClusterSection
from launcher.distributed import RankInfo, rank0_broadcast
from launcher.plan.quantities import format_count
from launcher.train.held_out_loss import EarlyStopping


@dataclass(frozen=True)
class Outcome:
    """How training ended. `state` is completed, cancelled (by a person) or preempted (by the machines, or a limit of the run).

    `reason` is completed or one of launcher.distributed.STOP_REASONS. `checkpoint` is None if nothing was trained or saved.
    """

    state: str
    reason: str
    step: int
    message: str
    checkpoint: Path | None

    @classmethod
    def completed(cls, step: int, checkpoint: Path) -> Outcome:
        """Return the outcome of a run that has reached the last step of its plan."""
        return cls("completed", "completed", step, format_count(step, "step"), checkpoint)

    @classmethod
    def early_stopped(cls, rank_info: RankInfo, step: int, early_stopping: EarlyStopping, best: Path, newest: Path) -> Outcome:
        """Return the outcome of a run that early stopping ended at `step`, with its best weights if they are kept. Collective.

        `best` and `newest` are the checkpoints of the best evaluation, which may have been removed, and of `step`.
        """
        message = f"{format_count(step, 'step')}; {early_stopping.message}"
        if rank0_broadcast(rank_info, "the best checkpoint cannot be read", best.is_dir):
            message, checkpoint = f"{message}; the weights of step {early_stopping.best_step} are used", best
        else:
            message = f"{message}; that step is not kept (see checkpoint.keep_best), so the last weights are used"
            checkpoint = newest
        return cls("completed", "completed", step, message, checkpoint)

    @classmethod
    def interrupted(
        cls, reason: str, limit: str, step: int, max_steps: int, kept_step: int, save_s: float | None, checkpoint: Path
    ) -> Outcome:
        """Return the outcome of an attempt that stopped at `step` for one of STOP_REASONS; `limit` is the limit that it reached.

        `kept_step` is the step of `checkpoint`: an earlier one if there was no time for a save, which takes `save_s` seconds.
        """
        state = "cancelled" if reason == "cancelled" else "preempted"
        causes = {"cancelled": "stopped on request", "preempted": "the machine was asked to stop", "limit": limit}
        result = f"saved at step {step} of {max_steps}"
        if kept_step != step:
            result = f"there was no time to save step {step}, which takes {save_s:.0f} s; step {kept_step} is kept"
        return cls(state, reason, kept_step, f"{causes[reason]}; {result}", checkpoint)

    @classmethod
    def untrained(cls, step: int, checkpoint: Path | None) -> Outcome:
        """Return the outcome of an attempt that a person cancelled before its first step: there was nothing to save.

        `checkpoint` is the one of `step` that the attempt started from, None if it started from the initial weights.
        """
        newest = "there is no checkpoint" if checkpoint is None else f"the newest checkpoint is of step {step}"
        return cls("cancelled", "cancelled", step, f"stopped before training had begun; {newest}", checkpoint)


class Stop(Protocol):
    """Returns this process's reason to stop, or None. `at` is the time.monotonic() of the request, None without one."""

    at: float | None

    def __call__(self) -> str | None: ...

    def cancel(self) -> None:
        """Request a stop as if a person had sent a signal; callable from any thread."""

    def begin_training(self) -> None:
        """End the phase in which a cancel ends the process at once because there is nothing to save."""


def has_time_to_save(
    cluster: ClusterSection, reason: str, asked_at: float | None, save_s: float | None, device: torch.device
) -> bool:
    """Return whether every rank can finish a save, if it takes as long as the last one, before the machines go away. Collective.

    `asked_at` is the time.monotonic() of the request to stop, and `save_s` the seconds of the last save; None if unknown. An
    interrupted save leaves nothing; committed checkpoints stay.
    """
    lead_s = cluster.save_lead_s
    if reason != "preempted" or lead_s is None or save_s is None:
        return True
    waited = time.monotonic() - asked_at if asked_at is not None else 0.0
    late = torch.tensor(float(save_s > lead_s - waited), device=device)
    dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return not late.item()
