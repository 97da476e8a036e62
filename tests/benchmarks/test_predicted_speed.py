"""benchmarks/predicted_speed.py without a run: rates from measured seconds, fitted factors, and the results table."""

from __future__ import annotations

from collections.abc import Callable

import predicted_speed
import pytest
from plan_fixtures import config_of, plan_of
from predicted_speed import FACTORS, Outcome
from steps import faster_half

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_step, tokens_of_step

__all__ = ["config_of", "plan_of"]
# Seconds and bytes per second as benchmarks/cpu_rates.py prints them.
MEASURED = {
    "layer_s": 0.02,
    "head_s": 0.3,
    "attention_s": 0.001,
    "layer_bytes_per_s": 8e9,
    "loss_bytes_per_s": 4e9,
    "copied_bytes_per_s": 3e9,
    "states_bytes_per_s": 6e9,
    "gathered_bytes_per_s": 1e9,
    "reduce_factor": 1.5,
}
TRUE_FACTORS = (1.4, 2.0, 0.7, 1.2)


def planned(plan_of: Callable[..., LaunchPlan], *more: str) -> LaunchPlan:
    return plan_of("model=tiny", "model.dtype=bf16", "model.attention=varlen", *more)


def outcomes(plan_of: Callable[..., LaunchPlan]) -> list[Outcome]:
    """Made-up runs that take exactly as long as the model predicts with TRUE_FACTORS."""
    made = []
    for number, case in enumerate(predicted_speed.CASES[:-1]):
        plan = planned(plan_of, *case.overrides, "train.max_steps=8", "train.epochs=null")
        # Each run has different rates, so that no two parts are proportional.
        measured = {name: value * (1 + 0.3 * ((number * place) % 5)) for place, (name, value) in enumerate(MEASURED.items())}
        step = planned_step(plan, rates=predicted_speed.rates_of(plan, measured))
        assert step is not None
        outcome = Outcome(case, plan, parts=[step])
        outcome.step_s.append(outcome.predicted_s(TRUE_FACTORS))
        made.append(outcome)
    return made


def test_rates_give_the_seconds_that_were_measured(plan_of: Callable[..., LaunchPlan]) -> None:
    plan = planned(plan_of, "data.max_length=256", "train.micro_batch_size=4", "model.activation_checkpointing=all")
    step = planned_step(plan, rates=predicted_speed.rates_of(plan, MEASURED))
    assert step is not None
    assert plan.data is not None
    tokens, layers, micro_batches = 4 * 256, plan.model.num_layers, plan.batch.accumulation
    assert predicted_speed.shapes_of(plan)["chunk_tokens"] == tokens * plan.data.num_trained_tokens / plan.data.num_tokens
    # All trained tokens fit into one chunk.
    products_s = layers * MEASURED["layer_s"] * 4 / 3 + MEASURED["head_s"]
    assert step.products_s == pytest.approx(micro_batches * products_s)
    docs = tokens / predicted_speed.shapes_of(plan)["doc_tokens"]
    assert step.attention_s == pytest.approx(micro_batches * docs * layers * MEASURED["attention_s"] * 4 / 3)
    assert not step.runs_ahead


def test_shapes_are_those_of_the_models_products(plan_of: Callable[..., LaunchPlan]) -> None:
    plan = planned(plan_of, *predicted_speed.CASES[-2].overrides)
    shapes = predicted_speed.shapes_of(plan)
    weights = sum(inputs * outputs for inputs, outputs in shapes["products"])
    # Each layer also has two norms.
    assert plan.model.num_params == 12 * (weights + 2 * 512) + 49152 * 512 + 512
    assert shapes["tokens"] == 512


@pytest.mark.rest
def test_factors_are_found_again_and_errors_are_those_of_the_other_half(plan_of: Callable[..., LaunchPlan]) -> None:
    made = outcomes(plan_of)
    factors = predicted_speed.fit([outcome for outcome in made if outcome.case.is_fit])
    assert len(factors) == len(FACTORS)
    # Parts that hardly affect the time keep the assumed factor.
    for outcome in made:
        assert outcome.predicted_s(factors) == pytest.approx(outcome.measured_s, rel=0.03)
    lines = predicted_speed.table(made)
    assert sum("| fit |" in line for line in lines) == sum(case.is_fit for case in predicted_speed.CASES)
    assert any(line.startswith("5 configurations for the test: ") and "5 within 20%" in line for line in lines)
    # A run that takes twice the predicted time is reported as half as fast, and changes no factor.
    slow = made[-1]
    assert not slow.case.is_fit
    slow.step_s[0] *= 2
    row = next(line for line in predicted_speed.table(made) if slow.case.name in line)
    assert float(row.split("|")[-2].strip(" %")) > 90
    assert f"{tokens_of_step(slow.plan) / slow.step_s[0]:,.0f}" in row
    assert any("4 within 20%" in line for line in predicted_speed.table(made))


def test_nearly_half_of_the_configurations_is_for_the_test_and_all_names_differ() -> None:
    assert len({case.name for case in predicted_speed.CASES}) == len(predicted_speed.CASES) >= 8
    assert sum(not case.is_fit for case in predicted_speed.CASES) >= 6


def test_the_faster_half_is_what_other_programs_have_slowed_least() -> None:
    assert faster_half([3.0, 1.0, 9.0, 2.0, 8.0]) == 2.0
    assert faster_half([4.0]) == 4.0
