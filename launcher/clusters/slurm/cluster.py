"""The Slurm backend: submit, read the state, cancel, requeue. All state is on disk and with Slurm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checkpoint import store
from launcher.clusters.backends import (
    FAULT_DEADLINE_S,
    Cluster,
    InjectedFault,
    fault_command,
    mark_never_submitted,
    read_fault_report,
)
from launcher.clusters.detached_process import not_running_error, request_cancel, resume_hint
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.errors import SubmitError, describe_exit
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import RUNNING_STATES, Attempt, Status

if TYPE_CHECKING:
    from launcher.config.sections.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
    from launcher.plan.retry import Decision

# `scontrol show job` prints this for an empty list of nodes.
_NO_NODES = "(null)"
_END_DEADLINE_S = 120.0
_POLL_S = 1.0
_LOCK_WAIT_S = 60.0
# Seconds after submission during which squeue may not list the job yet.
_UNLISTED_S = 60.0
# States of a job that waits for its first or next start.
_WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD")


@dataclass(frozen=True)
class SlurmSubmission:
    """submitted.json: the job that an attempt was submitted as; `submitted_at` is in seconds since the epoch."""

    job: str
    submitted_at: float


class SlurmCluster(Cluster):
    """Slurm; see `Cluster`."""

    status_interval_s = 5.0
    drill_remedy = None

    def device(self, section: ClusterSection) -> DeviceFacts:
        from launcher.clusters.slurm import site
        from launcher.config.sections.slurm import SlurmSection

        return site.gpus_of(SlurmSection.of(section))

    def check(self, plan: LaunchPlan) -> None:
        from launcher.clusters.slurm import site

        # Rendering rejects values that a batch script cannot contain, before the run directory exists.
        self.preview(plan)
        site.check_job(plan)

    def preview(self, plan: LaunchPlan) -> str | None:
        from launcher.clusters.slurm import sbatch

        return sbatch.render(plan, RunDir(Path(plan.run_dir)).plan)

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        from launcher.clusters.slurm import sbatch
        from launcher.plan.launch_plan import LaunchPlan

        plan = LaunchPlan.load(plan_path)
        try:
            job = sbatch.submit(plan, plan_path)
        except SubmitError as error:
            run_store.update_status(run, state="failed", message=error.problems[0].message)
            raise
        json_records.write(submission_file(run, attempt), SlurmSubmission(job, time.time()))

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        job = json_records.read(SlurmSubmission, submission_file(run, attempt)).job
        return [("job", job), ("output", str(run.jobs / job / f"{job}_0_log.out"))]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        job_id, submitted_at = _find_job(run)
        if job_id is None:
            return mark_never_submitted(status, _UNLISTED_S)
        try:
            job = queue.read_job(job_id, submitted_at, run_store.read_placement(run).name)
        except SlurmError as error:
            return replace(status, message=f"Slurm does not answer ({error.problems[0].message}); this is the last known state")
        return _correct_status(run, status, job, job_id, submitted_at)

    def await_end(self, run: RunDir) -> None:
        deadline = time.monotonic() + _END_DEADLINE_S
        job_id, submitted_at = _find_job(run)
        while job_id is not None and time.monotonic() < deadline:
            try:
                job = queue.read_job(job_id, submitted_at, run_store.read_placement(run).name)
                if job is None or not job.queued:
                    return
            except SlurmError:
                pass
            time.sleep(_POLL_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        status = self.status(run)
        job_id, submitted_at = _find_job(run)
        if status.state not in RUNNING_STATES or job_id is None:
            raise not_running_error(run, status)
        job = queue.read_job(job_id, submitted_at, run_store.read_placement(run).name)
        is_first = request_cancel(run, status, save) is None
        if job is not None and job.state == "RUNNING" and save and is_first:
            slurm("scancel", "--signal=USR1", job_id)
            return
        slurm("scancel", job_id)
        if job is None or job.state in _WAITING_STATES:
            run_store.update_status(run, state="cancelled", message="cancelled while the job was waiting")

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        started = run_store.read_attempt(run, attempt)
        if fault == "preempt":
            at = time.time()
            slurm("scancel", "--signal=USR2", str(started.job))
            return InjectedFault(f"SIGUSR2 to job {started.job}", at, ", ".join(started.nodes))
        # Run a second job step on the last node; the first node is the head node.
        node = (f"--jobid={started.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={started.nodes[-1]}")
        command = fault_command(run, attempt, fault)
        return read_fault_report(slurm("srun", *node, f"--chdir={run.root}", *command, deadline_s=FAULT_DEADLINE_S))


def run_again(plan: LaunchPlan, run: RunDir, job: str, decision: Decision, *, by_slurm: bool, retry_s: float = 0.0) -> None:
    """Start the job again: requeue it, or submit another job for the same run if it cannot be requeued.

    With `by_slurm`, Slurm's preemption has requeued the job already. While Slurm is silent, commands are retried for `retry_s`.
    """
    from launcher.clusters.slurm import sbatch
    from launcher.config.sections.slurm import SlurmSection

    section = SlurmSection.of(plan.config.cluster)
    if by_slurm and not decision.exclude:
        # A second requeue would start the job one time too many.
        return
    exclude = ",".join(filter(None, (section.additional_parameters.get("exclude"), *decision.exclude)))
    if section.requeue:
        try:
            has_exclusions = bool(decision.exclude)
            if section.leaves_out_bad_nodes and not has_exclusions:
                # The job keeps excluding a bad node that an earlier requeue excluded while enough nodes are left.
                with suppress(SlurmError):
                    excluded = queue.read_details(job, retry_s).get("ExcNodeList", _NO_NODES)
                    has_exclusions = excluded not in (_NO_NODES, section.additional_parameters.get("exclude"))
            _requeue(job, exclude if has_exclusions else None, retry_s)
            return
        except SlurmError as error:
            problem = error.problems[0]
            # The disk with the job's output may be full.
            with suppress(OSError):
                print(f"the job cannot be requeued ({problem.value or problem.message}); submitting another job", flush=True)
    options = {**section.additional_parameters, **({"exclude": exclude} if exclude else {}), "dependency": f"afterany:{job}"}
    cluster = section.model_copy(update={"additional_parameters": options})
    changed_plan = plan.model_copy(update={"config": plan.config.model_copy(update={"cluster": cluster})})
    resume_step = store.newest_step(run.checkpoints)
    # Another command may be starting an attempt.
    with run_store.start_lock(run, wait_s=_LOCK_WAIT_S):
        number = run_store.create_attempt(run, Attempt(resume_step, automatic=True))
        path = run_store.write_plan(run, number, changed_plan)
    try:
        next_job = sbatch.submit(changed_plan, path)
    except SubmitError as error:
        message = f"the run could not be submitted again: {error.problems[0].message}: {error.problems[0].value}"
        run_store.update_status(run, state="failed", message=message)
        raise
    json_records.write(submission_file(run, number), SlurmSubmission(next_job, time.time()))


def _requeue(job: str, exclude: str | None, retry_s: float) -> None:
    """Requeue the job with `exclude` as its excluded nodes; None leaves them as they are."""
    num_restarts, retry_until = int(os.environ.get("SLURM_RESTART_COUNT") or 0), time.monotonic() + retry_s

    def run_command(*argv: str, is_done: Callable[[], bool] | None = None) -> None:
        slurm(*argv, retry_s=retry_until - time.monotonic(), is_done=is_done)

    def is_requeued() -> bool:
        # Slurm may refuse to requeue a job that is already waiting; another job would then be submitted in addition.
        return queue.state_beneath(job, num_restarts, None) == "PENDING"

    if exclude is None:
        run_command("scontrol", "requeue", job, is_done=is_requeued)
        return
    run_command("scontrol", "requeuehold", job, is_done=is_requeued)
    try:
        run_command("scontrol", "update", f"JobId={job}", f"ExcNodeList={exclude}")
    finally:
        # A held job, and the job that is submitted after it, would wait forever.
        try:
            run_command("scontrol", "release", job)
        except SlurmError:
            run_command("scancel", job)
            raise


def submission_file(run: RunDir, attempt: int) -> Path:
    """Return the path of an attempt's submitted.json, which is written as soon as Slurm has assigned a job number."""
    return run.attempt(attempt) / "submitted.json"


