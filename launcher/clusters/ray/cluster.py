"""The Ray backend. The driver is a detached process on this machine, or a job on the cluster if its Jobs API is used."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters import detached_process, local
from launcher.clusters.backends import Cluster, InjectedFault, mark_never_submitted
from launcher.clusters.limits import limit_that_killed_agents
from launcher.clusters.ray import jobs
from launcher.clusters.ray.address import require_usable
from launcher.errors import RunError, SubmitError
from launcher.hardware import device
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_store
from launcher.runs.run_records import RUNNING_STATES, Status

if TYPE_CHECKING:
    from launcher.config.sections.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

_MODULE = "launcher.worker.ray.driver"
# The status message while the driver starts or joins Ray.
JOINING = "joining Ray"
_JOIN_DEADLINE_S = 90.0
_END_DEADLINE_S = 60.0
_JOIN_POLL_S, _JOB_POLL_S = 0.1, 1.0
# How long a submission waits for the driver to set the run's status.
_DRIVER_START_DEADLINE_S = 60.0
_NO_STATUS = "Ray's job ended before it could write to the run directory"
_LOST = "the driver ended without recording a result: it was killed, or its machine or the head node was lost"


@dataclass(frozen=True)
class JobsApiSubmission:
    """submitted.json: the job of the cluster's Jobs API that runs the driver; `at` is in seconds since the epoch."""

    job: str
    address: str
    at: float


