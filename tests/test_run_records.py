"""Run records are read as they were written; a damaged record is reported with its file, field and value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher import json_records, run_records, run_store
from launcher.errors import Problem, RunError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, CancelRequest, ExitRecord, FailureRecord, NodeRecord, OutcomeRecord, Status

FAILURE = FailureRecord(3, "ValueError", "ValueError: own", at=1.5, exit_code=1, traceback="Traceback", log="/log")


@pytest.mark.parametrize(
    "record",
    [
        Status("running", 2, 40, 100, {"id": "41"}, "saving", 1.0, 2.0),
        Attempt(20, job="41", nodes=("n1", "n2"), port=4000, begun_at=3.0, automatic=True),
        CancelRequest(1.0, save=False),
        NodeRecord(1, 9.0, host="n2", killed=True, first_failure=FAILURE, problems=(Problem("has no GPU", "n2", "0", "repair"),)),
        ExitRecord("pending", 40, "lost", Cause.BAD_NODE, None, 20, ("n2",), FAILURE, ended_at=None),
        OutcomeRecord("completed", "completed", 100, "done", "/checkpoint"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, record: Any) -> None:
    json_records.write(tmp_path / "record.json", record)
    assert json_records.read(type(record), tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("text", "message", "field", "value"),
    [
        ('{"state": "running", "att', "Unterminated string", "", ""),
        ("[]", "is not a JSON object", "", ""),
        ('{"state": "running"}', "this field is missing", "attempt", ""),
        ('{"state": "running", "attempt": "one"}', "expected an integer", "attempt", '"one"'),
        ('{"state": "running", "attempt": 1, "job": []}', "expected an object", "job", "[]"),
    ],
)
def test_a_damaged_record_names_file_field_value_and_remedy(run: RunDir, text: str, message: str, field: str, value: str) -> None:
    run.status.write_text(text)
    with pytest.raises(RunError) as refused:
        run_store.read_status(run)
    (problem,) = refused.value.problems
    assert message in problem.message
    assert problem.where == (f"{run.status}: {field}" if field else str(run.status))
    assert problem.value == value
    assert "backup" in problem.remedy


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cause": "weather"}, "cause"),
        ({"bad_nodes": [1]}, "bad_nodes[0]"),
        ({"first_failure": {"rank": 1, "kind": "killed"}}, "first_failure.message"),
        ({"first_failure": "killed"}, "first_failure"),
    ],
)
def test_a_damaged_part_of_a_record_is_named_by_its_path(run: RunDir, change: dict[str, Any], field: str) -> None:
    path = run_records.exit_file(run, 1)
    path.write_text(json.dumps({"state": "pending", **change}))
    with pytest.raises(RunError, match="a record of the run is damaged") as refused:
        run_records.read_exit(run, 1)
    assert refused.value.problems[0].where == f"{path}: {field}"


def test_a_missing_record_is_none_and_a_missing_status_is_an_error(run: RunDir) -> None:
    assert run_records.read_exit(run, 1) is None
    assert run_records.read_outcome(run, 1) is None
    assert run_records.read_node(run, 1, 0) is None
    assert run_records.read_cancel(run, 1) is None
    run.status.unlink()
    with pytest.raises(RunError, match="a file of the run is missing"):
        run_store.read_status(run)


def test_unknown_keys_are_ignored_and_absent_ones_get_their_defaults(run: RunDir) -> None:
    """Records of older and later launchers can be read."""
    run_records.exit_file(run, 1).write_text('{"state": "completed", "weather": "fine"}')
    assert run_records.read_exit(run, 1) == ExitRecord("completed")


@dataclass(frozen=True)
class _Pair:
    first: int | str
    second: tuple[int, str]
    third: dict[str, float]


def test_unions_fixed_tuples_and_dictionaries_are_decoded() -> None:
    values = {"first": "a", "second": [1, "b"], "third": {"c": 2}}
    assert json_records.decode(_Pair, values, "here") == _Pair("a", (1, "b"), {"c": 2})
    for wrong in ({"first": 1.5}, {"second": [1]}, {"second": 1}, {"third": {"c": "2"}}):
        with pytest.raises(RunError):
            json_records.decode(_Pair, values | wrong, "here")