def _find_job(run: RunDir) -> tuple[str | None, float]:
    """Return the newest attempt's job (None if there is none yet) and its submission time."""
    attempt = run_store.newest_attempt(run)
    submission = json_records.read_if_present(SlurmSubmission, submission_file(run, attempt))
    submission = submission or SlurmSubmission("", run_store.read_status(run).created_at)
    opened = run_store.find_attempt(run, attempt)
    return (opened.job if opened else None) or submission.job or None, submission.submitted_at


def _correct_status(run: RunDir, status: Status, job: queue.Job | None, job_id: str, submitted_at: float) -> Status:
    """Correct the run's last written status by the job's state in Slurm."""
    known = replace(status, job={**(status.job or {}), "id": job_id})
    if job is not None and job.queued:
        if job.state in _WAITING_STATES:
            message = "; ".join(filter(None, (status.message, queue.explain(job))))
            return replace(known, state="pending", message=message)
        if job.state == "SUSPENDED":
            return replace(known, message="suspended by Slurm")
        return known
    # The job may have written its final state since the status was read.
    latest = run_store.read_status(run)
    if latest.state not in RUNNING_STATES:
        return latest
    if job is None and time.time() - submitted_at < _UNLISTED_S:
        return known
    if job is None:
        problem = run_store.describe_storage_problem(run)
        return replace(known, state="failed", message=f"job {job_id} left the queue without recording a result{problem}")
    if job.state.startswith("CANCELLED"):
        return replace(known, state="cancelled", message=f"job {job_id} was cancelled")
    then = run_store.describe_storage_problem(run) or f"; {resume_hint(run)}"
    return replace(known, state="failed", message=f"{_explain_silent_end(run, job)}{then}")


def _explain_silent_end(run: RunDir, job: queue.Job) -> str:
    """Describe the end of a job that could not record it: its batch script, on the first node, ended too early."""
    if job.state == "FAILED" and job.exit_signal:
        return f"the batch script of job {job.id} {describe_exit(-job.exit_signal)}"
    if job.state == "OUT_OF_MEMORY":
        return (
            f"a memory limit was exceeded (raise cluster.additional_parameters.mem): the batch script of job {job.id} was killed"
        )
    if job.state == "NODE_FAIL":
        attempt = run_store.read_attempt(run, run_store.newest_attempt(run))
        lost = queue.find_lost_nodes(attempt.nodes, attempt.begun_at or 0.0) if attempt.nodes else None
        names = ", ".join(lost or ()) or f"a node of job {job.id}"
        return f"{names} was lost (Slurm: node failure), and the job could not run again"
    return f"job {job.id} ended as {job.state} without recording a result"
