"""A handwritten verdict, for tests of the code that shows one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from launcher.evaluate.verdict import judge, with_examples
from launcher.tracking.verdicts import EvaluationVerdict, GeneralLoss, SideUsage

SIDES = {"0-shot": 24, "8-shot": 38, "tuned": 62}
NUM_PROMPTS = 200
# Looks like a key, but is none.
TOKEN = "hf_" + "Qm7" * 8


def made_verdict() -> EvaluationVerdict:
    """A verdict on 200 prompts in which fine-tuning helped; each model's correct answers are its first ones."""

    def scores(right: int) -> np.ndarray:
        return (np.arange(NUM_PROMPTS) < right).astype(np.float64)

    verdict = judge(
        "exact_match",
        {side: scores(right) for side, right in SIDES.items()},
        others={
            "token_f1": {side: 0.2 + scores(right) * 0.8 for side, right in SIDES.items()},
            "stopped": {side: scores(200 if side == "tuned" else 150) for side in SIDES},
        },
        general_loss=GeneralLoss(2.50, 2.51),
    )
    prompts = [f"Question {n}:\nHow many <b>apples</b> are {n} apples, says {TOKEN}?" for n in range(NUM_PROMPTS)]
    references = [str(number) for number in range(NUM_PROMPTS)]
    answers = {
        side: [reference if number < right else f"{'many ' * 600}" for number, reference in enumerate(references)]
        for side, right in SIDES.items()
    }
    usage = {
        "0-shot": SideUsage(NUM_PROMPTS, 60 * NUM_PROMPTS, 30 * NUM_PROMPTS, 40.0),
        "8-shot": SideUsage(NUM_PROMPTS, 1_260 * NUM_PROMPTS, 25 * NUM_PROMPTS, 90.0),
        "tuned": SideUsage(NUM_PROMPTS, 40 * NUM_PROMPTS, 5 * NUM_PROMPTS, 12.5),
    }
    return replace(with_examples(verdict, prompts, references, answers), usage=usage)
