"""Tasks of lm-evaluation-harness: files of questions, scores, refusals; tests/e2e/test_evaluate.py runs whole evaluations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import dynamic_module_utils

from launcher.errors import ConfigError, DataError
from launcher.evaluate import tasks
from launcher.evaluate.evaluation_folder import EvaluationFolder


def result(values: dict[str, float], samples: list[dict[str, object]]) -> dict[str, object]:
    return {
        "results": {"task": {"alias": "task", **values}},
        "samples": {"task": samples},
        "higher_is_better": {"task": {"acc": True, "word_perplexity": False}},
    }


def test_questions_have_single_scores_where_the_metric_is_their_mean() -> None:
    """Scores are in the order of the questions, whatever order the harness used."""
    samples = [{"doc_id": i, "filter": "none", "acc": float(i == 2), "word_perplexity": (1.0, 2)} for i in (2, 0, 1, 3)]
    values = {"acc,none": 0.25, "acc_stderr,none": 0.1, "word_perplexity,none": 7.5}
    scores = tasks.read_scores("task", result(values, samples), "digest")
    assert scores.samples == {"acc,none": (0.0, 0.0, 1.0, 0.0)}
    assert scores.values == {"acc,none": 0.25, "word_perplexity,none": 7.5}
    assert (scores.num_questions, scores.lower_is_better) == (4, ("word_perplexity,none",))


def test_each_filter_has_its_own_scores() -> None:
    """An aggregate that is not the mean of scores, such as a corpus score, has no scores of single questions."""
    samples = [{"doc_id": i, "filter": name, "acc": float(name == "strict")} for name in ("strict", "flexible") for i in range(2)]
    scores = tasks.read_scores("task", result({"acc,strict": 1.0, "acc,flexible": 0.5}, samples), "digest")
    assert scores.samples == {"acc,strict": (1.0, 1.0)}
    assert scores.num_questions == 2


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("y", 1), ("B", 1), ("A", 0)])
def test_an_answer_is_an_index_a_letter_or_a_text(answer: object, index: int) -> None:
    row = {"question": "q", "choices": ["x", "y"], "answer": answer}
    assert tasks.read_question(json.dumps(row).encode(), "rows.jsonl:1") == {**row, "answer": index}


@pytest.mark.parametrize("wrong", [{"answer": 2}, {"answer": "z"}, {"answer": True}, {"choices": ["x"]}, {"question": 1}, None])
def test_a_line_that_is_no_question_is_named(wrong: dict[str, Any] | None) -> None:
    row = {"question": "q", "choices": ["x", "y"], "answer": 0}
    with pytest.raises(DataError) as error:
        tasks.read_question(json.dumps(None if wrong is None else row | wrong).encode(), "rows.jsonl:3")
    assert error.value.problems[0].where == "rows.jsonl:3"


def test_without_the_harness_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    for name in tasks._OFFLINE:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The harness changes the working directory.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        tasks.find_tasks(["arc_easy"])
    assert 'pip install "launcher[evals]"' in str(error.value)
    assert Path.cwd() == Path("/"), "a data set or metric in the working directory may be somebody else's"
    assert hasattr(dynamic_module_utils.get_cached_module_file, "__wrapped__"), "code of a model that a task names is refused"
    # Tasks with addresses such as hf://datasets/... read them with the Hub's client alone, which is imported already.
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint="http://127.0.0.1:9").dataset_info("owner/rows")


def test_a_gain_in_a_metric_that_no_task_has_is_refused_before_anything_is_scored() -> None:
    lists = {"arc_easy": [{"metric": "acc"}, {"metric": "acc_norm"}], "triviaqa": [{"metric": "exact_match"}]}
    loaded = {name: SimpleNamespace(config=SimpleNamespace(metric_list=metrics)) for name, metrics in lists.items()}
    tasks.require_metrics(["acc_norm:base:0.1", "exact_match (strict):base:0"], loaded)
    with pytest.raises(ConfigError) as raised:
        tasks.require_metrics(["acc_nrm:base:0"], loaded)
    assert raised.value.problems[0].value == "acc_nrm:base:0"
    assert "did you mean acc_norm?" in raised.value.problems[0].remedy


def test_scores_stay_in_their_folder_whatever_the_task_is_called(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    for name in ("../../outside", "..", "a/b", ".hidden"):
        assert tasks.scores_path(folder, name, "base").parent.parent == folder.root / "benchmarks"
    assert tasks.scores_path(folder, "arc_easy", "base") == folder.root / "benchmarks" / "arc_easy/base.json"
