"""The conclusion of a Slurm job: what it records, and what it requests from Slurm."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import slurm_said
from fake_slurm import FakeSlurm, Job, Submitted

from launcher.clusters.slurm import cluster, queue
from launcher.clusters.slurm.commands import SlurmError, SlurmUnreachable, slurm
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs import atomic_files, journal, json_records, run_records, run_store
from launcher.worker.slurm import job

pytestmark = pytest.mark.rest


@pytest.fixture
def stopped(submitted: Submitted) -> Job:
    """A job whose ranks have saved and stopped before its end."""
    of = submitted()
    of.begun()
    of.outcome("preempted")
    return of


@pytest.fixture
def on_bad_node(submitted: Submitted) -> Job:
    """A job that may exclude nodes, after one of its nodes failed its checks."""
    of = submitted(exclude_bad_nodes=True)
    of.begun()
    of.bad_node()
    return of


def test_a_completed_run_is_over(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun()
    of.outcome("completed", step=60)
    of.saved(60)
    assert of.conclude(code=0) == 0
    written = of.exit()
    assert (written["state"], written["cause"], written["step"], written["saved_step"]) == ("completed", "completed", 60, 60)
    assert (of.status.state, of.status.step, of.status.message) == ("completed", 60, "as the ranks say")
    assert fake_slurm.told() == []


@pytest.mark.parametrize("left_s, cause", [(3600, "preempted"), (30, "time_limit")])
def test_an_interrupted_run_is_requeued(submitted: Submitted, fake_slurm: FakeSlurm, left_s: float, cause: str) -> None:
    of = submitted()
    of.begun(ends_at=time.time() + left_s)
    of.outcome("preempted")
    of.saved(40)
    assert of.conclude() == 0
    assert fake_slurm.told() == [["scontrol", "requeue", "41"]]
    assert (of.exit()["cause"], of.exit()["state"]) == (cause, "pending")
    assert (of.status.state, of.status.step, of.status.message) == ("pending", 40, "as the ranks say; runs again")
    assert run_store.newest_attempt(of.run) == 1, "the next start opens the next attempt"


@pytest.mark.parametrize("settings", [{}, {"requeue": False}])
def test_where_a_requeue_is_refused_the_run_is_submitted_again(
    submitted: Submitted, fake_slurm: FakeSlurm, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = submitted(additional_parameters={"dependency": "afterok:7", "exclude": "n9"}, **settings)
    of.begun()
    of.outcome("preempted")
    of.saved(40)
    fake_slurm.refuse("scontrol", "requeue", said=slurm_said.REQUEUE_DISABLED)
    # The next job must not inherit the environment of this one.
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    assert of.conclude() == 0
    *requeue, sbatch = fake_slurm.told()
    assert requeue == ([["scontrol", "requeue", "41"]] if not settings else [])
    again = of.attempt(2)
    assert (again.resume_step, again.job, again.automatic) == (40, None, True)
    assert json_records.read_json(of.run.attempt(2) / "submitted.json")["job"] == "4242"
    script = (of.run.jobs / "4242/4242_submission.sh").read_text()
    assert sbatch[0] == "sbatch"
    assert "#SBATCH --dependency=afterany:41\n" in script
    assert "#SBATCH --exclude=n9\n" in script
    assert f"begin {of.run.attempt(2)}/plan.json" in script
    plan = run_store.load_plan(of.run)
    assert plan == LaunchPlan.load(of.run.attempt(2) / "plan.json")
    assert plan.config.cluster.additional_parameters["dependency"] == "afterany:41"
    assert not [name for name in fake_slurm.variables_of("sbatch") if name.startswith(("SBATCH_", "SLURM"))]
    assert os.environ["SBATCH_PARTITION"] == "elsewhere"
    assert of.status.state == "pending"


def test_the_error_of_sbatch_is_in_the_status(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted(requeue=False)
    of.begun()
    of.outcome("preempted")
    fake_slurm.refuse("sbatch", said=slurm_said.NOT_AVAILABLE)
    assert of.conclude() == 1
    assert of.status.state == "failed"
    assert of.status.message == f"the run could not be submitted again: sbatch refused the job: {slurm_said.NOT_AVAILABLE}"


@pytest.mark.parametrize("exclude", [None, "n9"])
def test_a_bad_node_is_excluded_from_the_next_start(submitted: Submitted, fake_slurm: FakeSlurm, exclude: str | None) -> None:
    of = submitted(exclude_bad_nodes=True, additional_parameters={"exclude": exclude} if exclude else {})
    of.begun()
    of.bad_node()
    assert of.conclude() == 0
    assert fake_slurm.told() == [
        ["scontrol", "requeuehold", "41"],
        ["scontrol", "update", "JobId=41", f"ExcNodeList={'n9,n2' if exclude else 'n2'}"],
        ["scontrol", "release", "41"],
    ]
    assert (of.exit()["cause"], of.exit()["bad_nodes"]) == ("bad_node", ["n2"])


@pytest.mark.parametrize("exclude", [None, "n9"])
def test_a_bad_node_is_not_excluded_after_a_newer_checkpoint(
    submitted: Submitted, fake_slurm: FakeSlurm, exclude: str | None
) -> None:
    of = submitted(exclude_bad_nodes=True, additional_parameters={"exclude": exclude} if exclude else {})
    of.begun()
    of.outcome("preempted")
    details = slurm_said.job().replace("ExcNodeList=(null)", "ExcNodeList=n[2,9]")
    fake_slurm.answer("scontrol", "show", "job", "41", out=details)
    assert of.conclude() == 0
    assert fake_slurm.told() == [
        ["scontrol", "requeuehold", "41"],
        ["scontrol", "update", "JobId=41", f"ExcNodeList={exclude or ''}"],
        ["scontrol", "release", "41"],
    ]


def test_a_bad_node_ends_the_run_where_exclusion_is_off(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun()
    of.bad_node()
    assert of.conclude() == 1
    assert fake_slurm.told() == []
    assert of.status.state == "failed"
    assert "cluster.exclude_bad_nodes=true" in of.status.message


def test_a_job_is_not_left_held(on_bad_node: Job, fake_slurm: FakeSlurm) -> None:
    fake_slurm.refuse("scontrol", "update", said="slurm_update error: Invalid node name specified")
    assert on_bad_node.conclude() == 0
    assert [call[:2] for call in fake_slurm.told()[:3]] == [["scontrol", verb] for verb in ("requeuehold", "update", "release")]
    assert fake_slurm.told()[3][0] == "sbatch"


def test_a_job_that_slurm_preempts_and_requeues_is_not_requeued_twice(stopped: Job, fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("scontrol", "show", "job", "41", out=slurm_said.job(preempted="1795553524"))
    assert stopped.conclude() == 0
    assert fake_slurm.told() == []
    assert (stopped.status.state, stopped.exit()["cause"]) == ("pending", "preempted")


@pytest.mark.parametrize("how", [{"requeue": 0}, {"partition": "high"}])
def test_a_preempted_job_that_slurm_does_not_requeue_is_requeued(
    stopped: Job, fake_slurm: FakeSlurm, how: dict[str, Any]
) -> None:
    fake_slurm.answer("scontrol", "show", "job", "41", out=slurm_said.job(preempted="1795553524", **how))
    assert stopped.conclude() == 0
    assert fake_slurm.told() == [["scontrol", "requeue", "41"]]


@pytest.mark.parametrize("kind", ["preempt/qos", None])
def test_a_preempted_job_is_requeued_where_slurms_requeue_is_uncertain(
    stopped: Job, fake_slurm: FakeSlurm, kind: str | None
) -> None:
    fake_slurm.answer("scontrol", "show", "job", "41", out=slurm_said.job(preempted="1795553524"))
    if kind is None:
        fake_slurm.refuse("scontrol", "show", "config", said="slurm_load_ctl_conf error: Access/permission denied")
    else:
        fake_slurm.answer("scontrol", "show", "config", out=slurm_said.CONFIG.replace("preempt/partition_prio", kind))
    assert stopped.conclude() == 0
    assert fake_slurm.told() == [["scontrol", "requeue", "41"]]


def test_a_job_that_an_operator_requeues_is_not_requeued_twice(stopped: Job, fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("scontrol", "show", "job", "41", "--json", out=slurm_said.job_json("PENDING", "COMPLETING"))
    assert stopped.conclude() == 0
    assert fake_slurm.told() == []
    assert stopped.status.state == "pending"


def test_a_cancelled_run_is_not_requeued(stopped: Job, fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("scontrol", "show", "job", "41", "--json", out=slurm_said.job_json("CANCELLED", "COMPLETING"))
    assert stopped.conclude() == 1
    assert fake_slurm.told() == []
    assert (stopped.status.state, stopped.exit()["cause"]) == ("cancelled", "cancelled")


def test_a_user_error_is_not_requeued(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun()
    of.failed("DataError")
    assert of.conclude() == 1
    assert fake_slurm.told() == []
    assert (of.status.state, of.status.message) == ("failed", "rank 3 on n1: what it said")
    assert of.exit()["first_failure"]["kind"] == "DataError"


def test_budgets_count_from_the_last_start_by_a_person(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted(max_failures=2)
    of.ended(1, "failure")
    of.ended(2, "failure", automatic=True)
    of.ended(3, "failure", automatic=False)
    of.ended(4, "failure", automatic=True)
    of.begun(5, automatic=True)
    of.failed("ValueError")
    assert of.conclude(5) == 1
    assert of.status.message == "rank 3 on n1: what it said; cluster.max_failures=2 is used up"
    assert fake_slurm.told() == []
    of.begun(4, automatic=True)
    of.begun(5, automatic=False)
    assert of.conclude(5) == 0


def test_a_superseded_slurm_attempt_writes_nothing(stopped: Job, fake_slurm: FakeSlurm) -> None:
    stopped.begun(2, automatic=True)
    before = stopped.status
    assert stopped.conclude(1) == 1
    assert stopped.exit() == {}
    assert stopped.status == before
    assert fake_slurm.told() == []


def test_the_job_concludes_where_slurm_does_not_answer(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun()
    of.outcome("completed")
    for verb in (("scontrol", "show", "job", "41"), ("scontrol", "show", "job", "41", "--json")):
        fake_slurm.refuse(*verb, said=slurm_said.UNREACHABLE)
    assert of.conclude(code=0) == 0
    assert of.status.state == "completed"
    assert len(fake_slurm.calls) == 1, "a run that is over waits for no answer"


@pytest.mark.parametrize(
    ("ends_in_s", "least", "most"), [(None, 900, 900), (3600, 900, 900), (100, 80, 90), (5, 0, 0), (-60, 0, 0)]
)
def test_calls_to_slurm_end_before_the_jobs_time_does(ends_in_s: float | None, least: float, most: float) -> None:
    ends_at = None if ends_in_s is None else time.time() + ends_in_s
    assert least <= job._patience_s(run_records.Attempt(None, ends_at=ends_at)) <= most


def test_a_requeue_without_an_answer_is_retried(stopped: Job, fake_slurm: FakeSlurm) -> None:
    fake_slurm.refuse("scontrol", "requeue", said=slurm_said.UNREACHABLE, times=2)
    assert stopped.conclude() == 0
    assert fake_slurm.told() == [["scontrol", "requeue", "41"]] * 3
    assert run_store.newest_attempt(stopped.run) == 1


def test_a_requeue_whose_answer_was_lost_is_not_repeated(stopped: Job, fake_slurm: FakeSlurm) -> None:
    fake_slurm.refuse("scontrol", "requeue", said="Requeue: Socket timed out on send/recv operation for job 41")
    fake_slurm.answer("scontrol", "show", "job", "41", "--json", out=slurm_said.job_json("PENDING", "COMPLETING"))
    fake_slurm.answer("scontrol", "show", "job", "41", "--json", out=slurm_said.job_json("RUNNING"), times=1)
    assert stopped.conclude() == 0
    assert fake_slurm.told() == [["scontrol", "requeue", "41"]]


def test_a_job_that_cannot_be_released_is_cancelled_before_another_is_submitted(
    submitted: Submitted, fake_slurm: FakeSlurm
) -> None:
    of = submitted(exclude_bad_nodes=True)
    of.begun()
    of.bad_node()
    fake_slurm.refuse("scontrol", "release", said="Access/permission denied for job 41")
    assert of.conclude() == 0
    assert [call[:2] for call in fake_slurm.told()[2:4]] == [["scontrol", "release"], ["scancel", "41"]]
    assert fake_slurm.told()[4][0] == "sbatch"


def test_a_resubmission_fails_where_another_command_holds_the_run(
    submitted: Submitted, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = submitted(requeue=False)
    of.begun()
    of.outcome("preempted")
    monkeypatch.setattr(cluster, "_LOCK_WAIT_S", 0.1)
    with run_store.start_lock(of.run):
        assert of.conclude() == 1
    assert run_store.newest_attempt(of.run) == 1
    assert fake_slurm.told() == []


def test_a_full_disk_does_not_prevent_the_requeue(stopped: Job, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_files, "write_text", full)
    monkeypatch.setattr(journal, "append", full)
    code, _, err = stopped._main("conclude", str(stopped.run.plan), "1", "1")
    assert code == 0
    assert err.count("but the launcher acts on it: [Errno 28] No space left on device\n") == 2
    assert fake_slurm.told() == [["scontrol", "requeue", "41"]]


@pytest.mark.parametrize(
    ("said", "lasted_s", "restart", "state"),
    [
        ({"state": "CANCELLED"}, 95, 0, "CANCELLED"),
        ({"state": "COMPLETING"}, 95, 0, "CANCELLED"),
        ({"state": "RUNNING", "restarts": 1}, 95, 1, "CANCELLED"),
        ({"state": "COMPLETING", "limit": "1-00:10:00"}, 600, 0, "CANCELLED"),
        # It has no time limit. The controller's clock is ahead of this node's.
        ({"state": "RUNNING", "limit": "UNLIMITED"}, 220, 0, "CANCELLED"),
        ({"state": "RUNNING", "limit": "UNLIMITED"}, 86400, 0, ""),
        ({"state": "COMPLETING", "restarts": 1}, 95, 0, "PENDING"),
        ({"state": "COMPLETING"}, 580, 0, ""),
        ({"state": "RUNNING"}, 600, 0, ""),
        # An administrator has shortened the time limit.
        ({"state": "RUNNING", "limit": "00:02:30"}, 150, 0, ""),
        ({"state": "COMPLETING", "preempted": "990"}, 95, 0, ""),
        ({"state": "COMPLETING", "reason": "NodeDown"}, 95, 0, ""),
    ],
)
def test_the_job_state_is_known_without_json_output(
    fake_slurm: FakeSlurm, said: dict[str, Any], lasted_s: int, restart: int, state: str
) -> None:
    """The job began 100 seconds ago, and its end is `lasted_s` seconds after that, on the controller's clock."""
    began = int(time.time()) - 100
    fake_slurm.refuse("scontrol", "show", "job", "41", "--json", said=slurm_said.NO_JSON)
    job_said = slurm_said.job(begins=str(began), ends=str(began + lasted_s), **said)
    fake_slurm.answer("scontrol", "show", "job", "41", out=job_said)
    assert queue.state_beneath("41", restart, None) == state


