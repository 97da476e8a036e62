"""The life of a run under Slurm: submitted, pending, followed, cancelled, resumed, part of a sweep, and never started twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import losses, metrics
from forked import require_exit
from hand_made import end_of
from pace import wait_for
from slurm_tools import SETTINGS, Launch, SlurmRun, submit
from testbed_cluster import Testbed

from launcher.clusters.slurm.cluster import SlurmCluster
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events

# Starting ranks takes many times longer on a busy machine.
pytestmark = [pytest.mark.slurm, pytest.mark.rest, pytest.mark.timeout(900)]

ENDLESS = "train.max_steps=100000"
FEW_ANSWERS = ("evaluate.max_prompts=6", "evaluate.max_new_tokens=4", "evaluate.prompts_per_batch=2")


def test_a_run_is_resubmitted_where_requeue_is_forbidden_never_runs_twice_and_resumes_on_one_node(
    begin: Callable[..., SlurmRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = f"checkpoint.mirror=file://{tmp_path}/mirror"
    run = begin("grid", ENDLESS, "cluster.ranks_per_node=2", "cluster.requeue=false", mirror)
    run.await_step(5)
    first = run.job
    a_second_start_is_refused(run)
    # As `launcher drill --fault preempt` does.
    with monkeypatch.context() as patch:
        for name, value in run.bed.variables.items():
            patch.setenv(name, value)
        injected = SlurmCluster().inject_fault(RunDir(run.path), 1, "preempt")
    assert (injected.description, injected.host) == (f"SIGUSR2 to job {first}", "n1, n2")
    # A second signal, during the save or just before it, must change nothing.
    run.bed.run("scancel", "--signal=USR2", first)
    wait_for("another job", lambda: run.attempt == 2 and run.job not in ("", first), 90)
    saved = end_of(run.path, 1)["step"]
    run.await_step(saved + 2, attempt=2)
    assert run.launch("cancel", str(run.path), **run.bed.variables).returncode == 0
    cancelled = run.await_state("cancelled")["step"]
    run.await_end_of_job()
    assert run.causes() == ["preempted", "cancelled"]
    assert run.attempt_record(2)["resume_step"] == saved
    assert len(list(run.path.glob("attempts/001/rank-*.log"))) == 4
    steps = [m["trainer/step"] for m in metrics(run.path) if "train/loss" in m]
    assert steps == list(range(1, cancelled + 1)), "no step was done twice"
    # Only the head node uploads to the mirror.
    assert run.attempt_record(2, "mirror")["steps"][-1] == cancelled
    for root in (run.path.parent, tmp_path / "mirror"):
        assert (root / f"grid/checkpoints/step-{cancelled:08d}/manifest.json").is_file()
    assert json.loads((tmp_path / "mirror/grid/status.json").read_text())["state"] == "cancelled"

    end, middle = cancelled + 10, cancelled + 5
    again = (f"train.max_steps={end}", "cluster.nodes=1", "cluster.ranks_per_node=2")
    # Only one step is a multiple of this, so the run saves only there and at its end.
    again += (f"checkpoint.save_every={middle}", f"eval.answers_every={middle}", *FEW_ANSWERS)
    done = run.launch("resume", str(run.path), *again, "--follow", **run.bed.variables)
    require_exit(done)
    assert f"step-{end:08d}" in done.stdout
    assert sorted(losses(run.path)) == list(range(1, end + 1))
    nodes = {m["trainer/step"]: m["run/nodes"] for m in metrics(run.path) if "run/nodes" in m}
    assert (nodes[1], nodes[cancelled], nodes[cancelled + 1]) == (2, 2, 1)
    run.await_end_of_job()
    assert run.causes() == ["preempted", "cancelled", "completed"]
    assert run.attempt_record(3, "mirror")["steps"][-1] == end
    assert json.loads((tmp_path / "mirror/grid/status.json").read_text())["state"] == "completed"
    step_is_answered_by_a_job_of_its_own(run, middle)
    prompts_are_answered_on_two_nodes(run, end)


def a_second_start_is_refused(run: SlurmRun) -> None:
    """Neither a resume nor the same job submitted by hand starts a run that is training."""
    refused = run.launch("resume", str(run.path), **run.bed.variables)
    assert refused.returncode == 2
    assert "already" in refused.stderr
    script = next((run.path / "jobs" / run.job).glob("*_submission.sh"))
    pickled = run.path / "jobs" / run.job / f"{run.job}_submitted.pkl"
    other = run.bed.run("sbatch", "--parsable", script, capture_output=True).stdout.strip()
    assert pickled.is_file()
    wait_for("the second job to end", lambda: not run.queued(other), 40)
    assert f"job {run.job} runs grid already" in (run.path / "jobs" / other / f"{other}_0_log.out").read_text()
    assert run.attempt == 1
    assert run.shown()["state"] in ("running", "saving")


def step_is_answered_by_a_job_of_its_own(run: SlurmRun, step: int) -> None:
    """The run's own job has already ended."""
    events = [(event["step"], event["text"]) for event in read_events(run.path / "events.jsonl") if event["kind"] == "answers"]
    (number,) = [text.rpartition(" ")[2] for at, text in events if at == step and text.startswith("the answers of step")]
    folder = run.path / f"evaluations/step-{step:08d}"
    log = folder / f"job-{number}.log"
    wait_for("the answers", lambda: not run.bed.output("squeue", "-h", "--format=%j").strip(), 240)
    assert (folder / "verdict.json").is_file(), log.read_text()
    assert [json.loads(line)["index"] for line in (folder / "held_out/tuned.jsonl").open()] == list(range(6))
    assert f"verdict     step {step}: " in run.launch("status", str(run.path), **run.bed.variables).stdout


