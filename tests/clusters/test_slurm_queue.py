"""States of jobs on a real Slurm: waiting, running, ended and unknown."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from testbed_cluster import Testbed

from launcher.clusters.slurm import queue
from launcher.clusters.slurm.commands import SlurmError, slurm

pytestmark = [pytest.mark.slurm, pytest.mark.rest]

NAME = "tried run"
Wait = Callable[[Callable[[], Any]], Any]


def submit(*options: str, command: str = "sleep 600", name: str = NAME, folder: Path = Path("/tmp")) -> str:
    argv = ("--parsable", f"--job-name={name}", "--output=/dev/null", f"--chdir={folder}", f"--wrap={command}", *options)
    return slurm("sbatch", *argv).strip()


def look(job_id: str, name: str = NAME) -> queue.Job:
    found = queue.read_job(job_id, time.time(), name)
    assert found is not None
    return found


def in_state(job_id: str, *states: str, name: str = NAME) -> queue.Job | None:
    found = queue.read_job(job_id, time.time(), name)
    return found if found is not None and found.state in states else None


def test_a_job_is_running_and_then_cancelled(here: Testbed, eventually: Wait) -> None:
    job_id = submit("--nodes=2", "--time=10")
    running = eventually(lambda: in_state(job_id, "RUNNING"))
    assert running.queued
    assert (running.node_list, running.restarts, running.start_estimate) == ("n[1-2]", 0, None)
    assert queue.explain(running) == "running"
    slurm("scancel", job_id)
    cancelled = eventually(lambda: in_state(job_id, "CANCELLED"))
    assert not cancelled.queued


@pytest.mark.parametrize(
    ("command", "state", "exit_signal"), [("true", "COMPLETED", 0), ("exit 3", "FAILED", 0), ("kill -9 $$", "FAILED", 9)]
)
def test_the_final_state_of_a_job_is_known_at_once(
    here: Testbed, eventually: Wait, command: str, state: str, exit_signal: int
) -> None:
    job_id = submit(command=command)
    ended = eventually(lambda: (found := look(job_id)) and not found.queued and found)
    assert (ended.state, ended.exit_signal) == (state, exit_signal)
    accounted = eventually(lambda: queue._read_accounting(job_id, time.time() - 60, NAME, 0.0))
    assert (accounted.state, accounted.exit_signal) == (state, exit_signal)
    assert queue.find_lost_nodes(["n1", "n2"], time.time()) == []


def test_a_requeued_job_is_still_queued(here: Testbed, eventually: Wait) -> None:
    job_id = submit()
    eventually(lambda: in_state(job_id, "RUNNING"))
    slurm("scontrol", "requeue", job_id)
    while (found := look(job_id)).state != "PENDING":
        assert found.queued
    assert (found.queued, found.restarts, found.node_list) == (True, 1, "")
    again = eventually(lambda: in_state(job_id, "RUNNING"))
    assert again.restarts == 1


def test_every_reason_to_wait_is_explained(here: Testbed, eventually: Wait) -> None:
    filling = submit("--nodes=3", "--exclusive", "--time=30")
    eventually(lambda: in_state(filling, "RUNNING"))
    held = submit("--hold")
    slurm("scontrol", "hold", admin := submit("--hold"))
    failed = submit("--hold")
    never = submit(f"--dependency=afterok:{failed}")
    slurm("scancel", failed)
    waiting = {
        "Resources": (
            submit("--priority=5000"),
            r"waiting for nodes \(Resources\); Slurm expects it to start at (\d{4}-\d\d-\d\d )?\d\d:\d\d",
        ),
        "Priority": (submit("--priority=4000"), r"waiting for nodes, behind jobs of higher priority \(Priority\).*"),
        "BeginTime": (
            submit("--begin=now+40days"),
            r"its earliest start time has not come; .*; Slurm expects it to start at \d{4}-\d\d-\d\d \d\d:\d\d",
        ),
        "Dependency": (submit(f"--dependency=afterok:{filling}"), r"waiting for the jobs that it depends on \(Dependency\)"),
        "DependencyNeverSatisfied": (never, rf".* cancel it, or .* scontrol update JobId={never} Dependency= \(.*\)"),
        "JobHeldUser": (held, rf"held; release it with: scontrol release {held} \(JobHeldUser\)"),
        "JobHeldAdmin": (admin, r"held by an administrator; ask them for the reason \(JobHeldAdmin\)"),
        "PartitionTimeLimit": (submit("--partition=short", "--time=30"), r"cluster.time exceeds .* \(PartitionTimeLimit\)"),
    }
    for reason, (job_id, words) in waiting.items():
        job = eventually(lambda job_id=job_id, reason=reason: (found := look(job_id)).reason == reason and found)
        assert (job.state, job.queued) == ("PENDING", True)
        # Slurm estimates start times in the background.
        assert eventually(lambda job_id=job_id, words=words: re.fullmatch(words, queue.explain(look(job_id))))
    found = queue.read_jobs({job_id: NAME for job_id, _ in waiting.values()})
    assert sorted(job.reason for job in found.values()) == sorted(waiting)


def test_a_job_that_needs_a_drained_node_is_explained(here: Testbed, eventually: Wait) -> None:
    slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=fan")
    job_id = submit("--nodelist=n2")
    job = eventually(lambda: (found := look(job_id)).reason.startswith("ReqNodeNotAvail") and found)
    assert queue.explain(job).startswith("nodes that it needs are down, drained or reserved; sinfo -R shows the reasons;")
    everything = submit("--nodes=3")
    job = eventually(lambda: (found := look(everything)).reason.startswith("Nodes required") and found)
    assert queue.explain(job).startswith("nodes that it needs are down, drained or reserved; sinfo -R shows the reasons;")


def test_unknown_reasons_and_states_are_shown_unchanged() -> None:
    job = queue.Job("7", "PENDING", "SunSpots", None, 0, "", queued=True)
    assert queue.explain(job) == "pending (SunSpots)"
    assert queue.explain(replace(job, state="STAGE_OUT", reason="")) == "stage out"
    assert queue.explain(replace(job, state="FAILED", reason="NonZeroExitCode", queued=False)) == "failed (NonZeroExitCode)"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("QOSMaxJobsPerUserLimit", "other jobs use up the limit of its QOS or account"),
        ("QOSMaxWallDurationPerJobLimit", "it requests more than its QOS or account allows one job"),
        ("AssocGrpGRES", "other jobs use up the limit of its QOS or account"),
        ("launch failed requeued held", "Slurm could not start it on its nodes"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "nodes that it needs are down"),
    ],
)
def test_limits_of_qos_and_account_are_explained(reason: str, words: str) -> None:
    explained = queue.explain(queue.Job("7", "PENDING", reason, None, 0, "", queued=True))
    assert explained.startswith(words)
    assert explained.endswith(f" ({reason})")


def test_jobs_are_known_by_number_and_name(here: Testbed) -> None:
    job_id = submit("--hold")
    assert queue.read_job("4", time.time(), NAME) is None
    assert queue.read_job(job_id, time.time(), "another run") is None
    assert list(queue.read_jobs({"4": NAME, job_id: NAME, "5": NAME})) == [job_id]
    assert queue.read_jobs({"4": NAME}) == {}
    assert queue.read_jobs({}) == {}


def test_slurm_variables_of_the_shell_are_ignored(here: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit("--begin=now+1hour")
    settings = {"SQUEUE_STATES": "RUNNING", "SQUEUE_FORMAT": "%i", "SQUEUE_USERS": "nobody", "SLURM_TIME_FORMAT": "relative"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    estimate = look(job_id).start_estimate
    assert estimate is not None
    assert abs(estimate - time.time() - 3600) < 30


def test_details_parse_free_texts(here: Testbed, tmp_path: Path) -> None:
    folder = tmp_path / "a folder with Reason=None"
    folder.mkdir()
    comment = "two words, a=b, JobState=DONE\nPartition=lost"
    job_id = submit("--begin=now+1hour", "--time=1:00:00", f"--comment={comment}", name="n JobState=NO", folder=folder)
    found = queue.read_details(job_id)
    assert (found["JobId"], found["JobName"], found["JobState"]) == (job_id, "n JobState=NO", "PENDING")
    assert (found["Reason"], found["Partition"], found["TimeLimit"]) == ("BeginTime", "main", "01:00:00")
    assert (found["Requeue"], found["Restarts"], found["NodeList"]) == ("1", "0", "")
    assert found["WorkDir"] == str(folder)
    assert found["Comment"] == "two words, a=b, JobState=DONE"
    assert found["ReqTRES"].startswith("cpu=1,mem=")
    assert abs(float(found["StartTime"]) - time.time() - 3600) < 30


def test_without_accounting_squeue_is_enough(bare_slurm: Testbed, use: Callable[[Testbed], Testbed], eventually: Wait) -> None:
    use(bare_slurm)
    job_id = submit(command="exit 4")
    assert eventually(lambda: in_state(job_id, "FAILED")).queued is False
    assert queue.read_job("4", time.time(), NAME) is None


def test_a_controller_that_does_not_answer_raises_an_error(bare_slurm: Testbed, use: Callable[[Testbed], Testbed]) -> None:
    use(bare_slurm)
    bare_slurm.stop_controller()
    try:
        # Two jobs, because squeue retries longer for a single one.
        with pytest.raises(SlurmError):
            queue.read_jobs({"4": NAME, "5": NAME})
    finally:
        bare_slurm.start_controller()


def test_a_job_that_slurmctld_has_forgotten_is_found_in_the_accounting(
    other_slurm: Callable[..., AbstractContextManager[Testbed]], use: Callable[[Testbed], Testbed], eventually: Wait
) -> None:
    """After the controller has lost its state, job numbers start again, so a new job gets the number of an old one."""
    began = time.time()
    with other_slurm(nodes=1) as bed:
        use(bed)
        old = submit(command='test "$SLURM_RESTART_COUNT" || { scontrol requeue $SLURM_JOB_ID; sleep 60; }; exit 3', name="old")
        eventually(lambda: in_state(old, "FAILED", name="old"))
        bed.stop_controller()
        for state in (bed.root / "state").glob("job_state*"):
            state.unlink()
        bed.start_controller()
        ended = queue.read_job(old, began, "old")
        assert ended is not None
        assert (ended.state, ended.queued, ended.node_list, ended.restarts) == ("FAILED", False, "n1", 1)
        assert submit("--hold", name="young") == old
        assert queue.read_job(old, began, "old") == ended
        assert look(old, "young").state == "PENDING"
        assert queue.read_job(old, began, "other") is None
