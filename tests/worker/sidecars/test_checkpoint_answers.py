"""Which checkpoints of a run are evaluated, by whom, and what the run reports about the others."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import hand_made
import psutil
import pytest
from fake_slurm import FakeSlurm
from hand_made import event_texts, made_verdict
from mirror_tools import commit
from pace import wait_for
from plan_fixtures import DATA, facts_for

from launcher.clusters.backends import describe_answers
from launcher.evaluate.evaluation_folder import EvaluatedExport, EvaluationFolder
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import Attempt
from launcher.tracking.verdicts import digest_checkpoint
from launcher.worker.sidecars import checkpoint_answers
from launcher.worker.sidecars.checkpoint_answers import CheckpointAnswers
from launcher.worker.sidecars.sidecar import start_answers

EVERY_4 = ("eval.answers_every=4", "checkpoint.save_every=2", "run.name=tried")
GPUS = DeviceFacts(kind="cuda", name="NVIDIA H100 80GB HBM3", count=2, memory_gib=79.6)


@pytest.fixture
def make(config_of: Callable, tmp_path: Path) -> Callable[..., tuple[LaunchPlan, RunDir]]:
    """A run with eval.answers_every=4, as it is after submission."""

    def make_run(*settings: str, device: DeviceFacts | None = None) -> tuple[LaunchPlan, RunDir]:
        config = config_of("model=tiny", "train.max_steps=100", *EVERY_4, *settings)
        chosen = {} if device is None else {"device": device}
        planned = plan(config, facts_for(config, data=DATA, working_dir=str(tmp_path), **chosen))
        return planned, hand_made.run(planned, Attempt(None), state="running")

    return make_run


def export_by_hand(run: RunDir, step: int) -> None:
    """Write what launcher.evaluate.weights leaves after an export."""
    folder = EvaluationFolder.of(run.root, step)
    folder.weights.mkdir(parents=True)
    json_records.write(folder.weights_record, EvaluatedExport(digest_checkpoint(run, step), "bf16", "digest"))


def answer_by_hand(run: RunDir, step: int) -> None:
    folder = EvaluationFolder.of(run.root, step).root
    folder.mkdir(parents=True, exist_ok=True)
    replace(made_verdict(), checkpoint=digest_checkpoint(run, step)).write(folder)


def command(run: RunDir) -> str:
    return f"answer them with: python -m launcher evaluate {run.root} --step STEP"


def test_on_gpus_weights_are_exported_while_training_and_nothing_else(make: Callable) -> None:
    """The export of a fake checkpoint fails; training continues."""
    planned, run = make(device=GPUS)
    assert describe_answers(planned).endswith("on the GPUs of this machine after the last step, before the run ends")
    answers = CheckpointAnswers(run, planned, 1)
    for step in (2, 4, 6, 8):
        commit(run, step)
    export_by_hand(run, 4)
    assert not answers.work(False)
    began = time.monotonic()
    while not event_texts(run, "alert"):
        assert time.monotonic() - began < 300
        answers.work(False)
        time.sleep(0.1)
    (alert,) = event_texts(run, "alert")
    assert alert.startswith("no answers of step 8: its weights could not be exported: ")
    assert [path.parent.name for path in run.root.glob("evaluations/*/*.log")] == ["step-00000008"], "of no other step"
    answers.conclude(False)
    (left,) = event_texts(run, "answers")
    assert left.startswith("no answers yet: step 4, step 8 (its weights could not be exported: ")
    assert left.endswith(f"; a resumed run continues with them; {command(run)}")


def test_a_checkpoint_that_is_gone_is_skipped_with_the_reason_unless_its_weights_are_there(make: Callable) -> None:
    planned, run = make(device=GPUS)
    gone, kept, answered = (commit(run, step) for step in (4, 8, 12))
    export_by_hand(run, 8)
    answer_by_hand(run, 12)
    shutil.rmtree(gone.path)
    shutil.rmtree(kept.path)
    shutil.rmtree(answered.path)
    commit(run, 14)
    answers = CheckpointAnswers(run, planned, 1)
    answers.work(False)
    answers.conclude(False)
    (alert,) = event_texts(run, "alert")
    reason = "its checkpoint was removed before its weights were exported; raise checkpoint.keep_last"
    assert alert == f"no answers of step 4: {reason}"
    (left,) = event_texts(run, "answers")
    assert left.startswith(f"no answers yet: step 4 ({reason}), step 8; ")
    # An attempt that resumes from an earlier step neither repeats the alert nor uses the weights of the abandoned step.
    shutil.rmtree(run.checkpoints)
    commit(run, 6)
    run_store.create_attempt(run, Attempt(resume_step=6))
    later = CheckpointAnswers(run, planned, 2)
    later.work(False)
    later.conclude(False)
    assert (len(event_texts(run, "alert")), len(event_texts(run, "answers"))) == (1, 1)


def test_another_checkpoint_of_the_same_step_is_answered_again(make: Callable) -> None:
    planned, run = make(device=GPUS)
    commit(run, 4)
    answer_by_hand(run, 4)
    commit(run, 6)
    answers = CheckpointAnswers(run, planned, 1)
    assert answers.work(True), "nothing is left"
    commit(run, 4, b"others")
    answers.work(False)
    answers.conclude(False)
    assert event_texts(run, "answers")[-1].startswith("no answers yet: step 4; ")


@pytest.fixture
def on_slurm(make: Callable, fake_slurm: FakeSlurm) -> tuple[LaunchPlan, RunDir]:
    fake_slurm.answer("sbatch", out="77\n", times=1)
    planned, run = make("cluster=slurm", "cluster.nodes=4", "cluster.partition=short", device=GPUS)
    run.jobs.mkdir()
    return planned, run


def test_on_slurm_each_step_is_a_job_of_one_node(on_slurm: tuple[LaunchPlan, RunDir], fake_slurm: FakeSlurm) -> None:
    planned, run = on_slurm
    assert describe_answers(planned).endswith("in a job of one node for each of these steps, one after another")
    commit(run, 4)
    export_by_hand(run, 4)
    answers = CheckpointAnswers(run, planned, 1)
    assert not answers.work(False)
    assert event_texts(run, "answers") == ["the answers of step 4 come from job 77"]
    (submitted,) = [call for call in fake_slurm.calls if call[0] == "sbatch"]
    folder = run.root / "evaluations/step-00000004"
    for word in ("--parsable", "--dependency=singleton", "--nodes=1", "--partition=short", "--gpus-per-node=2"):
        assert word in submitted
    assert f"--job-name=launcher-answers-{planned.wandb_id}" in submitted
    assert submitted[-1] == str(folder / "job.sh")
    script = (folder / "job.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"launcher evaluate {run.root} --step 4 --here" in script
    assert "SLURM_JOB_ID" not in fake_slurm.variables_of("sbatch"), "that of the run's own job"
    # The attempt ends before the job. A resumed run cancels it and submits another one, and cancelling the run cancels that.
    answers.conclude(True)
    assert event_texts(run, "answers")[-1] == f"no answers yet: step 4 (job 77); {command(run)}"
    run_store.create_attempt(run, Attempt(resume_step=4))
    fake_slurm.answer("sbatch", out="78\n", times=1)
    later = CheckpointAnswers(run, planned, 2)
    later.work(False)
    cancelled = ["scancel", "--me", f"--name=launcher-answers-{planned.wandb_id}"]
    assert [call[0] if call[0] == "sbatch" else call for call in fake_slurm.calls] == ["sbatch", cancelled, "sbatch"]
    run.cancel(2).write_text("{}")
    later.conclude(False)
    assert fake_slurm.calls[-1] == cancelled
    assert event_texts(run, "answers")[-1].startswith("no answers yet: step 4 (its job was cancelled); ")


def test_the_verdict_of_a_job_is_reported(on_slurm: tuple[LaunchPlan, RunDir]) -> None:
    planned, run = on_slurm
    commit(run, 4)
    answers = CheckpointAnswers(run, planned, 1)
    # When training has ended, the checkpoint stays, so the job exports it.
    assert answers.work(True)
    answer_by_hand(run, 4)
    answers.work(True)
    assert event_texts(run, "answers")[-1].startswith("answers of step 4: ")
    answers.conclude(True)
    assert len(event_texts(run, "answers")) == 2


def test_a_step_without_a_job_is_an_alert(on_slurm: tuple[LaunchPlan, RunDir], fake_slurm: FakeSlurm) -> None:
    planned, run = on_slurm
    fake_slurm.refuse("sbatch", said="sbatch: error: Job violates accounting/QOS policy", times=1)
    commit(run, 4)
    answers = CheckpointAnswers(run, planned, 1)
    answers.work(True)
    answers.conclude(True)
    first, left = event_texts(run, "alert")
    assert first.startswith("no answers of step 4: no job could be submitted: ")
    assert "QOS policy" in first
    assert left.startswith("no answers yet: step 4 (no job could be submitted: ")
    assert left.endswith(command(run))


def test_a_job_that_slurm_refuses_for_a_while_is_submitted_later(
    on_slurm: tuple[LaunchPlan, RunDir], fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, run = on_slurm
    fake_slurm.refuse("sbatch", said="sbatch: error: Job violates accounting/QOS policy", times=1)
    commit(run, 4)
    export_by_hand(run, 4)
    answers = CheckpointAnswers(run, planned, 1)
    for _ in range(3):
        answers.work(False)
    (refused,) = event_texts(run, "answers")
    assert "QOS policy" in refused
    monkeypatch.setattr(checkpoint_answers, "_SUBMIT_AGAIN_S", 0.0)
    answers.work(False)
    assert event_texts(run, "answers")[-1].startswith("the answers of step 4 come from job ")
    assert not event_texts(run, "alert")


def test_storage_that_fails_for_a_moment_loses_no_step(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, run = make(device=GPUS)
    commit(run, 4)
    # A copy made by a user is not used.
    export_by_hand(run, 4)
    shutil.copytree(run.root / "evaluations/step-00000004", run.root / "evaluations/step-00000004-first")
    answers = CheckpointAnswers(run, planned, 1)
    with monkeypatch.context() as patch:
        patch.setattr(json_records, "read_bytes", fail_to_read)
        answers.work(False)
    answers.conclude(False)
    assert event_texts(run, "answers")[-1].startswith("no answers yet: step 4; ")


def fail_to_read(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error")


def test_the_process_ends_at_once_with_all_it_has_started_where_training_is_not_complete(make: Callable, tmp_path: Path) -> None:
    planned, run = make()
    commit(run, 4)
    answers = start_answers(planned, str(run.plan), run, 1)
    assert answers is not None
    process = psutil.Process(answers.pid)
    try:
        wait_for("an evaluation", lambda: process.children(recursive=True), 120)
        (child, *_) = process.children()
        assert process.nice() == child.nice() == min(19, os.nice(0) + 10), "of an export"
        assert child.environ()["OMP_NUM_THREADS"] == "1"
        # The scheduler's signals are only for ranks.
        for number in (10, 12, 15, 1):
            process.send_signal(number)
        began = time.monotonic()
        answers.finish(0.0, lambda: False)
        assert time.monotonic() - began < 60
        assert not process.is_running()
        wait_for("the end of what it has started", lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        for one in (process, *process.children(recursive=True)) if process.is_running() else ():
            one.kill()
    assert event_texts(run, "answers")[-1].startswith("no answers yet: step 4; ")


@pytest.mark.rest
def test_what_it_has_started_ends_with_a_process_that_is_killed(make: Callable) -> None:
    planned, run = make()
    commit(run, 4)
    answers = start_answers(planned, str(run.plan), run, 1)
    assert answers is not None
    process = psutil.Process(answers.pid)
    children: list[psutil.Process] = []
    wait_for("an evaluation", lambda: children.extend(process.children(recursive=True)) or children, 120)
    answers._process.kill()
    answers._process.wait()
    wait_for("their end", lambda: not any(one.is_running() for one in children))
