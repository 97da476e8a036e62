"""When an evaluation concludes that fine-tuning helped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_made import made_verdict

from launcher.evaluate.verdict import Scores, exact_mcnemar, judge, mean_interval, t_quantile
from launcher.plan.run_dir import RunDir
from launcher.tracking.verdicts import (
    ComparisonOutcome,
    EvaluationVerdict,
    GeneralLoss,
    digest_checkpoint,
    read_verdict,
    read_verdicts,
    remove_verdicts,
)

BETTER, WORSE, UNCLEAR = ComparisonOutcome.BETTER, ComparisonOutcome.WORSE, ComparisonOutcome.UNCLEAR


def binary(num_right: int, num_prompts: int = 400) -> Scores:
    """Return the scores of a side that answers the first `num_right` prompts correctly."""
    return (np.arange(num_prompts) < num_right).astype(np.float64)


def judged(tuned: Scores, **baselines: Scores) -> EvaluationVerdict:
    return judge("exact_match", {**{name.replace("_", "-"): scores for name, scores in baselines.items()}, "tuned": tuned})


def test_helped_against_each_baseline() -> None:
    verdict = judge(
        "exact_match",
        {"0-shot": binary(48), "8-shot": binary(76), "tuned": binary(124)},
        others={"stopped": {"0-shot": binary(100), "8-shot": binary(400), "tuned": binary(400)}},
        general_loss=GeneralLoss(2.50, 2.51),
    )
    assert verdict.outcome == BETTER
    assert verdict.sentence.startswith(
        "Fine-tuning helped: exact match 0.31 against 0.12 (0-shot) and 0.19 (8-shot); difference to 8-shot +0.12 (0.09 to 0.16)."
    )
    assert verdict.sentence.endswith(" General loss rose by 0.01: no sign of forgetting.")
    header, rows = verdict.table
    assert header == ["metric", "0-shot", "8-shot", "tuned", "difference to 0-shot", "difference to 8-shot"]
    assert rows[1] == ["stopped", "0.250", "1.000", "1.000", "+0.75 (0.71 to 0.79)", "+0.00 (-0.01 to 0.01)"]
    (_, few_shot) = verdict.primary
    assert (few_shot.wins, few_shot.losses, few_shot.ties, few_shot.p_value) == (48, 0, 352, None)
    assert few_shot.win_examples == (76, 77, 78, 79, 80)


def test_a_baseline_that_is_not_beaten_leaves_it_open() -> None:
    verdict = judged(binary(100), **{"0_shot": binary(50), "8_shot": binary(97)})
    assert verdict.outcome == UNCLEAR
    assert verdict.sentence.startswith("The data cannot tell whether fine-tuning helped: exact match 0.25 against")
    assert "It is better than 0-shot. " in verdict.sentence
    assert "prompts could tell a difference of 0.05; 400 were used." in verdict.sentence


def test_without_a_base_model_the_sentence_says_why() -> None:
    assert "started from random weights" in judged(binary(100)).sentence


def test_the_number_of_prompts_belongs_to_the_difference_that_is_named() -> None:
    """20 wins and 28 losses against 0-shot, ten of each against 8-shot: the smaller difference needs more prompts."""
    tuned = binary(50, 100)
    zero_shot, eight_shot = tuned.copy(), tuned.copy()
    zero_shot[:20], zero_shot[50:78] = 0, 1
    eight_shot[:10], eight_shot[50:60] = 0, 1
    verdict = judged(tuned, **{"0_shot": zero_shot, "8_shot": eight_shot})
    first, second = verdict.primary
    assert (first.outcome, second.outcome) == (UNCLEAR, UNCLEAR)
    assert (first.prompts_needed or 0) < 600 < (second.prompts_needed or 0)
    assert "difference to 0-shot -0.08" in verdict.sentence
    assert verdict.sentence.endswith("About 590 prompts could tell a difference of 0.08; 100 were used.")


@pytest.mark.parametrize(("wins", "outcome"), [(5, UNCLEAR), (6, BETTER)])
def test_few_pairs_that_differ_are_judged_by_the_exact_test(wins: int, outcome: ComparisonOutcome) -> None:
    """The interval alone would accept five wins out of five."""
    verdict = judged(binary(20 + wins, 50), **{"0_shot": binary(20, 50)})
    (comparison,) = verdict.primary
    assert comparison.p_value == pytest.approx(2 / 2**wins)
    assert verdict.outcome == comparison.outcome == outcome
    assert f"{wins} better and 0 worse answers, exact test p = " in verdict.sentence


@pytest.mark.parametrize("num_prompts", [0, 1, 50])
def test_a_model_against_itself_cannot_tell(num_prompts: int) -> None:
    scores = np.random.default_rng(1).random(num_prompts)
    verdict = judged(scores, **{"0_shot": scores, "8_shot": scores})
    assert verdict.outcome == UNCLEAR
    assert "cannot tell" in verdict.sentence
    assert all(one.prompts_needed and one.prompts_needed > num_prompts for one in verdict.primary)


@pytest.mark.rest
@pytest.mark.parametrize("is_graded", [False, True])
def test_without_a_difference_few_verdicts_say_otherwise(is_graded: bool) -> None:
    """Of 200 comparisons between equally good sides, with two baselines, at most 5% may find a difference."""
    generator = np.random.default_rng(23)
    outcomes = []
    for trial in range(200):
        num_prompts = (20, 50, 200)[trial % 3]
        difficulty = generator.random(num_prompts)
        sides = {
            side: generator.beta(difficulty + 0.2, 1.2 - difficulty)
            if is_graded
            else (generator.random(num_prompts) < difficulty)
            for side in ("0-shot", "8-shot", "tuned")
        }
        outcomes.append(judge("token_f1", {side: np.asarray(values, np.float64) for side, values in sides.items()}).outcome)
    assert sum(outcome != UNCLEAR for outcome in outcomes) <= 10


def test_intervals_equal_those_of_references() -> None:
    """References: scipy 1.16 (ttest_1samp, t.ppf) and statsmodels 0.14 (mcnemar, exact)."""
    for probability, degrees, expected in ((0.975, 9, 2.26216), (0.995, 4, 4.60409), (0.975, 5_000, 1.96044)):
        assert t_quantile(probability, degrees) == pytest.approx(expected, rel=0.003)
    assert exact_mcnemar(9, 1) == pytest.approx(0.021484375)
    assert exact_mcnemar(3, 3) == exact_mcnemar(0, 0) == 1
    assert mean_interval(np.arange(10.0)) == pytest.approx((2.33415, 6.66585), abs=0.01)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (2.5, "General loss did not change: no sign of forgetting."),
        (2.4, "General loss fell by 0.10: no sign of forgetting."),
        (2.9, "General loss rose by 0.40 (16%) on general text: the model has forgotten some of what it knew."),
    ],
)
def test_the_loss_of_general_text_joins_the_sentence(after: float, words: str) -> None:
    scores = {"0-shot": binary(1), "tuned": binary(100)}
    assert judge("numeric", scores, general_loss=GeneralLoss(2.5, after)).sentence.endswith(words)


def test_a_verdict_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    verdict = judge("numeric", {"0-shot": binary(1, 1), "tuned": binary(1, 1)}, general_loss=GeneralLoss(2.0, 2.0))
    assert verdict.primary[0].low is None
    verdict.write(tmp_path)
    assert read_verdict(tmp_path) == verdict
    assert read_verdict(tmp_path / "other") is None


def test_a_verdict_about_weights_that_were_replaced_is_not_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    folder, manifest = tmp_path / "evaluations/step-00000007", run.checkpoints / "step-00000007/manifest.json"
    (folder / "held_out").mkdir(parents=True)
    manifest.parent.mkdir(parents=True)
    manifest.write_text("first")
    verdict = replace(made_verdict(), checkpoint=digest_checkpoint(run, 7))
    for place in (folder, folder / "held_out"):
        verdict.write(place)
    assert [(one.step, one.set_name) for one in read_verdicts(run)] == [(7, "held_out")]
    manifest.write_text("after a return to step 3")
    assert read_verdicts(run) == []
    # A verdict remains valid after its checkpoint is removed.
    manifest.unlink()
    assert len(read_verdicts(run)) == 1
    remove_verdicts(folder)
    assert read_verdicts(run) == []
    assert read_verdict(folder) is None


def test_few_equal_answers_show_little() -> None:
    """No answer of five differs: each second one may."""
    (one,) = judge("exact_match", {"0-shot": np.ones(5), "tuned": np.ones(5)}).primary
    assert (one.low, one.high) == pytest.approx((-0.434, 0.434), abs=1e-3)
    assert one.outcome == UNCLEAR
    assert (one.prompts_needed or 0) > 1000
    (one,) = judge("exact_match", {"0-shot": np.zeros(5), "tuned": np.ones(5)}).primary
    assert (one.low, one.high) == pytest.approx((0.131, 1.0), abs=1e-3)


def test_small_gains_on_few_prompts_do_not_outweigh_a_rare_large_loss() -> None:
    base = np.full(20, 0.5)
    tuned = base + 0.1 * (np.arange(20) < 8)
    (one,) = judge("token_f1", {"0-shot": base, "tuned": tuned}).primary
    assert one.p_value == pytest.approx(2 / 2**8)
    assert one.low is not None
    assert one.low < 0 < one.difference
    assert one.outcome == UNCLEAR
