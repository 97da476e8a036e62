"""Which checkpoints a run keeps. Pure: looks at steps and held-out losses, touches no disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.checkpoint.manifest import Checkpoint
    from launcher.config.train import CheckpointSection


@dataclass(frozen=True)
class Retention:
    """The newest `keep_last`, every step that `keep_every` divides, and the `keep_best` with the lowest held-out loss.

    0 turns a rule off, except that the newest checkpoint is always kept.
    """

    keep_last: int = 1
    keep_every: int = 0
    keep_best: int = 0

    @classmethod
    def of(cls, checkpoint: CheckpointSection) -> Retention:
        """What a run's settings say."""
        return cls(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best)


def retention_reasons(checkpoints: Sequence[Checkpoint], retention: Retention) -> dict[int, tuple[str, ...]]:
    """Why each step is kept: any of `newest`, `every N`, `best`; nothing where it would be pruned."""
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    newest = set(steps[-max(1, retention.keep_last) :])
    best = _best(checkpoints, retention.keep_best)
    every = retention.keep_every
    return {
        step: (
            *(["newest"] if step in newest else []),
            *([f"every {every}"] if every and step % every == 0 else []),
            *(["best"] if step in best else []),
        )
        for step in steps
    }


def select_outdated(checkpoints: Sequence[Checkpoint], retention: Retention) -> list[Checkpoint]:
    """The checkpoints that no rule keeps, in the order given."""
    kept = retention_reasons(checkpoints, retention)
    return [checkpoint for checkpoint in checkpoints if not kept[checkpoint.step]]


def _best(checkpoints: Sequence[Checkpoint], count: int) -> set[int]:
    """The steps of the lowest losses, of equal ones the later; what was not evaluated takes no part."""
    losses = [(checkpoint.manifest.eval_loss, -checkpoint.step) for checkpoint in checkpoints]
    evaluated = [(loss, step) for loss, step in losses if loss is not None and math.isfinite(loss)]
    return {-step for _, step in sorted(evaluated)[:count]}