class RayCluster(Cluster):
    """Ray Train; see `Cluster`."""

    status_interval_s = 1.0
    drill_remedy = "start a short run, and kill a rank, or a node with: ray drain-node"

    def device(self, section: ClusterSection) -> DeviceFacts:
        return device()

    def check(self, plan: LaunchPlan) -> None:
        from launcher.config.sections.ray import RaySection

        section = RaySection.of(plan.config.cluster)
        if section.address is None:
            local.check_here(plan)
        else:
            require_usable(section)

    def preview(self, plan: LaunchPlan) -> str | None:
        """Show what is requested from Ray, including Ray's own defaults."""
        from launcher.config.sections.ray import RaySection

        section, topology = RaySection.of(plan.config.cluster), plan.topology
        sizes = f"{section.min_nodes} to {topology.nodes}" if section.leaves_out_bad_nodes else str(topology.nodes)
        amounts = section.node_resources(topology.device, topology.ranks_per_node)
        resources = ", ".join(f"{name}: {amount:g}" for name, amount in amounts.items())
        labels = [f"accelerator {section.accelerator_type}"] if section.accelerator_type else []
        labels += [f"{label}={value}" for label, value in section.label_selector.items()]
        rows = [
            ("Ray", section.address or "started for this run, on this machine"),
            ("nodes", f"{sizes}, each with {resources}, within {section.placement_minutes:g} minutes"),
            ("labels", ", ".join(labels) or "any"),
            ("variables", ", ".join(section.env) or "API keys only"),
        ]
        return "".join(f"{label:<11}{value}\n" for label, value in rows)

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        from launcher.config.sections.ray import RaySection
        from launcher.plan.launch_plan import LaunchPlan

        section = RaySection.of(LaunchPlan.load(plan_path).config.cluster)
        arguments = [str(plan_path), str(attempt)]
        if section.is_http:
            try:
                job = jobs.submit(section, run, _MODULE, arguments)
            except SubmitError:
                run_store.update_status(run, state="failed", message="the job was not submitted")
                raise
            submission = JobsApiSubmission(job, section.address or "", time.time())
            json_records.write(_submission_file(run, attempt), submission)
            _await_driver(run, submission)
            return
        log = run.attempt(attempt) / "agent.log"
        detached_process.start(run, attempt, _MODULE, arguments, log, "Ray's driver")
        _await_joined(run, log)

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        file = _submission_file(run, attempt)
        if not file.is_file():
            return [("driver", str(run.attempt(attempt) / "agent.log"))]
        submission = json_records.read(JobsApiSubmission, file)
        return [
            ("job", submission.job),
            ("log", f"ray job logs --address {submission.address} -f {submission.job}"),
            ("dashboard", f"{submission.address}/#/jobs/{submission.job}"),
        ]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        number = run_store.newest_attempt(run)
        file = _submission_file(run, number)
        if file.is_file():
            return _correct_by_job(run, status, json_records.read(JobsApiSubmission, file))
        if status.job is None:
            return mark_never_submitted(status, detached_process.START_DEADLINE_S)
        if detached_process.is_alive(run, status):
            return status
        # The driver may have written its final state since the status was read.
        status = run_store.read_status(run)
        return status if status.state not in RUNNING_STATES else _mark_lost(run, status)

    def await_end(self, run: RunDir) -> None:
        detached_process.await_end(run, _END_DEADLINE_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        status = self.status(run)
        previous = detached_process.request_cancel(run, status, save)
        if previous is None or previous.save:
            return
        # The driver did not act on the last request, which was to stop without saving.
        file = _submission_file(run, run_store.newest_attempt(run))
        if file.is_file():
            submission = json_records.read(JobsApiSubmission, file)
            jobs.stop(submission.address, submission.job)
        elif (driver := detached_process.find_process(status)) is not None:
            driver.kill()
        else:
            process = status.job or {}
            raise SubmitError(
                "the driver runs on another machine or in another container and can only be killed there",
                where=str(run.root),
                value=f"process {process.get('pid')} on {process.get('host')}",
                remedy="run the command there",
            )
        run_store.update_status(run, state="cancelled", message="killed without saving")

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        raise NotImplementedError


def _correct_by_job(run: RunDir, status: Status, submission: JobsApiSubmission) -> Status:
    """Correct the status of a run whose driver is a job of the cluster."""
    known = replace(status, job={**(status.job or {}), "id": submission.job})
    try:
        state, message = jobs.state(submission.address, submission.job)
    except SubmitError as error:
        # An SSH tunnel may be broken or lead to another cluster, so the liveness file in the run directory decides.
        if detached_process.seconds_silent(run) > detached_process.LIVENESS_TIMEOUT_S:
            return _mark_lost(run, known)
        cause = f"Ray does not answer ({error.problems[0].message})"
        if isinstance(error, jobs.JobUnknown):
            cause = f"the cluster at {submission.address} does not know the job {submission.job}"
        return replace(known, message=f"{cause}; this is the last known state")
    if state not in jobs.FINAL_JOB_STATES:
        return known if status.job is not None else replace(known, message=message or f"Ray's job is {state.lower()}")
    latest = run_store.read_status(run)
    if latest.state not in RUNNING_STATES:
        return latest
    if state == "STOPPED":
        return replace(known, state="cancelled", message="Ray's job was stopped")
    if latest.job is None:
        return replace(known, state="failed", message=f"{_NO_STATUS}: {_last_line(message)}; {_no_status_remedy(submission)}")
    return replace(_mark_lost(run, known), message=f"Ray's job ended as {state}: {message.splitlines()[0] if message else ''}")


def _mark_lost(run: RunDir, status: Status) -> Status:
    then = run_store.describe_storage_problem(run) or f"; {detached_process.resume_hint(run)}"
    number = run_store.newest_attempt(run)
    # Workers on the driver's machine may be in its control group.
    limit = limit_that_killed_agents(run, number, range(len(run_store.read_attempt(run, number).nodes)))
    return replace(status, state="failed", message=": ".join(filter(None, (limit, f"{_LOST}{then}"))))


def _submission_file(run: RunDir, attempt: int) -> Path:
    """Return the submitted.json of the job that runs an attempt; the driver starts further attempts in the same job."""
    while attempt > 1 and not (run.attempt(attempt) / "submitted.json").is_file():
        if not run_store.read_attempt(run, attempt).automatic:
            break
        attempt -= 1
    return run.attempt(attempt) / "submitted.json"


def _await_joined(run: RunDir, log: Path) -> None:
    """Wait until the driver has started or joined Ray, so that the submitting command reports a failure.

    Raises:
        RunError: with Ray's message, or the end of the driver's log.
    """
    deadline = time.monotonic() + _JOIN_DEADLINE_S
    while (status := run_store.read_status(run)).message == JOINING and time.monotonic() < deadline:
        if detached_process.find_process(status) is None:
            break
        time.sleep(_JOIN_POLL_S)
    status = run_store.read_status(run)
    if status.state == "failed":
        raise RunError(status.message, where=str(log), remedy="check cluster.address, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH")
    if status.message == JOINING:
        if (driver := detached_process.find_process(status)) is not None:
            driver.kill()
        message = f"the driver did not join Ray within {_JOIN_DEADLINE_S:.0f} s"
        run_store.update_status(run, state="failed", message=message)
        raise RunError(message, where=str(log), value=log.read_text(errors="replace")[-2000:])


def _await_driver(run: RunDir, submission: JobsApiSubmission) -> None:
    """Wait until the driver sets the run's status, so that this command reports a head node without access to the run directory.

    Raises:
        RunError: if the job ends before that.
    """
    deadline = time.monotonic() + _DRIVER_START_DEADLINE_S
    while run_store.read_status(run).job is None and time.monotonic() < deadline:
        with suppress(SubmitError):
            state, message = jobs.state(submission.address, submission.job)
            if state in jobs.FINAL_JOB_STATES:
                break
        time.sleep(_JOB_POLL_S)
    else:
        # The driver has started or waits in Ray's queue; `status` reports the queue.
        return
    atomic_files.refresh_directory(run.root)
    if run_store.read_status(run).job is None:
        reason, remedy = _last_line(message), _no_status_remedy(submission)
        run_store.update_status(run, state="failed", message=f"{_NO_STATUS}: {reason}; {remedy}")
        raise RunError(_NO_STATUS, where=str(run.root), value=reason, remedy=remedy)


def _no_status_remedy(submission: JobsApiSubmission) -> str:
    log = f"ray job logs --address {submission.address} {submission.job}"
    return f"set run.root to a folder that the cluster's nodes can write to under the same path; read the job's log with: {log}"


def _last_line(message: str) -> str:
    """Return the last line of Ray's message about a failed job; it ends with the job's log."""
    return next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "no message")
