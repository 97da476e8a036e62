"""The Ray backend. The driver is a detached process on this machine, or a job on the cluster if its Jobs API is used."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters import detached_process, local
from launcher.clusters.backends import Cluster
from launcher.clusters.limits import limit_that_killed_agents
from launcher.clusters.ray import jobs
from launcher.clusters.ray.address import require_usable
from launcher.errors import RunError, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_store
from launcher.runs.run_records import RUNNING_STATES, Status

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

_MODULE = "launcher.worker.ray.driver"
# The status message while the driver starts or joins Ray.
JOINING = "joining Ray"
# How long a submission waits for that, so that it can report a failure.
_JOIN_DEADLINE_S = 90.0
_END_DEADLINE_S = 60.0
_LOOK_S = 0.2
_NO_STATUS = "Ray's job ended before it could write to the run directory"
_NO_STATUS_REMEDY = "set run.root to a folder that the cluster's nodes can write to under the same path"
_LOST = "the driver ended without recording a result: it was killed, or its machine or the head node was lost"


@dataclass(frozen=True)
class JobsApiSubmission:
    """submitted.json: the job of the cluster's Jobs API that runs the driver."""

    job: str
    address: str


class RayCluster(Cluster):
    """Ray Train; see `Cluster`."""

    status_interval_s = 1.0
    drill_remedy = "start a short run, and kill a rank, or a node with: ray drain-node"

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
        arguments, log = [str(plan_path), str(attempt)], run.attempt(attempt) / "agent.log"
        if section.address is not None and section.is_http:
            try:
                job = jobs.submit(section, run.code, run.root.name, _MODULE, arguments)
            except SubmitError:
                run_store.update_status(run, state="failed", message="the job was not submitted")
                raise
            json_records.write(_submission_file(run, attempt), JobsApiSubmission(job, section.address))
        else:
            detached_process.start(run, attempt, _MODULE, arguments, log, "Ray's driver")
        until = time.monotonic() + _JOIN_DEADLINE_S
        # A job may also wait in Ray's queue, which `status` reports.
        while (status := self.status(run)).state == "pending" and time.monotonic() < until:
            known = run_store.read_status(run)
            if known.job is not None and known.message != JOINING:
                return
            time.sleep(_LOOK_S)
        if status.state == "failed":
            run_store.update_status(run, state="failed", message=status.message)
            remedy = "check cluster.address, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH"
            raise RunError(status.message, where=dict(self.submission_details(run, attempt)).get("log", str(log)), remedy=remedy)

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
        status, file = run_store.read_status(run), _submission_file(run, run_store.newest_attempt(run))
        if status.state in RUNNING_STATES and file.is_file():
            return self._correct_by_job(run, status, json_records.read(JobsApiSubmission, file))
        return super().status(run)

    def _correct_by_job(self, run: RunDir, status: Status, submission: JobsApiSubmission) -> Status:
        """Correct the status of a run whose driver is a job of the cluster."""
        known = replace(status, job={**(status.job or {}), "id": submission.job})
        try:
            with jobs.connect(submission.address) as client:
                info = client.get_job_info(submission.job)
        except SubmitError as error:
            # An SSH tunnel may be broken or lead to another cluster, so the liveness file in the run directory decides.
            if detached_process.seconds_silent(run) > detached_process.LIVENESS_TIMEOUT_S:
                return replace(known, state="failed", message=self.explain_lost(run))
            return replace(known, message=f"{error.problems[0].message}: {submission.address}; this is the last known state")
        message = info.message or ""
        if not info.status.is_terminal():
            return known if status.job is not None else replace(known, message=message or f"Ray's job is {info.status.lower()}")
        atomic_files.refresh_directory(run.root)
        latest = run_store.read_status(run)
        if latest.state not in RUNNING_STATES:
            return latest
        if info.status == "STOPPED":
            return replace(known, state="cancelled", message="Ray's job was stopped")
        lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no message"]
        if latest.job is None:
            remedy = f"{_NO_STATUS_REMEDY}; read the job's log with: ray job logs --address {submission.address} {submission.job}"
            # Ray's message ends with the job's log.
            return replace(known, state="failed", message=f"{_NO_STATUS}: {lines[-1]}; {remedy}")
        return replace(known, state="failed", message=f"Ray's job ended as {info.status}: {lines[0]}")

    def explain_lost(self, run: RunDir) -> str:
        then = run_store.describe_storage_problem(run) or f"; {detached_process.resume_hint(run)}"
        number = run_store.newest_attempt(run)
        # Workers on the driver's machine may be in its control group.
        limit = limit_that_killed_agents(run, number, range(len(run_store.read_attempt(run, number).nodes)))
        return ": ".join(filter(None, (limit, f"{_LOST}{then}")))

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
            with jobs.connect(submission.address) as client:
                client.stop_job(submission.job)
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


def _submission_file(run: RunDir, attempt: int) -> Path:
    """Return the submitted.json of the job that runs an attempt; the driver starts further attempts in the same job."""
    while attempt > 1 and not (run.attempt(attempt) / "submitted.json").is_file():
        if not run_store.read_attempt(run, attempt).automatic:
            break
        attempt -= 1
    return run.attempt(attempt) / "submitted.json"
