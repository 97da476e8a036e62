"""Evaluations as sections: what `evaluate` shows, what the page of a run shows, and what requests cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from launcher.cli.render.sections import ChartCurve, Charts, Items, LineChart, Part, Rows, Section, Table, Text, Tone
from launcher.config.schema import RunConfig
from launcher.plan.gpu_types import Price, typical_price
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import short_path
from launcher.tracking.costs import request_cost
from launcher.tracking.metrics import format_duration
from launcher.tracking.verdicts import TUNED, EvaluationVerdict, by_steps, format_difference, read_verdicts

_MAX_STYLES = 12
_MAX_COPIES = 10
_KINDS = {"win": "better than", "loss": "worse than", "tie": "the same as"}
_TONES: dict[str, Tone] = {"better": "good", "worse": "bad"}


def show_sets(shown: dict[str, Any]) -> list[Part]:
    """Return what `evaluate` shows, from the answer of launcher.evaluate.evaluation and the costs of each set."""
    parts: list[Part] = [Text(f"{shown['run']}, step {shown['step']}")]
    for name, result in shown["sets"].items():
        verdict = result["verdict"]
        inner: list[Part] = [Section("", [_make_table(result["header"], result["rows"])])]
        if result["costs"]:
            saved = [Text(result["saved_tokens"])] if result["saved_tokens"] else []
            inner.append(Section("requests like these", [_make_table(*result["costs"]), *saved]))
        styles = [f"{side}: {style}" for side, style in result["styles"].items()]
        inner.append(Section("", [Items([*styles, *result["left_out"]])]))
        if copies := result["training_copies"]:
            more = [f"and {len(copies) - _MAX_COPIES:,} more"] if len(copies) > _MAX_COPIES else []
            inner.append(Section("prompts that are also in the training data", [Items([*copies[:_MAX_COPIES], *more])]))
        parts.append(Section(f"{name}: {verdict['sentence']}", inner, _TONES.get(verdict["outcome"], "")))
    if shown["overlap_gap"]:
        parts.append(Section("", [Text(shown["overlap_gap"])]))
    if shown["selection"]:
        best = sorted(shown["selection"], key=lambda one: -one["score"])[:_MAX_STYLES]
        styles = [f"{one['score']:.3f}  {one['style']}" for one in best]
        parts.append(Section("prompt forms of the base model, compared on training rows", [Items(styles)]))
    about = f"{shown['engine']}, {shown['dtype']}, {format_duration(shown['seconds'])}; answers in {short_path(shown['folder'])}"
    return [*parts, Section("", [Text(about)])]


def show_tasks(shown: dict[str, Any]) -> list[Part]:
    """Return what `evaluate --tasks` shows, from the answer of launcher.evaluate.tasks."""
    parts: list[Part] = [Text(f"{shown['run']}, step {shown['step']}")]
    for task, result in shown["tasks"].items():
        title, inner = f"{task}, {result['num_questions']:,} questions:", list[Part]()
        tone: Tone = ""
        if verdict := result.get("verdict"):
            title, tone = f"{title} {verdict['sentence']}", _TONES.get(verdict["outcome"], "")
            inner.append(Section("", [_make_table(result["header"], result["rows"])]))
        # For example BLEU: computed from all answers together, so its spread is unknown.
        for metric, values in result["whole"].items():
            means = ", ".join(f"{side} {value:.4g}" for side, value in values.items())
            inner.append(Text(f"{metric}, of all questions together: {means}"))
        parts.append(Section(title, inner, tone))
    return [*parts, Section("", [Text(f"scores in {short_path(shown['folder'])}")])]


def show_verdicts(run: RunDir, plan: LaunchPlan) -> list[Section]:
    """Return a run's evaluations for its page: sets that were evaluated at several steps, then each verdict, newest first."""
    verdicts, sections = read_verdicts(run), []
    for one in by_steps(verdicts):
        steps, name = [verdict.step for verdict in one.verdicts], one.set_name or "prompts"
        means = {side: [math.nan if mean is None else mean for mean in values] for side, values in one.means.items()}
        chart = LineChart(f"{one.metric} of {name}", [ChartCurve(side, steps, values) for side, values in means.items()], "step")
        header, rows = one.table
        sections.append(Section(f"{name}, by step", [Charts([chart]), Table(header, rows, range(len(header)))]))
    for newest in sorted(verdicts, key=lambda one: -one.step):
        verdict = newest.verdict
        parts: list[Part] = [Text(verdict.sentence), _make_table(*verdict.table)]
        has_tests = any(one.p_value is not None for one in verdict.primary)
        header = [f"{verdict.metric.replace('_', ' ')} against", "difference", "better", "worse", "same"]
        pairs = [
            [one.baseline, format_difference(one), f"{one.wins:,}", f"{one.losses:,}", f"{one.ties:,}"]
            + ([] if not has_tests else ["-" if one.p_value is None else f"p = {one.p_value:.2g}"])
            for one in verdict.primary
        ]
        parts += [_make_table([*header, *(["exact test"] if has_tests else [])], pairs)] if pairs else []
        if (costs := tabulate_costs(verdict, plan)) is not None:
            parts += [Text(f"Costs of requests like these. {describe_saving(verdict)}", "soft"), _make_table(*costs)]
        sides = [TUNED, *(side for side in verdict.sides if side != TUNED)]
        examples = [
            Section(
                f"{_KINDS.get(one.kind, one.kind)} {one.baseline}",
                [
                    Rows(
                        [
                            ("prompt", one.prompt),
                            ("reference", one.reference),
                            *((side, one.answers.get(side, "")) for side in sides),
                        ]
                    )
                ],
            )
            for one in verdict.examples
        ]
        parts += [Section(f"{len(examples)} answers, side by side", examples, is_folded=True)] if examples else []
        sections.append(Section(f"step {newest.step:,}" + (f", set {newest.set_name}" if newest.set_name else ""), parts))
    return sections


def _make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(header, rows, range(1, len(header)))


def find_price(plan: LaunchPlan, config: RunConfig) -> Price | None:
    """Return the price of a GPU under an evaluation's settings, which may choose a different cluster from the run's."""
    cluster, trained = config.cluster, plan.config.cluster
    if cluster.price_per_gpu_hour is not None:
        return Price(usd_per_gpu_hour=cluster.price_per_gpu_hour)
    if cluster.gpu_type is not None:
        return typical_price(cluster.gpu_type)
    is_same = cluster.kind == trained.kind and trained.price_per_gpu_hour is None and trained.gpu_type is None
    return plan.price if is_same else None


def tabulate_costs(verdict: EvaluationVerdict, plan: LaunchPlan) -> tuple[list[str], list[list[str]]] | None:
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


def describe_saving(verdict: EvaluationVerdict) -> str:
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
