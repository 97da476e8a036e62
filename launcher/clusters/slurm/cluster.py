"""Slurm as a place for runs: submit, tell the state, cancel, run again. All state is on disk and with Slurm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import atomic_files, json_records, run_store
from launcher.checkpoint import store
from launcher.clusters import faults
from launcher.clusters.base import NEVER_SUBMITTED
from launcher.clusters.faults import InjectedFault
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Attempt, CancelRequest, Status

if TYPE_CHECKING:
    from launcher.config.cluster import ClusterSection
    from launcher.config.slurm import SlurmSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
    from launcher.plan.retry import Decision

# What `scontrol show job` says where a list of nodes is empty.
_NO_NODES = "(null)"
_END_DEADLINE_S = 120.0
_POLL_S = 1.0
_LOCK_WAIT_S = 60.0
# Between the submission and the moment that squeue lists the job.
_UNSEEN_S = 60.0
# Slurm's words for a job that has not begun, or waits to begin again.
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD")


class SlurmCluster:
    """Slurm; see `Cluster`."""

    status_interval_s = 5.0
    drill_remedy = None

    def device(self, section: ClusterSection) -> DeviceFacts:
        from launcher.clusters.slurm import site
        from launcher.config.slurm import SlurmSection

        return site.gpus_of(SlurmSection.of(section))

    def check(self, plan: LaunchPlan) -> None:
        from launcher.clusters.slurm import checks
        from launcher.config.slurm import SlurmSection

        # What no batch script can hold is refused here, before anything of the run is made.
        self.preview(plan)
        checks.check(SlurmSection.of(plan.config.cluster), plan)

    def preview(self, plan: LaunchPlan) -> str | None:
        from launcher.clusters.slurm import sbatch

        return sbatch.render(plan, RunDir(Path(plan.run_dir)).plan)

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        from launcher.clusters.slurm import sbatch
        from launcher.plan.launch_plan import LaunchPlan

        plan = LaunchPlan.load(plan_path)
        try:
            job = sbatch.submit(plan, plan_path)
        except SubmitError:
            run_store.update_status(run, state="failed", message="the job was not submitted")
            raise
        atomic_files.write_json(submission_file(run, attempt), {"job": job, "submitted_at": time.time()})

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        job = json_records.read_json(submission_file(run, attempt))["job"]
        return [("job", job), ("output", str(run.jobs / job / f"{job}_0_log.out"))]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        number = run_store.newest_attempt(run)
        job_id, since = _job_of(run, number)
        if job_id is None:
            lost = status.state == "pending" and time.time() - status.updated_at > _UNSEEN_S
            return replace(status, state="failed", message=NEVER_SUBMITTED) if lost else status
        try:
            job = queue.job(job_id, since, run_store.read_placement(run).name)
        except SlurmError as error:
            return replace(status, message=f"Slurm does not answer ({error.problems[0].what}); this is the last that is known")
        return _corrected(run, status, job, job_id, since)

    def await_end(self, run: RunDir) -> None:
        deadline = time.monotonic() + _END_DEADLINE_S
        job_id, since = _job_of(run, run_store.newest_attempt(run))
        while job_id is not None and time.monotonic() < deadline:
            try:
                job = queue.job(job_id, since, run_store.read_placement(run).name)
                if job is None or not job.queued:
                    return
            except SlurmError:
                pass
            time.sleep(_POLL_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        status = self.status(run)
        number = run_store.newest_attempt(run)
        job_id, since = _job_of(run, number)
        if status.state not in RUNNING_STATES or job_id is None:
            raise SubmitError(f"the run is not running: it is {status.state}", where=str(run.root))
        job = queue.job(job_id, since, run_store.read_placement(run).name)
        asked = run.cancel(number)
        again = asked.is_file()
        json_records.write(asked, CancelRequest(time.time(), save))
        if job is not None and job.state == "RUNNING" and save and not again:
            slurm("scancel", "--signal=USR1", job_id)
            return
        slurm("scancel", job_id)
        if job is None or job.state in _WAITING:
            run_store.update_status(run, state="cancelled", message="cancelled while it waited")

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        begun = run_store.read_attempt(run, attempt)
        if fault == "preempt":
            at = time.time()
            slurm("scancel", "--signal=USR2", str(begun.job))
            return InjectedFault(f"SIGUSR2 to job {begun.job}", at, ", ".join(begun.nodes))
        # Beside the run's own step, on its last node: the first is the head.
        node = (f"--jobid={begun.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={begun.nodes[-1]}")
        command = faults.command(run, attempt, fault)
        return faults.read_report(slurm("srun", *node, f"--chdir={run.root}", *command, deadline_s=faults.DEADLINE_S))


def run_again(plan: LaunchPlan, run: RunDir, job: str, decision: Decision, *, by_slurm: bool, patience_s: float = 0.0) -> None:
    """Have the job run again: by Slurm's own preemption, by a requeue, or as another job of the same run.

    Slurm is asked again for `patience_s` where it does not answer.

    Raises:
        SubmitError: where the job was to be submitted again, and that was refused.
    """
    from launcher.config.slurm import SlurmSection

    section = SlurmSection.of(plan.config.cluster)
    if by_slurm and not decision.exclude:
        # A job that also requeues itself would be run once too often.
        return
    exclude = ",".join(filter(None, (section.exclude, *decision.exclude)))
    if section.requeue:
        try:
            changes = decision.exclude or _excludes_others(job, section, patience_s)
            _requeue(job, exclude if changes else None, patience_s)
            return
        except SlurmError as error:
            problem = error.problems[0]
            # The file of the job's output may be on a disk that is full.
            with suppress(OSError):
                print(f"the job cannot be requeued ({problem.value or problem.what}); it is submitted again", flush=True)
    _submit_again(plan, run, job, exclude)


def _excludes_others(job: str, section: SlurmSection, patience_s: float) -> bool:
    """True where an earlier start left a bad node out: the job keeps that, until it would find too few nodes."""
    if not section.leaves_out_bad_nodes:
        return False
    try:
        excluded = queue.details(job, patience_s).get("ExcNodeList", _NO_NODES)
    except SlurmError:
        return False
    return excluded not in (_NO_NODES, section.exclude)


def _requeue(job: str, exclude: str | None, patience_s: float) -> None:
    """Requeue the job, without the nodes in `exclude`, or with what it excludes now where that is None."""
    restarts, until = int(os.environ.get("SLURM_RESTART_COUNT") or 0), time.monotonic() + patience_s

    def ask(*argv: str, done: Callable[[], bool] | None = None) -> None:
        slurm(*argv, patience_s=until - time.monotonic(), done=done)

    def requeued() -> bool:
        # A second requeue, of a job that already waits, could be refused, and then the run were submitted as well.
        return queue.state_beneath(job, restarts, None) == "PENDING"

    if exclude is None:
        ask("scontrol", "requeue", job, done=requeued)
        return
    ask("scontrol", "requeuehold", job, done=requeued)
    try:
        ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={exclude}")
    finally:
        # Whatever was refused: held, the job would wait for ever, and with it the one that is submitted after it.
        try:
            ask("scontrol", "release", job)
        except SlurmError:
            ask("scancel", job)
            raise


def _submit_again(plan: LaunchPlan, run: RunDir, job: str, exclude: str) -> None:
    from launcher.clusters.slurm import sbatch

    changes: dict[str, Any] = {"exclude": exclude or None, "dependency": f"afterany:{job}"}
    cluster = plan.config.cluster.model_copy(update=changes)
    again = plan.model_copy(update={"config": plan.config.model_copy(update={"cluster": cluster})})
    saved = store.newest_step(run.checkpoints)
    # Another command may be numbering an attempt at this moment.
    with run_store.start_lock(run, wait_s=_LOCK_WAIT_S):
        number = run_store.create_attempt(run, Attempt(saved, automatic=True))
        path = run_store.write_plan(run, number, again)
    try:
        submitted = sbatch.submit(again, path)
    except SubmitError as error:
        message = f"it should run again, but {error.problems[0].what}: {error.problems[0].value}"
        run_store.update_status(run, state="failed", message=message)
        raise
    atomic_files.write_json(submission_file(run, number), {"job": submitted, "submitted_at": time.time()})


def submission_file(run: RunDir, attempt: int) -> Path:
    """Written by the submitting side as soon as Slurm has given the job a number."""
    return run.attempt(attempt) / "submitted.json"


def _job_of(run: RunDir, attempt: int) -> tuple[str | None, float]:
    """The job of an attempt and when it was submitted; none of attempt 0, as while the first is being made."""
    if not attempt:
        return None, run_store.read_status(run).created_at
    file = submission_file(run, attempt)
    submitted = json_records.read_json(file) if file.is_file() else {}
    begun = run_store.read_attempt(run, attempt).job
    return begun or submitted.get("job"), submitted.get("submitted_at", run_store.read_status(run).created_at)


def _corrected(run: RunDir, status: Status, job: queue.Job | None, job_id: str, since: float) -> Status:
    """What the run itself last wrote, corrected by what Slurm says."""
    known = replace(status, job={**(status.job or {}), "id": job_id})
    if job is not None and job.queued:
        if job.state in _WAITING:
            said = f"{status.message}; " if status.message else ""
            return replace(known, state="pending", message=f"{said}{queue.explain(job)}")
        if job.state == "SUSPENDED":
            return replace(known, message="suspended by Slurm")
        return known
    # The job writes its last state just before it ends: look once more before calling it lost.
    now = run_store.read_status(run)
    if now.state not in RUNNING_STATES:
        return now
    if job is None and time.time() - since < _UNSEEN_S:
        return known
    if job is None:
        return replace(known, state="failed", message=f"job {job_id} is gone from the queue without a word")
    if job.state.startswith("CANCELLED"):
        return replace(known, state="cancelled", message=f"job {job_id} was cancelled")
    return replace(known, state="failed", message=f"job {job_id} ended as {job.state} without a word of the run")