def test_a_refusal_of_slurm_is_final_and_silence_is_retried(fake_slurm: FakeSlurm) -> None:
    fake_slurm.refuse("scancel", "1", said="scancel: error: Kill job error on job id 1: Invalid job id specified")
    with pytest.raises(SlurmError) as refused:
        slurm("scancel", "1", retry_s=60)
    assert not isinstance(refused.value, SlurmUnreachable)
    assert len(fake_slurm.calls) == 1
    fake_slurm.refuse("scancel", "2", said=slurm_said.UNREACHABLE)
    with pytest.raises(SlurmUnreachable, match="Unable to contact slurm controller"):
        slurm("scancel", "2")
    assert len(fake_slurm.calls) == 2
    with pytest.raises(SlurmUnreachable):
        slurm("scancel", "2", retry_s=0.2)
    assert len(fake_slurm.calls) > 3
    (fake_slurm.folder / "sinfo").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(SlurmUnreachable, match="did not answer"):
        slurm("sinfo", deadline_s=0.2)


def test_term_from_the_jobs_own_requeue_does_not_stop_the_conclusion(on_bad_node: Job, fake_slurm: FakeSlurm) -> None:
    """As soon as Slurm accepts the requeue, it ends the job and this process with it."""
    fake_slurm.answer("scontrol", "requeuehold", signals=[signal.SIGTERM])
    command = [sys.executable, "-m", "launcher.worker.slurm.job", "conclude", str(on_bad_node.run.plan), "1", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(Path(job.__file__).parents[2])}, timeout=60)
    assert done.returncode == 0
    assert [call[1] for call in fake_slurm.told()] == ["requeuehold", "update", "release"]
