"""W&B's own step, which only grows, for a run that may go back to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher import run_store
from launcher.config.resume import has_same_computation
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir


def offsets(last_steps: Mapping[int, int], returns: Mapping[int, int]) -> dict[int, int]:
    """Return W&B's step minus trainer/step by attempt.

    After a crash, an attempt repeats steps with the same results, so it has the previous attempt's offset. After a return to an
    earlier step, its steps come after all steps that W&B has.

    Args:
        last_steps: last logged step by attempt.
        returns: by attempt, the checkpoint step from which a person restarted the run or changed its results.
    """
    offset_of: dict[int, int] = {}
    offset = highest = 0
    for attempt in sorted({*last_steps, *returns}):
        offset = max(offset, highest - returns.get(attempt, highest))
        offset_of[attempt] = offset
        highest = max(highest, last_steps.get(attempt, 0) + offset)
    return offset_of


def repeats(before: LaunchPlan, after: LaunchPlan) -> bool:
    """Return whether the steps of an attempt of plan `before` have the same results and learning rates under `after`."""
    # Only the schedule of the learning rate depends on the number of steps.
    alike = before.batch.max_steps == after.batch.max_steps or after.config.optim.schedule == "constant"
    rows = [None if plan.data is None else plan.data.digest for plan in (before, after)]
    return alike and rows[0] == rows[1] and has_same_computation(before.config, after.config)


def returns(run: RunDir) -> dict[int, int]:
    """Return, by attempt, the start step of attempts for which a person chose a checkpoint or changed the results of steps."""
    starts = {}
    before = _plan_at(run.plan)
    for number in run_store.attempt_numbers(run):
        with suppress(OSError, LauncherError):
            attempt = run_store.read_attempt(run, number)
            # Automatic attempts may have their own plans for different numbers of ranks.
            after = before if attempt.automatic else _plan_at(run.attempt(number) / "plan.json") or before
            changed = before is not None and after is not None and not repeats(before, after)
            if attempt.pinned or changed:
                starts[number] = attempt.resume_step or 0
            before = after
    return starts


def _plan_at(path: Path) -> LaunchPlan | None:
    """Return the plan in a file, or None if it cannot be read."""
    with suppress(OSError, ValueError):
        return LaunchPlan.load(path)
    return None
