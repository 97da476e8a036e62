"""W&B's own step, which only grows, of what was measured by a run that may go back to a checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.config.resume import computes_alike
from launcher.plan.launch_plan import LaunchPlan


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
    return alike and rows[0] == rows[1] and computes_alike(before.config, after.config)
