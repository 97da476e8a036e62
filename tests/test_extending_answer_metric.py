"""An answer metric is one row in one table; scores, refused references and the verdict follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.sections.evaluation import AnswerMetrics
from launcher.errors import DataError
from launcher.evaluate.answer_scores import AnswerScorer, copy_metric_files
from launcher.evaluate.metrics import METRICS, AnswerMetric, GeneratedAnswer
from launcher.evaluate.verdict import judge

ROW = AnswerMetric(
    lambda answer, reference, options: answer.text[:1] == reference[:1],
    lambda reference, options: "" if reference else "is empty",
)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AnswerScorer:
    monkeypatch.setitem(METRICS, "first_letter", ROW)
    settings = AnswerMetrics.model_construct(metrics=("first_letter",))
    copy_metric_files(settings, tmp_path)
    return AnswerScorer(settings, tmp_path)


def test_a_metric_that_is_added_decides_the_verdict(scorer: AnswerScorer) -> None:
    references, places = ["yes", "no"] * 10, [f"r.jsonl:{n}" for n in range(20)]
    answers = {"0-shot": ["what"] * 20, "tuned": ["y", "n"] * 10}
    scores = {
        side: scorer.score("first_letter", [GeneratedAnswer(text, True, 1) for text in texts], references, places)
        for side, texts in answers.items()
    }
    assert judge("first_letter", scores).sentence.startswith("Fine-tuning helped: first letter 1.00 against 0.00 (0-shot)")


def test_a_metric_that_is_added_refuses_references(scorer: AnswerScorer) -> None:
    with pytest.raises(DataError, match="first_letter cannot score 1 of 2 references: the first one is empty"):
        scorer.check_references(["yes", ""], ["r.jsonl:1", "r.jsonl:2"])
