"""The cost of training and of requests, here and at hosted services whose prices the user supplies. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.config.sections.run import HostedPrice
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.throughput import SpeedEstimate
from launcher.tracking.verdicts import SideUsage

MILLION = 1_000_000


@dataclass(frozen=True)
class RequestCost:
    """The cost of a million requests like those in an evaluation, for one side.

    `usd_here` is the evaluation's GPU time at the price of a GPU hour, None if either is unknown; `usd_hosted` holds the price at
    each hosted service that has prices for requests.
    """

    prompt_tokens: float
    answer_tokens: float
    usd_here: float | None
    usd_hosted: dict[str, float]


def training_tokens(plan: LaunchPlan) -> int | None:
    """Return the number of tokens that a run trains on, counting each epoch, or None if the number of steps is unknown."""
    batch = plan.batch
    return None if batch.max_steps is None else batch.max_steps * batch.expected_tokens


def hosted_training(prices: Sequence[HostedPrice], tokens: int) -> dict[str, float]:
    """Return the cost of this many training tokens at each service that has a price for training."""
    return {price.name: price.training * tokens / MILLION for price in prices if price.training is not None}


def request_cost(usage: SideUsage, usd_per_gpu_hour: float | None, prices: Sequence[HostedPrice]) -> RequestCost:
    """Return the cost of a million requests, averaged over an evaluation's prompts."""
    prompt, answer = (tokens / max(usage.num_prompts, 1) for tokens in (usage.prompt_tokens, usage.answer_tokens))
    usd_here = None
    if usage.gpu_s is not None and usd_per_gpu_hour is not None:
        usd_here = usage.gpu_s / 3600 / max(usage.num_prompts, 1) * MILLION * usd_per_gpu_hour
    hosted = {
        # Prices are for a million tokens, and there are a million requests.
        price.name: prompt * price.input + answer * price.output
        for price in prices
        if price.input is not None and price.output is not None
    }
    return RequestCost(prompt, answer, usd_here, hosted)


def largest_usd(plan: LaunchPlan, speed: SpeedEstimate) -> float | None:
    """Return the maximum cost that is expected for a run, or that it is limited to, or None if unknown."""
    hourly = None if plan.price is None else plan.price.usd_per_gpu_hour * plan.topology.world_size
    limits = [plan.config.run.max_usd, None if speed.usd is None else speed.usd[1]]
    if hourly is not None and plan.config.run.max_hours is not None:
        limits.append(plan.config.run.max_hours * hourly)
    return min((usd for usd in limits if usd is not None), default=None)
