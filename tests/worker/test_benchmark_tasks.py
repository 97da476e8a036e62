"""Scores of lm-evaluation-harness tasks; tests/e2e/test_evaluate.py runs whole evaluations."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from launcher.cli.benchmark_tasks import BenchmarkOptions
from launcher.errors import ConfigError
from launcher.worker.benchmark_tasks import harness, prepare
from launcher.worker.benchmark_tasks.harness import Harness
from launcher.worker.benchmark_tasks.request import BenchmarkFolder


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
    scores = harness._read_scores("task", result(values, samples), "digest")
    assert scores.samples == {"acc,none": (0.0, 0.0, 1.0, 0.0)}
    assert scores.values == {"acc,none": 0.25, "word_perplexity,none": 7.5}
    assert (scores.num_questions, scores.lower_is_better) == (4, ("word_perplexity,none",))


def test_each_filter_has_its_own_scores() -> None:
    """An aggregate that is not the mean of scores, such as a corpus score, has no scores of single questions."""
    samples = [{"doc_id": i, "filter": name, "acc": float(name == "strict")} for name in ("strict", "flexible") for i in range(2)]
    scores = harness._read_scores("task", result({"acc,strict": 1.0, "acc,flexible": 0.5}, samples), "digest")
    assert scores.samples == {"acc,strict": (1.0, 1.0)}
    assert scores.num_questions == 2


def test_a_data_set_that_is_not_here_is_named_with_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/cache/hub")
    problem = harness._missing_data(
        "arc_easy", ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)")
    )
    assert problem.message == "the data of a task is not on this machine: allenai/ai2_arc"
    assert "hf download --repo-type dataset allenai/ai2_arc" in problem.remedy
    assert "copy datasets--allenai--ai2_arc" in problem.remedy
    assert problem.remedy.endswith("to /cache/hub")


def test_without_the_harness_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in harness._OFFLINE:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The harness changes the working directory.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        Harness()
    assert error.value.exit_code == 2
    assert 'pip install "launcher[evals]"' in str(error.value)
    assert Path.cwd() == Path("/"), "a data set or metric in the working directory may be somebody else's"
    # Tasks with addresses such as hf://datasets/... read them with the Hub's client alone, which is imported already.
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint="http://127.0.0.1:9").dataset_info("owner/rows")


def test_code_that_the_model_has_written_is_not_run() -> None:
    for task in (SimpleNamespace(UNSAFE_CODE=True), SimpleNamespace(config=SimpleNamespace(unsafe_code=True))):
        problem = harness._unsafe_problem("task", task)
        assert problem is not None
        assert problem.message == "a task runs code that the model has written, which nothing here isolates"


def test_a_gain_in_a_metric_that_no_task_has_is_refused_before_anything_is_scored() -> None:
    metrics = {"arc_easy": ("acc", "acc_norm"), "triviaqa": ("exact_match",)}
    prepare._require_metrics(["acc_norm:base:0.1", "exact_match (strict):base:0"], metrics)
    with pytest.raises(ConfigError) as raised:
        prepare._require_metrics(["acc_nrm:base:0"], metrics)
    (problem,) = raised.value.problems
    assert problem.message == "--min-gain names acc_nrm, which no task has"
    assert problem.value == "acc_nrm:base:0"
    assert problem.remedy == "did you mean acc_norm? metrics of these tasks are acc, acc_norm, exact_match"


def test_scores_stay_in_their_folder_whatever_the_task_is_called(tmp_path: Path) -> None:
    folder = BenchmarkFolder(tmp_path)
    for name in ("../../outside", "..", "a/b", ".hidden"):
        assert folder.scores(name, "base").parent.parent == tmp_path
    assert folder.scores("arc_easy", "base") == tmp_path / "arc_easy/base.json"


def test_options_are_those_of_the_worker() -> None:
    assert BenchmarkOptions("a,b").arguments() == ["--tasks", "a,b"]
    options = BenchmarkOptions("a", Path("tasks"), 5)
    assert options.arguments() == ["--tasks", "a", "--task-folder", "tasks", "--limit", "5"]
