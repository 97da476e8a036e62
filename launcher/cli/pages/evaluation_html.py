"""A run's evaluations on the report page."""

from __future__ import annotations

import math
from typing import Any

from launcher.cli.evaluations import describe_saving, tabulate_costs
from launcher.cli.pages import charts
from launcher.cli.pages.charts import Series
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.verdicts import TUNED, AnswerExample, EvaluationVerdict, by_steps, format_difference, read_verdicts

_KINDS = {"win": "better than", "loss": "worse than", "tie": "the same as"}


def evaluation_contexts(run: RunDir, plan: LaunchPlan) -> list[dict[str, Any]]:
    """Return what the template shows for each evaluation, newest step first."""
    return [
        {
            "title": f"step {one.step:,}" + (f", set {one.set_name}" if one.set_name else ""),
            "sentence": one.verdict.sentence,
            "means": one.verdict.table,
            "pairs": _pairs(one.verdict),
            "costs": tabulate_costs(one.verdict, plan),
            "saved": describe_saving(one.verdict),
            "examples": [_example(example, one.verdict) for example in one.verdict.examples],
        }
        for one in sorted(read_verdicts(run), key=lambda one: -one.step)
    ]


def step_contexts(run: RunDir) -> list[dict[str, Any]]:
    """Return what the template shows for each set that was evaluated at several steps: a chart of the scores and a table."""
    contexts = []
    for one in by_steps(read_verdicts(run)):
        steps, name = [verdict.step for verdict in one.verdicts], one.set_name or "prompts"
        means = {side: [math.nan if mean is None else mean for mean in values] for side, values in one.means.items()}
        series = [Series(side, values) for side, values in means.items()]
        drawn = charts.lines(f"{one.metric} of {name}", [steps] * len(series), series, "step", "")
        contexts.append({"title": f"{name}, by step", "chart": drawn, "table": one.table})
    return contexts


def _pairs(verdict: EvaluationVerdict) -> tuple[list[str], list[list[str]]]:
    """Return the table of wins, losses and ties on the primary metric."""
    has_tests = any(one.p_value is not None for one in verdict.primary)
    header = [f"{verdict.metric.replace('_', ' ')} against", "difference", "better", "worse", "same"]
    rows = [
        [one.baseline, format_difference(one), f"{one.wins:,}", f"{one.losses:,}", f"{one.ties:,}"]
        + ([] if not has_tests else ["-" if one.p_value is None else f"p = {one.p_value:.2g}"])
        for one in verdict.primary
    ]
    return [*header, "exact test"] if has_tests else header, rows


def _example(example: AnswerExample, verdict: EvaluationVerdict) -> dict[str, Any]:
    sides = [TUNED, *(side for side in verdict.sides if side != TUNED)]
    return {
        "title": f"{_KINDS.get(example.kind, example.kind)} {example.baseline}",
        "texts": [
            ("prompt", example.prompt),
            ("reference", example.reference),
            *((side, example.answers.get(side, "")) for side in sides),
        ],
    }
