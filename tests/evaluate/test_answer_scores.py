"""Scoring of many answers, including with the user's own Python functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from unusual_files import as_root

from launcher.config.sections.evaluation import METRIC_NAMES, AnswerMetrics
from launcher.errors import ConfigError, DataError
from launcher.evaluate import metrics
from launcher.evaluate.metrics import METRICS, AnswerScorer, GeneratedAnswer, copy_metric_files

__all__ = ["as_root"]

ANSWERS = [GeneratedAnswer(text, True, 2) for text in ("short", "a longer answer", "")]
REFERENCES = ["1", "2", "3"]
PLACES = ["test.jsonl:1", "test.jsonl:2", "test.jsonl:3"]
LENGTH = """
import numpy


def length(answer, reference):
    return numpy.float32(len(answer) / int(reference))


def is_empty(answer, reference):
    return not answer
"""


def make_scorer(settings: AnswerMetrics, folder: Path) -> AnswerScorer:
    copy_metric_files(settings, folder)
    return AnswerScorer(settings, folder)


def own(folder: Path, body: str) -> list[float]:
    """Score the answers with a function that has this body."""
    file = folder / "own.py"
    file.write_text(f"import os, sys, time\n\ndef score(answer, reference):\n    {body}\n")
    settings = AnswerMetrics(metrics=(f"{file}:score",))
    return list(make_scorer(settings, folder / "copies").score(settings.metrics[0], ANSWERS, REFERENCES, PLACES))


def test_settings_name_the_metrics_of_the_table() -> None:
    assert tuple(METRICS) == METRIC_NAMES


def test_metrics_of_the_table_and_own_functions(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(LENGTH)
    settings = AnswerMetrics(metrics=("stopped", f"{file}:length", f"{file}:is_empty"))
    scorer = make_scorer(settings, tmp_path / "copies")
    # The copied file is run, not this one.
    file.write_text("raise SystemExit")
    scores = [list(scorer.score(metric, ANSWERS, REFERENCES, PLACES)) for metric in settings.metrics]
    assert scores == [[1, 1, 1], [5, 7.5, 0], [0, 0, 1]]


def test_answers_are_scored_without_the_thoughts_before_them(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(LENGTH)
    settings = AnswerMetrics(metrics=("exact_match", "valid_json", f"{file}:length"))
    scorer = make_scorer(settings, tmp_path / "copies")
    answers = [GeneratedAnswer(f"<think>\n\n</think>\n\n{text}", True, 2) for text in ("12", "[1]")]
    references = ["12", "<think>\nlet me see\n</think>\n\n1"]
    scores = [list(scorer.score(metric, answers, references, PLACES[:2])) for metric in settings.metrics]
    assert scores == [[1, 1], [1, 1], [pytest.approx(2 / 12), 3]]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("return 1 / len(answer)", "ZeroDivisionError: division by zero (line 4)"),
        ("return 1 if answer else None", "it returned None"),
        ("return 1.0 if answer else float('nan')", "it returned nan"),
        ("return 1 if answer else sys.exit('no')", "SystemExit: no (line 4)"),
    ],
)
def test_an_own_function_that_fails_names_the_row(tmp_path: Path, body: str, part: str) -> None:
    with pytest.raises(DataError) as error:
        own(tmp_path, body)
    (problem,) = error.value.problems
    assert part in problem.message
    assert (problem.where, problem.value) == ("test.jsonl:3", f"{tmp_path}/own.py:score")


def test_an_own_function_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TIME_LIMIT_S", 0.5)
    with pytest.raises(DataError, match=r"it took more than 0.5 s for one answer \(line 4\)") as error:
        own(tmp_path, "return 1 if answer else time.sleep(900)")
    assert error.value.problems[0].where == "test.jsonl:3"
    assert own(tmp_path, "return 1") == [1, 1, 1]


def test_a_file_that_fails_on_import(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import module_that_does_not_exist\ndef score(answer, reference): ...\n")
    settings = AnswerMetrics(metrics=(f"{file}:score",))
    scorer = make_scorer(settings, tmp_path / "copies")
    with pytest.raises(DataError, match=r"ModuleNotFoundError: .*module_that_does_not_exist.* \(line 1\)"):
        scorer.score(settings.metrics[0], ANSWERS, REFERENCES, PLACES)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "the file of a metric does not exist"),
        ("def other(): ...", "defines no function score"),
        ("def score(:", "the file of a metric cannot be read"),
    ],
)
def test_files_without_the_function_are_refused_before_anything_runs(tmp_path: Path, content: str | None, part: str) -> None:
    if content is not None:
        (tmp_path / "own.py").write_text(content)
    with pytest.raises(ConfigError, match=part):
        make_scorer(AnswerMetrics(metrics=(f"{tmp_path}/own.py:score",)), tmp_path / "copies")
    assert not (tmp_path / "copies").exists()


def test_references_that_cannot_be_scored_are_named_in_one_pass(tmp_path: Path) -> None:
    scorer = make_scorer(AnswerMetrics(metrics=("numeric", "field_f1", "exact_match")), tmp_path)
    with pytest.raises(DataError) as error:
        scorer.check_references(["x", "[1]", "3", "y"], ["a:1", "a:2", "a:3", "a:4"])
    first, second = error.value.problems
    assert first.message == "numeric cannot score 2 of 4 references: the first one has no number"
    assert first.where == "a:1, a:4"
    assert second.message.startswith("field_f1 cannot score 2 of 4 references: the first one is not JSON")


def test_a_pattern_that_takes_too_long_names_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TIME_LIMIT_S", 1.0)
    scorer = make_scorer(AnswerMetrics(metrics=("regex",), pattern="^(a|aa)+$"), tmp_path)
    answers = [GeneratedAnswer(text, True, 1) for text in ("aa", "ab", "a" * 40 + "b")]
    assert list(scorer.score("regex", answers[:2], ["", ""], ["r:1", "r:2"])) == [1, 0]
    with pytest.raises(DataError) as error:
        scorer.score("regex", answers, [""] * 3, ["r:1", "r:2", "r:3"])
    assert error.value.problems[0].where == "r:3"
