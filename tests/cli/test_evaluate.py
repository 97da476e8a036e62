"""--min-gain, when its condition is met, and the GPU price of an evaluation, whose settings may select another cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hand_made
import numpy as np
import pytest

from launcher.cli.evaluate import MinimumGain, find_price, parse_minimum_gains
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.evaluate.verdict import judge
from launcher.plan.gpu_types import Price, typical_price
from launcher.tracking.verdicts import EvaluationVerdict

METRICS = ("exact_match", "own/metric.py:score")


def verdict(tuned: int, few_shot: int, num_prompts: int = 200) -> EvaluationVerdict:
    """Return a verdict in which each side answers its first prompts correctly and all others wrongly."""
    right = {"0-shot": 0, "4-shot": few_shot, "tuned": tuned}
    return judge("exact_match", {side: (np.arange(num_prompts) < n).astype(np.float64) for side, n in right.items()})


def test_forms() -> None:
    assert parse_minimum_gains(["exact_match:few-shot:0.05", "own/metric.py:score:0-shot:-1e-1"], METRICS) == (
        MinimumGain("exact_match", "few-shot", 0.05),
        MinimumGain("own/metric.py:score", "0-shot", -0.1),
    )


def test_all_mistakes_are_reported_in_one_pass() -> None:
    texts = ["0.05", "exact_match:0.05", "exact_mach:0-shot:0.1", "exact_match:base:0.1", "exact_match:0-shot:nan"]
    with pytest.raises(ConfigError) as error:
        parse_minimum_gains(texts, METRICS)
    problems = error.value.problems
    assert [one.value for one in problems] == texts
    assert problems[2].remedy.startswith("did you mean exact_match? ")


@pytest.mark.parametrize(
    ("gain", "counts", "reason"),
    [
        ("exact_match:few-shot:0.10", (100, 60), None),
        ("exact_match:4-shot:0.10", (100, 60), None),
        (
            "exact_match:few-shot:0.18",
            (100, 60),
            r"to 4-shot by exact_match is \+0.20 \(0.1\d to 0.2\d\), its lower bound",
        ),
        ("exact_match:0-shot:0.18", (100, 60), None),
        ("exact_match:8-shot:0.0", (100, 60), "8-shot was not evaluated; baselines are 0-shot, 4-shot"),
        ("exact_match:few-shot:0.001", (5, 0), "with 5 answers that differ it may be chance"),
        ("exact_match:few-shot:0.001", (6, 0), None),
        # That no answer differs shows little, unless there are many prompts.
        ("exact_match:few-shot:0", (5, 5), r"\(-0.02 to 0.02\), its lower bound is below 0"),
        ("exact_match:few-shot:-0.01", (5, 5), "its lower bound is below -0.01"),
        ("exact_match:few-shot:-0.02", (5, 5), None),
    ],
)
def test_the_lower_bound_must_reach_the_gain(gain: str, counts: tuple[int, int], reason: str | None) -> None:
    (minimum,) = parse_minimum_gains([gain], METRICS)
    failure = minimum.failure(verdict(*counts))
    assert (failure is None) == (reason is None)
    assert re.search(reason or "", failure or "")


def test_tasks_have_metrics_of_their_own_and_one_baseline() -> None:
    assert parse_minimum_gains(["acc_norm:base:-0.02"], None) == (MinimumGain("acc_norm", "base", -0.02),)
    with pytest.raises(ConfigError):
        parse_minimum_gains(["acc:few-shot:0.1"], None)


@pytest.mark.parametrize(
    ("trained", "chosen", "price"),
    [
        ({"kind": "local", "price_per_gpu_hour": 2.0}, {"kind": "local", "price_per_gpu_hour": 3.0}, Price(3.0)),
        ({"kind": "local", "price_per_gpu_hour": 2.0}, {"kind": "slurm"}, None),
        ({"kind": "local"}, {"kind": "slurm", "gpu_type": "H100"}, typical_price("H100")),
        ({"kind": "local"}, {"kind": "slurm"}, None),
        ({"kind": "local"}, {"kind": "local"}, Price(1.5)),
    ],
)
def test_the_price_is_that_of_the_machines_that_answer(trained: dict[str, Any], chosen: dict[str, Any], price: Price) -> None:
    plan = hand_made.plan(Path("/srv/runs/demo"), {**hand_made.SETTINGS, "cluster": trained}, price=Price(1.5))
    config = RunConfig.model_validate({**hand_made.SETTINGS, "cluster": chosen})
    assert find_price(plan, config) == price
