"""Which checkpoints a run keeps: by steps and losses, and across attempts that evaluated different rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher import json_records, run_store
from launcher.checkpoint.manifest import HELD_OUT
from launcher.plan.run_dir import RunDir

if TYPE_CHECKING:
    from launcher.checkpoint.manifest import Checkpoint
    from launcher.config.sections.train import CheckpointSection
    from launcher.plan.launch_plan import LaunchPlan


@dataclass(frozen=True)
class Retention:
    """The newest `keep_last`, every step that `keep_every` divides, and the `keep_best` with the lowest loss of `best_set`.

    0 turns a rule off, except that the newest checkpoint is always kept. `rows` is the digest of the set's rows, and `other_rows`
    are the digests of plans in which the set has other rows: losses on those count only where too few are on these rows.
    """

    keep_last: int = 1
    keep_every: int = 0
    keep_best: int = 0
    best_set: str = HELD_OUT
    rows: str = ""
    other_rows: frozenset[str] = frozenset()

    @classmethod
    def of(cls, checkpoint: CheckpointSection, rows: str = "", other_rows: frozenset[str] = frozenset()) -> Retention:
        """Build the rules from a run's settings."""
        return cls(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best, checkpoint.best_set, rows, other_rows)

    def is_on_other_rows(self, checkpoint: Checkpoint) -> bool:
        """Return whether the loss of a checkpoint is of other rows of `best_set`."""
        later = checkpoint.later_evaluation
        if later is not None and later.eval_rows:
            return later.eval_rows != self.rows
        return checkpoint.manifest.plan_digest in self.other_rows


def retention_reasons(checkpoints: Sequence[Checkpoint], retention: Retention) -> dict[int, tuple[str, ...]]:
    """Return why each step is kept: any of `newest`, `every N` and `best`; an empty tuple if it would be pruned."""
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    newest = set(steps[-max(1, retention.keep_last) :])
    # The lowest losses; of equal losses, the later step. A step at which the set was not evaluated is no candidate.
    ranked = sorted(
        (retention.is_on_other_rows(checkpoint), checkpoint.eval_loss, -checkpoint.step)
        for checkpoint in checkpoints
        if checkpoint.eval_set == retention.best_set and checkpoint.eval_loss is not None and math.isfinite(checkpoint.eval_loss)
    )
    best = {-step for _, _, step in ranked[: retention.keep_best]}
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
    """Return the checkpoints that no rule keeps, in the given order."""
    kept = retention_reasons(checkpoints, retention)
    return [checkpoint for checkpoint in checkpoints if not kept[checkpoint.step]]


def retention_of(run: RunDir, plan: LaunchPlan) -> Retention:
    """Return the rules of a plan of the run; `keep_best` prefers losses on the plan's evaluation rows."""
    # Commands that show runs import this module without the settings.
    from launcher.plan.launch_plan import LaunchPlan, digest_of

    section = plan.config.checkpoint
    if not section.keep_best:
        return Retention.of(section)
    rows, plans_with_other_rows = plan.eval_rows_digest(section.best_set), set()
    for path in (run.plan, *run_store.changed_plan_paths(run), *run.plans.glob("*.json")):
        # Nothing is known of the rows of a plan that cannot be read, so its checkpoints count.
        with suppress(OSError, ValueError):
            text = json_records.read_bytes(path).decode()
            if LaunchPlan.from_json(text).eval_rows_digest(section.best_set) != rows:
                plans_with_other_rows.add(digest_of(text))
    return Retention.of(section, rows, frozenset(plans_with_other_rows))
