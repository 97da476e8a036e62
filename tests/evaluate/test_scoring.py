"""Scoring of many answers, including with the user's own Python functions."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from time import monotonic

import psutil
import pytest
from file_owners import as_root, give
from pace import wait_for

from launcher.config.sections.answer_metrics import METRIC_NAMES, AnswerMetrics
from launcher.errors import ConfigError, DamagedRun, DataError
from launcher.evaluate.metrics import METRICS, GeneratedAnswer
from launcher.evaluate.scoring import AnswerScorer, copy_metric_files

__all__ = ["as_root"]

ANSWERS = [GeneratedAnswer(text, True, 2) for text in ("short", "a longer answer", "")]
REFERENCES = ["1", "2", "3"]
PLACES = ["test.jsonl:1", "test.jsonl:2", "test.jsonl:3"]
LENGTH = """
import numpy

print("imported")


def length(answer, reference):
    print("scoring", answer)
    return numpy.float32(len(answer) / int(reference))


def is_empty(answer, reference):
    return not answer
"""


def make_scorer(settings: AnswerMetrics, folder: Path) -> AnswerScorer:
    copy_metric_files(settings, folder)
    return AnswerScorer(settings, folder)


def own(folder: Path, body: str, limit_s: float = 60.0) -> list[float]:
    """Score the answers with a function that has this body."""
    file = folder / "own.py"
    file.write_text(f"import os, sys, time\n\ndef score(answer, reference):\n    {body}\n")
    settings = AnswerMetrics(metrics=(f"{file}:score",), metric_time_limit_s=limit_s)
    return list(make_scorer(settings, folder / "copies").score(settings.metrics[0], ANSWERS, REFERENCES, PLACES))


def test_settings_name_the_metrics_of_the_table() -> None:
    assert tuple(METRICS) == METRIC_NAMES


def test_metrics_of_the_table_and_own_functions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.py"
    file.write_text(LENGTH)
    settings = AnswerMetrics(metrics=("stopped", f"{file}:length", f"{file}:is_empty"))
    scorer = make_scorer(settings, tmp_path / "copies")
    # The copied file is run, not this one.
    file.write_text("raise SystemExit")
    scores = [list(scorer.score(metric, ANSWERS, REFERENCES, PLACES)) for metric in settings.metrics]
    assert scores == [[1, 1, 1], [5, 7.5, 0], [0, 0, 1]]
    (copy,) = (tmp_path / "copies").glob("*.py")
    assert copy.read_text() == LENGTH
    assert copy.name == f"own-{hashlib.sha256(LENGTH.encode()).hexdigest()[:16]}.py"
    copy.write_text("def length(answer, reference): return 1")
    with pytest.raises(DamagedRun, match="the copy of a metric has changed"):
        AnswerScorer(settings, tmp_path / "copies")
    assert capfd.readouterr().out == ""


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
        ("return 1 / len(answer)", "failed: ZeroDivisionError: division by zero (line 4)"),
        ("return 1 if answer else None", "failed: TypeError: it returned None, which is not a number"),
        ("return 1.0 if answer else float('nan')", "failed: ValueError: it returned nan"),
        ("sys.stdout.write('x' * 100_000); return 1 if answer else os._exit(3)", "failed: its process ended with exit code 3"),
        ("return 1 if answer else os.kill(os.getpid(), 9)", "failed: its process ended with signal SIGKILL"),
        ("return 1 if answer else sys.exit('no')", "failed: SystemExit: no (line 4)"),
    ],
)
def test_an_own_function_that_fails_names_the_row(tmp_path: Path, body: str, part: str) -> None:
    with pytest.raises(DataError) as error:
        own(tmp_path, body)
    (problem,) = error.value.problems
    assert part in problem.message
    assert (problem.where, problem.value) == ("test.jsonl:3", f"{tmp_path}/own.py:score")
    assert problem.remedy.startswith("correct the function; it takes an answer and its reference")


def test_an_own_function_that_hangs_is_ended_with_its_processes(tmp_path: Path) -> None:
    pids, began = tmp_path / "pids", monotonic()
    # Both processes write their pid and that of their child, which is 0 in the forked process.
    body = f"return 1 if answer else (open({str(pids)!r}, 'a').write(f'{{os.getpid()}} {{os.fork()}} '), time.sleep(900))"
    with pytest.raises(DataError, match=r"failed: it took more than 3 s and was ended") as error:
        own(tmp_path, body, limit_s=3)
    assert "test.jsonl:3" in str(error.value)
    assert "evaluate.metric_time_limit_s" in str(error.value)
    assert monotonic() - began < 300
    # A killed process takes a moment to end.
    started = {int(pid) for pid in pids.read_text().split()} - {0}
    assert len(started) == 2
    wait_for("both processes to end", lambda: not any(map(is_running, started)))


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_an_own_function_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    if (parent := os.fork()) == 0:
        own(tmp_path, f"open({str(pids)!r}, 'w').write(str(os.getpid())), time.sleep(900)")
        os._exit(0)
    deadline = monotonic() + 120
    while not (pids.exists() and pids.read_text()):
        assert monotonic() < deadline
        time.sleep(0.1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while is_running(int(pids.read_text())):
        assert monotonic() < deadline
        time.sleep(0.1)


def test_a_file_that_fails_on_import(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import module_that_does_not_exist\ndef score(answer, reference): ...\n")
    settings = AnswerMetrics(metrics=(f"{file}:score",))
    scorer = make_scorer(settings, tmp_path / "copies")
    with pytest.raises(DataError, match=r"could not be imported: ModuleNotFoundError: .*module_that_does_not_exist.* \(line 1\)"):
        scorer.score(settings.metrics[0], ANSWERS, REFERENCES, PLACES)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "the file of a metric does not exist"),
        ("def other(): ...", "defines no function score"),
        ("def score(:", "the file of a metric is not Python"),
    ],
)
def test_files_without_the_function_are_refused_before_anything_runs(tmp_path: Path, content: str | None, part: str) -> None:
    if content is not None:
        (tmp_path / "own.py").write_text(content)
    with pytest.raises(ConfigError, match=part):
        make_scorer(AnswerMetrics(metrics=(f"{tmp_path}/own.py:score",)), tmp_path / "copies")
    assert not (tmp_path / "copies").exists()


@pytest.mark.usefixtures("as_root")
def test_a_function_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(LENGTH)
    give(file)
    with pytest.raises(ConfigError, match=r"the file of a metric is not trusted: .* belongs to 54321"):
        make_scorer(AnswerMetrics(metrics=(f"{file}:length",)), tmp_path / "copies")


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ('{"properties": {"a": {"type": "in"}}}', "is wrong at properties/a/type"),
        ('{"properties": {"a": {"$ref": "#/$defs/b"}}}', "has a reference that cannot be resolved: #/\\$defs/b"),
        (
            '{"properties": {"a": {"$ref": "https://example.org/b"}}}',
            "has a reference that cannot be resolved: https",
        ),
        ('{"$ref": "#/parts/b", "parts": {"b": {"items": {"$ref": "#c"}}}}', "has a reference that cannot be resolved: #c"),
        ('{"$ref": "#/parts/b", "parts": {"b": {"type": "in"}}}', "is wrong at type"),
        ('{"$ref": "#/title", "title": "t"}', "has a reference that cannot be resolved: #/title"),
        ('{"$ref": "#"}', "has circular references"),
    ],
)
def test_schemas_that_are_wrong(tmp_path: Path, schema: str | None, part: str) -> None:
    file = tmp_path / "schema.json"
    if schema is not None:
        file.write_text(schema)
    with pytest.raises(ConfigError, match=f"the JSON schema {part}"):
        make_scorer(AnswerMetrics(metrics=("json_schema",), json_schema=str(file)), tmp_path)


@pytest.mark.parametrize(
    "schema",
    [
        '{"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tree"}}}}',
        '{"$id": "https://example.org/a", "$ref": "b", "$defs": {"b": {"$id": "b", "type": "object"}}}',
        '{"$schema": "http://json-schema.org/draft-07/schema#", '
        '"$ref": "#a", "definitions": {"a": {"$id": "#a", "type": "object"}}}',
        '{"type": "object", "properties": {"$ref": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}}',
    ],
)
def test_schemas_with_references(tmp_path: Path, schema: str) -> None:
    (tmp_path / "schema.json").write_text(schema)
    settings = AnswerMetrics(metrics=("json_schema",), json_schema=str(tmp_path / "schema.json"))
    answers = [GeneratedAnswer(text, True, 1) for text in ('{"a": {}}', "3")]
    assert list(make_scorer(settings, tmp_path).score("json_schema", answers, ["", ""], ["r:1", "r:2"])) == [1, 0]


def test_references_that_cannot_be_scored_are_named_in_one_pass(tmp_path: Path) -> None:
    scorer = make_scorer(AnswerMetrics(metrics=("numeric", "field_f1", "exact_match")), tmp_path)
    with pytest.raises(DataError) as error:
        scorer.check_references(["x", "[1]", "3", "y"], ["a:1", "a:2", "a:3", "a:4"])
    first, second = error.value.problems
    assert first.message == "numeric cannot score 2 of 4 references: the first one has no number"
    assert first.where == "a:1, a:4"
    assert second.message.startswith("field_f1 cannot score 2 of 4 references: the first one is not JSON")


def test_a_pattern_that_takes_too_long_names_the_row(tmp_path: Path) -> None:
    settings = AnswerMetrics(metrics=("regex",), pattern="(a|aa)+$b", metric_time_limit_s=0.2)
    with pytest.raises(DataError, match=r"takes more than 0\.2 s for one answer, in row r:1"):
        make_scorer(settings, tmp_path).score("regex", [GeneratedAnswer("a" * 40, True, 1)], [""], ["r:1"])


SLOW = "^(a|aa)+$"
DRAFT = "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"name": {"pattern": SLOW}}},
        {"$schema": DRAFT, "properties": {"name": {"pattern": SLOW}, "part": {"$ref": "#"}}},
        {"additionalProperties": False, "patternProperties": {SLOW: {}}},
        {"unevaluatedProperties": False, "allOf": [{"patternProperties": {SLOW: {}}}]},
    ],
    ids=["pattern", "root", "additional", "unevaluated"],
)
def test_a_pattern_of_a_schema_that_takes_too_long_names_the_row(schema: dict, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    settings = AnswerMetrics(metrics=("json_schema",), json_schema=str(file), metric_time_limit_s=0.2)
    scorer = make_scorer(settings, tmp_path)
    long = "a" * 40 + "b"
    answers = [{"name": "aaa"}, {"part": {"name": long}} if "$schema" in schema else {"name": long, long: 1}]
    generated = [GeneratedAnswer(json.dumps(answer), True, 1) for answer in answers]
    scorer.score("json_schema", generated[:1], [""], ["r:1"])
    with pytest.raises(DataError, match=r"JSON schema takes more than 0\.2 s for one answer, in row r:2") as error:
        scorer.score("json_schema", generated, ["", ""], ["r:1", "r:2"])
    assert error.value.problems[0].value == SLOW


def test_patterns_of_a_schema_are_matched_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    settings = AnswerMetrics(metrics=("json_schema",), json_schema=str(file))
    file.write_text(json.dumps({"patternProperties": {"^n": {"pattern": "^a+$"}}, "additionalProperties": False}))
    answers = [GeneratedAnswer(text, True, 1) for text in ('{"name": "aa"}', '{"name": "ab"}', '{"other": "aa"}', "{}")]
    assert list(make_scorer(settings, tmp_path).score("json_schema", answers, [""] * 4, ["r"] * 4)) == [1, 0, 0, 1]
    file.write_text(json.dumps({"properties": {"name": {"pattern": "(a"}}}))
    with pytest.raises(ConfigError, match="the JSON schema is wrong at properties/name/pattern"):
        make_scorer(settings, tmp_path)
