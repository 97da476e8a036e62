"""The cost of a million requests like those in an evaluation, side by side."""

from __future__ import annotations

from launcher.config.schema import RunConfig
from launcher.plan.gpu_types import Price, typical_price
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.costs import request_cost
from launcher.tracking.verdicts import TUNED, EvaluationVerdict


def price_of_evaluation(plan: LaunchPlan, config: RunConfig) -> Price | None:
    """Return the price of a GPU under an evaluation's settings, which may choose a different cluster from the run's."""
    cluster, trained = config.cluster, plan.config.cluster
    if cluster.price_per_gpu_hour is not None:
        return Price(usd_per_gpu_hour=cluster.price_per_gpu_hour)
    if cluster.gpu_type is not None:
        return typical_price(cluster.gpu_type)
    is_same = cluster.kind == trained.kind and trained.price_per_gpu_hour is None and trained.gpu_type is None
    return plan.price if is_same else None


def request_cost_table(verdict: EvaluationVerdict, plan: LaunchPlan) -> tuple[list[str], list[list[str]]] | None:
    """Return header and rows: tokens per request and the price of a million, for each side, or None if tokens are unknown."""
    if not verdict.usage:
        return None
    price = None if plan.price is None or plan.topology.device != "cuda" else plan.price.usd_per_gpu_hour
    hosted = plan.config.costs.hosted
    costs = {side: request_cost(verdict.usage[side], price, hosted) for side in verdict.sides if side in verdict.usage}
    is_priced = any(cost.usd_here is not None for cost in costs.values())
    services = list(dict.fromkeys(name for cost in costs.values() for name in cost.usd_hosted))
    header = ["side", "prompt tokens", "answer tokens", *(["million requests here"] if is_priced else []), *services]
    rows = [
        [
            side,
            f"{cost.prompt_tokens:,.0f}",
            f"{cost.answer_tokens:,.0f}",
            *([f"${cost.usd_here:,.0f}" if cost.usd_here is not None else "-"] if is_priced else []),
            *(f"${cost.usd_hosted[name]:,.0f}" for name in services),
        ]
        for side, cost in costs.items()
    ]
    return header, rows


def saved_tokens(verdict: EvaluationVerdict) -> str:
    """Return the prompt tokens that the tuned model saves compared with the base model with the most examples; empty if none."""
    if TUNED not in verdict.usage:
        return ""
    tokens = {side: one.prompt_tokens / max(one.num_prompts, 1) for side, one in verdict.usage.items()}
    longest = max(tokens, key=lambda side: tokens[side])
    saved = tokens[longest] - tokens[TUNED]
    if saved < 1:
        return ""
    return (
        f"A prompt has {tokens[TUNED]:,.0f} tokens for the tuned model and {tokens[longest]:,.0f} with {longest}: "
        f"{saved:,.0f} fewer for each request."
    )
