"""The closing lines of a followed run, including runs that continue automatically."""

from __future__ import annotations

import shutil
from dataclasses import replace

import hand_made
import pytest

from launcher.cli.follow import follow
from launcher.cli.verbs import VERBS
from launcher.clusters.local import LocalCluster
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_records, run_store
from launcher.runs.journal import FailureRecord
from launcher.runs.run_records import ExportRecord, Status
from launcher.shell_commands import short_path
from launcher.tracking.jsonl import append_event


def fail(run: RunDir, attempt: int, message: str, rank: int | None = 1, traceback: str = "") -> None:
    """Write the exit record of a failed attempt. Without a rank, it names no first failure."""
    log = str(run.rank_log(attempt, rank or 0))
    first = None if rank is None else FailureRecord(rank, "killed", message, traceback=traceback, log=log)
    hand_made.end(run, attempt, first_failure=None if first is None else json_records.encode(first))


def closing(run: RunDir, message: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Follow the first attempt of a run that failed with `message`; return standard error."""
    run_store.update_status(run, state="failed", message=message)
    assert follow(run, 1, LocalCluster()) == EXIT_FAILED
    return capsys.readouterr().err


def test_follow_reports_the_failure_of_the_newest_attempt(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run, 1, "killed by SIGKILL")
    fail(run, 2, "the loss is not finite", rank=0, traceback='  File "loop.py", line 7, in step')
    output = closing(run, "rank 0: the loss is not finite; cluster.max_failures=0 is used up", capsys)
    assert 'File "loop.py", line 7, in step\nrank 0 failed first: the loss is not finite\n  log:    ' in output
    assert "attempts/002/rank-00000.log" in output
    assert "failed: rank 0: the loss is not finite; cluster.max_failures=0 is used up" in output
    assert "SIGKILL" not in output


class EndingCluster(LocalCluster):
    """Reports the run as completed on the first status query, right after the run writes its last lines."""

    def status(self, run: RunDir) -> Status:
        append_event(run, 1, "progress", "writing the Hugging Face folder: 3.00 GiB of 4.00 GiB (75%)")
        append_event(run, 1, "info", "the export is complete")
        append_event(run, 1, "info", "Weights & Biases was offline", sync_command="wandb sync x", is_closing=True)
        return run_store.update_status(run, state="completed")


def test_follow_shows_the_last_lines_before_the_end(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run_store.update_status(run, state="running")
    assert follow(run, 1, EndingCluster()) == 0
    output = capsys.readouterr().out
    assert "(75%)\nthe export is complete\n" in output
    # The closing lines already contain the sync command.
    assert "Weights & Biases was offline" not in output
    assert output.count("wandb sync x") == 1
    assert f"  python -m launcher evaluate {short_path(run.root)}\n" in output
    assert "init --data YOUR.jsonl" in output, "the run is the demonstration"


class QueuedCluster(LocalCluster):
    """Reports a run that waits in a queue, and on the next query as completed."""

    status_interval_s = 0.0
    is_queued = True

    def status(self, run: RunDir) -> Status:
        if self.is_queued:
            self.is_queued = False
            return replace(run_store.read_status(run), state="pending", message="waiting for resources (Resources)")
        return run_store.update_status(run, state="completed")


def test_follow_shows_why_a_run_has_not_started(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert follow(run, 1, QueuedCluster()) == 0
    assert capsys.readouterr().out.startswith("pending: waiting for resources (Resources)\njoined\n")


def test_follow_reports_why_the_run_does_not_continue(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run, 2, "killed by SIGKILL")
    output = closing(run, "the cluster did not provide the workers within 10 minutes", capsys)
    assert "rank 1 failed first: killed by SIGKILL" in output
    assert "failed: the cluster did not provide the workers within 10 minutes" in output


@pytest.mark.parametrize("ended", [True, False])
def test_follow_names_the_agent_log_if_no_rank_failed_first(run: RunDir, capsys: pytest.CaptureFixture[str], ended: bool) -> None:
    fail(run, 1, "killed by SIGKILL")
    if ended:
        fail(run, 2, "", rank=None)
    run.agent_log(1).touch()
    output = closing(run, "no record from n2; cluster.max_infrastructure_failures=1 is used up", capsys)
    assert output.startswith("failed: no record from n2; cluster.max_infrastructure_failures=1 is used up\n  log:    ")
    assert "attempts/001/agent.log" in output
    assert "SIGKILL" not in output


def write_export(run: RunDir, step: int) -> None:
    run.export.mkdir()
    json_records.write(run.export / run_records.EXPORT_RECORD, ExportRecord(step, "d", "bf16"))


def test_an_export_of_an_earlier_step_is_shown_with_its_step(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_export(run, 5)
    assert follow(run, 2, LocalCluster()) == 0
    output = capsys.readouterr().out
    assert "export, which holds step 5\n" in output


def test_the_best_weights_of_a_run_that_ended_early_are_its_result(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run_store.update_status(run, state="completed", step=10, max_steps=40)
    write_export(run, 5)
    assert follow(run, 2, LocalCluster()) == 0
    output = capsys.readouterr().out
    assert "export, which holds step 5" in output
    assert f"resume {short_path(run.root)} eval.stop_after=0" in output
    run_store.update_status(run, step=40)
    assert follow(run, 2, LocalCluster()) == 0
    assert "train.max_steps=..." in capsys.readouterr().out


def test_a_run_that_was_cancelled_before_its_first_step_can_be_resumed(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.checkpoints)
    run.metrics.unlink()
    run_store.update_status(run, state="cancelled", step=0, message="cancelled while the job was waiting")
    assert follow(run, 2, LocalCluster()) == EXIT_INTERRUPTED
    assert "start it again with: python -m launcher resume " in capsys.readouterr().out


def test_a_run_that_reached_a_limit_is_continued_with_a_higher_one(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run_store.update_status(run, state="preempted", message="run.max_hours=2 is reached")
    assert follow(run, 2, LocalCluster()) == EXIT_INTERRUPTED
    output = capsys.readouterr().out
    assert output.startswith("\npreempted: run.max_hours=2 is reached\n") or "\npreempted: run.max_hours=2 is reached\n" in output
    assert output.rstrip().endswith(" run.max_hours=...")


def test_follow_names_the_output_of_a_job_that_has_no_agent_log(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run_store.write_attempt(run, 1, replace(run_store.read_attempt(run, 1), job="41"))
    log = run.agent_log(1, "41")
    log.parent.mkdir(parents=True)
    log.touch()
    output = closing(run, "no record from n2", capsys)
    assert "jobs/41/41_0_log.out" in output
    assert "agent.log" not in output


def test_logs_end_with_the_cause_in_one_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        run.rank_log(number, 0).write_text("step 1\n")
    line = "rank 1 on n2: killed by SIGSEGV"
    hand_made.end(run, state="pending", message=f"{line}\nmore of it")

    def logs(*arguments: str) -> str:
        assert VERBS["logs"].execute([str(run.root), *arguments]) == 0
        return capsys.readouterr().out

    run_store.update_status(run, state="completed", attempt=2, message="")
    assert logs() == "step 1\n"
    assert logs("--attempt", "1") == f"step 1\n\nattempt 1 failed: {line}\n"
    hand_made.end(run, state="pending", message="saved at step 1", cause="preempted")
    assert logs("--attempt", "1") == "step 1\n\nattempt 1 ended (preempted): saved at step 1\n"
    run_store.update_status(run, state="failed", message=f"{line}\nmore of it")
    assert logs() == f"step 1\n\nattempt 2 failed: {line}\n"
