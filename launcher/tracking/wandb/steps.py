"""W&B's own step, which only grows, of what was measured by a run that may go back to a checkpoint."""

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
    """How much W&B's step is more than trainer/step, by attempt; `last_steps` are the highest that the attempts have measured.

    `returns` gives the step of the checkpoint to which a person has gone back, or from which the steps have other results than
    before, by the attempt that began there: what follows comes after all that W&B has. After a crash an attempt trains the same
    steps with the same result, so it has the offset of the one before.
    """
    found: dict[int, int] = {}
    offset = highest = 0
    for attempt in sorted({*last_steps, *returns}):
        offset = max(offset, highest - returns.get(attempt, highest))
        found[attempt] = offset
        highest = max(highest, last_steps.get(attempt, 0) + offset)
    return found


def repeats(before: LaunchPlan, after: LaunchPlan) -> bool:
    """Whether the steps that an attempt of the plan `before` has trained have the same results and learning rates in `after`."""
    # Only the learning rate looks at how many steps there will be.
    alike = before.batch.max_steps == after.batch.max_steps or after.config.optim.schedule == "constant"
    rows = [None if plan.data is None else plan.data.digest for plan in (before, after)]
    return alike and rows[0] == rows[1] and has_same_computation(before.config, after.config)


def returns(run: RunDir) -> dict[int, int]:
    """The attempts for which a person has asked for the step of a checkpoint or changed what steps compute; where they began."""
    found = {}
    before = _plan_at(run.plan)
    for number in run_store.attempt_numbers(run):
        with suppress(OSError, LauncherError):
            attempt = run_store.read_attempt(run, number)
            # Those that no person has started may have plans of their own, for other numbers of ranks.
            after = before if attempt.automatic else _plan_at(run.attempt(number) / "plan.json") or before
            changed = before is not None and after is not None and not repeats(before, after)
            if attempt.pinned or changed:
                found[number] = attempt.resume_step or 0
            before = after
    return found


def _plan_at(path: Path) -> LaunchPlan | None:
    """The plan in a file; None where there is none that can be read."""
    with suppress(OSError, ValueError):
        return LaunchPlan.load(path)
    return None
