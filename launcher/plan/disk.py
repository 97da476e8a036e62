"""Whether a run's checkpoints fit where they are to lie. Pure: the free bytes are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import Problem

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

_REMEDY = "free space on this disk, or put run.root on a larger one"


def checkpoints_at_once(plan: LaunchPlan) -> int:
    """The most checkpoints that lie there at one time: those that are kept, and the one that is being written."""
    checkpoint, max_steps = plan.config.checkpoint, plan.batch.max_steps
    kept = checkpoint.keep_last + checkpoint.keep_best
    if max_steps is None:
        return kept + 1
    if checkpoint.keep_every:
        kept += max_steps // checkpoint.keep_every
    saves = -(-max_steps // checkpoint.save_every) if checkpoint.save_every else 1
    return min(kept + 1, saves)


def refusal(plan: LaunchPlan, available: int) -> Problem | None:
    """What is wrong where not even one checkpoint fits: training could not be saved."""
    needed = plan.checkpoint_bytes
    if available >= needed:
        return None
    return Problem(
        "the disk of the run directory has no room for a single checkpoint",
        where=f"run.root, {plan.run_dir}",
        value=f"needed {needed:,} bytes, available {available:,} bytes",
        remedy=_REMEDY,
    )


def note(plan: LaunchPlan, available: int, present: int) -> str | None:
    """What a person should know where fewer fit than will be kept; `present` of them lie there already."""
    count = max(1, checkpoints_at_once(plan) - present)
    needed = count * plan.checkpoint_bytes
    if available >= needed:
        return None
    more = f"{count}{' more' if present else ''} checkpoint{'s' if count > 1 else ''}"
    return (
        f"the disk of the run directory has {available:,} bytes free, and it takes {needed:,} for {more}, counting the one that "
        "is written before an older one is removed: free space, keep fewer (checkpoint.keep_last), or move run.root"
    )
