"""The optimizer steps of a run: their number, the rows of each and its learning rate. Pure."""

from __future__ import annotations

import math

from launcher.config.sections.data import DataSection
from launcher.config.sections.train import OptimSection, TrainSection
from launcher.errors import ConfigError
from launcher.plan.launch_plan import Batch, DataFacts, LaunchPlan
from launcher.plan.quantities import format_count

# Tokens of one forward pass that keep a device busy; more only costs memory.
_TOKENS_PER_FORWARD = {"cuda": 8192, "cpu": 1024}
# A remedy aims for this many steps, if the data has as many rows.
_MORE_STEPS = 10
# A smaller relative change is not worth a note.
_NOTED_CHANGE = 0.01


def split_batch(train: TrainSection, data: DataSection, data_ranks: int, device: str, facts: DataFacts | None) -> Batch:
    """Derive micro-batch, accumulation and the number of steps.

    Raises:
        ConfigError: if the global batch does not divide over the ranks, or the rows per rank over the micro-batch.
    """
    total, micro = train.global_batch_size, train.micro_batch_size
    if total % data_ranks:
        lower, upper = total // data_ranks * data_ranks, math.ceil(total / data_ranks) * data_ranks
        sizes = " or ".join(str(s) for s in (lower, upper) if s)
        worlds = ", ".join(map(str, list_divisors(total)))
        raise ConfigError(
            f"train.global_batch_size={total} cannot be split evenly over {data_ranks} ranks",
            where="train.global_batch_size",
            value=str(total),
            remedy=f"set it to {sizes}, or use one of these numbers of ranks: {worlds}",
        )
    per_rank = total // data_ranks
    if micro is None:
        rows = max(1, _TOKENS_PER_FORWARD.get(device, 8192) // data.max_length)
        micro = max(d for d in list_divisors(per_rank) if d <= rows)
    elif per_rank % micro:
        raise ConfigError(
            f"train.micro_batch_size={micro} does not divide the {per_rank} rows that each of {data_ranks} ranks gets per step",
            where="train.micro_batch_size",
            value=str(micro),
            remedy=f"set it to one of {', '.join(map(str, list_divisors(per_rank)))}, or leave it unset",
        )
    steps = train.max_steps
    if steps is None and facts is not None and train.epochs is not None:
        # The last batch is filled with rows of the next epoch, so that every row is trained.
        steps = max(1, math.ceil(facts.num_rows * train.epochs / total))
    per_step = round(facts.num_tokens / facts.num_rows * total) if facts is not None and facts.num_rows else None
    return Batch(
        global_batch_size=total,
        micro_batch_size=micro,
        accumulation=per_rank // micro,
        max_tokens_per_step=total * data.max_length,
        tokens_per_step=per_step,
        max_steps=steps,
        epochs=round(steps * total / facts.num_rows, 4) if steps and facts is not None and facts.num_rows else train.epochs,
    )


def list_divisors(n: int) -> list[int]:
    """Return the divisors of `n` in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def single_step_warning(train: TrainSection, num_rows: int, data_ranks: int | None) -> str | None:
    """Return a warning, with a smaller batch, if all epochs of the data fit in one step; `data_ranks` is None if unknown."""
    batch, epochs, unit = train.global_batch_size, train.epochs, data_ranks or 1
    if train.max_steps is not None or epochs is None or num_rows * epochs > batch:
        return None
    smaller = max(unit, int(num_rows * epochs / _MORE_STEPS) // unit * unit)
    steps = math.ceil(num_rows * epochs / smaller)
    of = "" if data_ranks else " (if it divides over the ranks)"
    fewer = f"set train.global_batch_size={smaller} for {steps:,} steps{of}, or " if steps > 1 else ""
    return (
        f"the run has 1 step: {epochs:g} epoch{'s' * (epochs != 1)} of {format_count(num_rows, 'row')} "
        f"{'is' if epochs == 1 else 'are'} no more than one batch of {batch:,}: {fewer}"
        f"set train.epochs={math.ceil(_MORE_STEPS * batch / num_rows)} for {_MORE_STEPS} steps, or add documents"
    )


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
    """Describe how the learning rate changes where a run continues under another plan after `step`; None if it does not."""
    if step == 0 or saved.batch.max_steps is None or following.batch.max_steps is None or step >= following.batch.max_steps:
        return None
    planned = compute_learning_rate(saved.config.optim, step, saved.batch.max_steps)
    rate = compute_learning_rate(following.config.optim, step, following.batch.max_steps)
    if abs(rate - planned) <= _NOTED_CHANGE * max(rate, planned):
        return None
    last = compute_learning_rate(saved.config.optim, max(0, step - 1), saved.batch.max_steps)
    return f"the learning rate is {rate:.3g} in step {step + 1:,}, after {last:.3g} in step {step:,}"
