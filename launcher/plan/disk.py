"""Checks whether a run's checkpoints fit on the disk of its directory. Pure: the caller measures the free bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import Problem
from launcher.plan.quantities import format_count, format_size

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

# Number of tokens whose logits a final checkpoint holds, to verify an export (launcher.train.checkpointer).
REFERENCE_TOKENS = 64
# File headers, the state of the loader and of the random generators, the manifest.
_SMALL_FILES_BYTES = 256 * 1024
_REMEDY = "free space on this disk, or put run.root on a larger one"


def checkpoints_at_once(plan: LaunchPlan) -> int:
    """Return the largest number of checkpoints on disk at a time: those that are kept, and the one being written."""
    checkpoint, max_steps = plan.config.checkpoint, plan.batch.max_steps
    num_kept = checkpoint.keep_last + checkpoint.keep_best
    if max_steps is None:
        return num_kept + 1
    if checkpoint.keep_every:
        num_kept += max_steps // checkpoint.keep_every
    num_saves = -(-max_steps // checkpoint.save_every) if checkpoint.save_every else 1
    return min(num_kept + 1, num_saves)


def needed_bytes(plan: LaunchPlan, count: int = 1) -> int:
    """Return the bytes that `count` checkpoints take on disk, including the last checkpoint of the run.

    Each holds states and small files; the last one also holds the reference logits that verify an export.
    """
    logit_bytes = 4 if plan.config.model.dtype == "fp32" else 2
    return count * (plan.checkpoint_bytes + _SMALL_FILES_BYTES) + REFERENCE_TOKENS * plan.model.vocab_size * logit_bytes


def refusal(plan: LaunchPlan, available: int) -> Problem | None:
    """Return the problem if not even one checkpoint fits; None if one does."""
    needed = needed_bytes(plan)
    if available >= needed:
        return None
    return Problem(
        "the disk of the run directory has no room for a single checkpoint",
        where=f"run.root, {plan.run_dir}",
        value=f"needed {format_size(needed)}, available {format_size(available)}",
        remedy=_REMEDY,
    )


def note(plan: LaunchPlan, available: int, present: int) -> str | None:
    """Return a note if fewer checkpoints fit than will be kept; None if all fit. `present` of them exist already."""
    count = max(1, checkpoints_at_once(plan) - present)
    needed = needed_bytes(plan, count)
    if available >= needed:
        return None
    more = format_count(count, "more checkpoint" if present else "checkpoint")
    fewer = "lower checkpoint.keep_last, " if plan.config.checkpoint.keep_last > 1 else ""
    # Another checkpoint is written before an older one is removed.
    including = ", including the one that is written before an older one is removed" if count > 1 or present else ""
    return (
        f"the disk of the run directory has {format_size(available)} free and needs {format_size(needed)} for {more}{including}: "
        f"free space, {fewer}or move run.root"
    )
