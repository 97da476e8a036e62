"""What a terminal that follows a run says at its end, of runs that go on by themselves as well."""

from __future__ import annotations

import pytest

from launcher import json_records, run_records, run_store
from launcher.cli.follow import follow
from launcher.clusters.local import LocalCluster
from launcher.errors import EXIT_FAILED
from launcher.plan.run_dir import RunDir
from launcher.run_records import ExitRecord, FailureRecord


def fail(run: RunDir, attempt: int, message: str, rank: int | None = 1) -> None:
    """An attempt leaves the record of its end; without a rank nobody failed first."""
    log = str(run.rank_log(attempt, rank or 0))
    first = None if rank is None else FailureRecord(rank, "killed", message, log=log)
    json_records.write(run_records.exit_file(run, attempt), ExitRecord("failed", first_failure=first))


def closing(run: RunDir, message: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of the run, which has failed with `message`, by a command that has submitted its first attempt."""
    run_store.update_status(run, state="failed", message=message)
    assert follow(run, 1, LocalCluster()) == EXIT_FAILED
    return capsys.readouterr().err


def test_follow_reports_the_failure_of_the_newest_attempt(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run, 1, "killed by SIGKILL")
    fail(run, 2, "the loss is not finite", rank=0)
    said = closing(run, "rank 0: the loss is not finite; cluster.max_failures=0 is used up", capsys)
    assert "rank 0 failed first: the loss is not finite\n  log:    " in said
    assert "attempts/002/rank-00000.log" in said
    assert "failed: rank 0: the loss is not finite; cluster.max_failures=0 is used up" in said
    assert "SIGKILL" not in said


def test_follow_reports_why_the_run_does_not_continue(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run, 2, "killed by SIGKILL")
    said = closing(run, "the cluster did not provide the workers within 10 minutes", capsys)
    assert "rank 1 failed first: killed by SIGKILL" in said
    assert "failed: the cluster did not provide the workers within 10 minutes" in said


def test_follow_reports_the_same_reason_once(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run, 2, "killed by SIGKILL")
    assert closing(run, "rank 1: killed by SIGKILL", capsys).count("killed by SIGKILL") == 1


@pytest.mark.parametrize("ended", [True, False])
def test_follow_names_the_agent_log_if_no_rank_failed_first(run: RunDir, capsys: pytest.CaptureFixture[str], ended: bool) -> None:
    fail(run, 1, "killed by SIGKILL")
    if ended:
        fail(run, 2, "", rank=None)
    said = closing(run, "no record from n2; cluster.max_infrastructure_failures=1 is used up", capsys)
    assert said.startswith("failed: no record from n2; cluster.max_infrastructure_failures=1 is used up\n  log:    ")
    assert "attempts/001/agent.log" in said
    assert "SIGKILL" not in said