def prompts_are_answered_on_two_nodes(run: SlurmRun, step: int) -> None:
    nodes = ("cluster.nodes=2", "cluster.ranks_per_node=1")
    evaluated = run.launch("evaluate", str(run.path), *nodes, *FEW_ANSWERS, "--json", **run.bed.variables)
    require_exit(evaluated)
    # The first process that is forked from a preloaded one may print DeepSpeed's choice of an accelerator.
    result = json.loads(evaluated.stdout[evaluated.stdout.index("{") :])
    assert (result["step"], result["num_processes"]) == (step, 2), "each of the two nodes has answered its share"
    # The run began with random weights, so there is no base model.
    assert list(result["sets"]["held_out"]["styles"]) == ["tuned"]
    answers = [json.loads(line) for line in (run.path / f"evaluations/step-{step:08d}/held_out/tuned.jsonl").open()]
    assert [one["index"] for one in answers] == list(range(6))
    # Slurm ends the job a little after the command has ended.
    wait_for("an empty queue", lambda: not run.bed.output("squeue", "-h", "--format=%j").strip())


def test_a_user_error_is_shown_to_followers_and_not_retried(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    diverging = ("cluster.nodes=1", "optim.lr=1e38", f"run.root={runs}", "run.name=bad")
    bad = launch_here(*SETTINGS, *diverging, "--follow", **slurm.variables)
    assert bad.returncode == 1
    assert "resume" in bad.stderr or "start it again" in bad.stderr
    run = SlurmRun(runs / "bad", slurm, launch_here)
    final = run.await_state("failed")
    assert "not finite" in final["message"] or "the loss is" in final["message"]
    assert run.causes() == ["user_error"]
    run.await_end_of_job()
    assert run.attempt == 1
    assert run.shown()["state"] == "failed"


def test_a_pending_run_shows_the_reason_and_can_be_cancelled(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    held = submit(launch_here, slurm, runs, "held", "+cluster.additional_parameters.begin=now+3600")
    shown = held.shown()
    assert shown["state"] == "pending"
    assert "BeginTime" in shown["message"]
    slurm.run("scontrol", "hold", held.job)
    assert "held" in held.shown()["message"].lower()
    cancelled = launch_here("cancel", str(held.path), **slurm.variables)
    require_exit(cancelled)
    assert held.shown()["state"] == "cancelled"
    assert not held.queued()
    again = launch_here("resume", str(held.path), **slurm.variables)
    require_exit(again)
    assert "continuing held from the beginning: no step was trained yet" in again.stdout
    assert held.shown()["state"] == "pending"
    assert launch_here("cancel", str(held.path), **slurm.variables).returncode == 0
    first = slurm.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 1", capture_output=True).stdout.strip()
    never = submit(launch_here, slurm, runs, "never", f"cluster.additional_parameters.dependency='afterok:{first}'")
    wait_for("the dependency to fail", lambda: "DependencyNeverSatisfied" in never.shown()["message"], 40)
    assert launch_here("cancel", str(never.path), **slurm.variables).returncode == 0


def test_a_sweep_submits_a_job_for_each_point_and_returns(launch_here: Launch, slurm: Testbed, runs: Path) -> None:
    waiting = "+cluster.additional_parameters.begin=now+3600"
    sweep = (*SETTINGS, "cluster.nodes=1", "train.max_steps=3", waiting, f"run.root={runs}")
    done = launch_here(*sweep, "-m", "optim.lr=1e-5,2e-5", **slurm.variables)
    require_exit(done)
    names = [p.name for p in runs.iterdir()]
    assert len(names) == 2
    table = done.stdout[done.stdout.rindex("settings") :]
    assert "optim.lr=1e-05" in table
    assert "optim.lr=2e-05" in table
    plans = [json.loads((runs / name / "plan.json").read_text()) for name in names]
    assert {plan["config"]["optim"]["lr"] for plan in plans} == {1e-5, 2e-5}
    groups = {plan["config"]["tracking"]["group"] for plan in plans}
    assert len(groups) == 1
    assert None not in groups
    for name in names:
        run = SlurmRun(runs / name, slurm, launch_here)
        assert run.queued() == "PENDING"
        assert run.shown()["state"] == "pending"
    refused = launch_here(*sweep, "-m", "optim.lr=1e-5,2e-5", "cluster.partition=main,nowhere", **slurm.variables)
    assert refused.returncode == 2
    assert "nowhere" in refused.stderr
    assert len(list(runs.iterdir())) == 2, "nothing is started where one of them is refused"
