"""The learning rate of each step. Pure."""

from __future__ import annotations

import math

from launcher.config.resume import differing
from launcher.config.sections.train import OptimSection
from launcher.plan.launch_plan import LaunchPlan

# A smaller relative change is not worth a note.
_NOTED_CHANGE = 0.01
# The settings of optim that the learning rate depends on.
_SETTINGS = ("lr", "warmup_steps", "schedule", "decay_fraction", "min_lr_ratio")


def compute_learning_rate(optim: OptimSection, step: int, max_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule down to min_lr_ratio.

    wsd holds the peak and decays linearly over the last `decay_fraction` of all steps
    (Hu et al. 2024, arXiv:2404.06395).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    last = max(max_steps - 1, optim.warmup_steps)
    if optim.schedule == "wsd":
        start = max(optim.warmup_steps, round(max_steps * (1 - optim.decay_fraction)) - 1)
    else:
        start = optim.warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


def describe_changed_rate(saved: LaunchPlan, following: LaunchPlan, step: int) -> str | None:
    """Describe how the learning rate changes where a run with a checkpoint at `step` continues under another plan.

    Returns:
        None if the rate of the next step is the same under both plans, or if the number of steps is not known.
    """
    if step == 0 or saved.batch.max_steps is None or following.batch.max_steps is None or step >= following.batch.max_steps:
        return None
    planned = compute_learning_rate(saved.config.optim, step, saved.batch.max_steps)
    rate = compute_learning_rate(following.config.optim, step, following.batch.max_steps)
    if abs(rate - planned) <= _NOTED_CHANGE * max(rate, planned):
        return None
    last = compute_learning_rate(saved.config.optim, max(0, step - 1), saved.batch.max_steps)
    change = f"the learning rate is {rate:.3g} in step {step + 1:,}, after {last:.3g} in step {step:,}"
    causes = [
        f"{one.key}={one.requested} ({one.saved} in the checkpoint)"
        for one in differing(saved.config.optim.model_dump(), following.config.optim.model_dump(), "optim")
        if one.key.removeprefix("optim.") in _SETTINGS
    ]
    if saved.batch.max_steps != following.batch.max_steps:
        causes.append(f"its schedule now ends at step {following.batch.max_steps:,} instead of {saved.batch.max_steps:,}")
    return f"{change}: {', and '.join(causes)}"
