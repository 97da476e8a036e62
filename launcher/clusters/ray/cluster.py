"""Ray as a place for runs. The driver is a process of this machine, or a job of the cluster where that is reached over HTTP."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from launcher import atomic_files, json_records, run_records, run_store
from launcher.clusters import detached_process, local
from launcher.clusters.faults import InjectedFault
from launcher.clusters.ray import jobs
from launcher.config.redaction import looks_secret
from launcher.errors import RunError, SubmitError
from launcher.hardware import device
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, CancelRequest, Status

if TYPE_CHECKING:
    from launcher.config.cluster import ClusterSection
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

_MODULE = "launcher.worker.ray.driver"
# The driver says this while it starts or joins Ray, and something else when it has.
JOINING = "joining Ray"
_JOIN_DEADLINE_S = 90.0
_END_DEADLINE_S = 60.0
_CONNECT_S = 5.0
_POLL_S, _ASK_S = 0.1, 1.0
_DRIVER_S = 60.0
_JOB_ENDED = ("FAILED", "SUCCEEDED", "STOPPED")
_UNSEEN = "Ray's job ended before it could write to the run directory"
_LOST = "the driver is gone without a word (killed, or its machine or the head of the cluster is lost)"


class RayCluster:
    """Ray Train; see `Cluster`."""

    status_interval_s = 1.0
    drill_remedy = "start a short run, and kill a worker, or a node with: ray drain-node"

    def device(self, section: ClusterSection) -> DeviceFacts:
        return device()

    def check(self, plan: LaunchPlan) -> None:
        from launcher.config.ray import RaySection

        section = RaySection.of(plan.config.cluster)
        if section.address is None:
            local.check_here(plan)
            return
        if section.host is not None:
            _require_private(section.address, section.host, section.allow_public_address)
        if section.is_http:
            _require_no_keys(section.pass_env)
            jobs.require_answer(section.address)
        elif section.address == "auto":
            _require_member(section.allow_public_address)
        else:
            _require_reachable(section.address)

    def preview(self, plan: LaunchPlan) -> str | None:
        return "\n".join(f"{label:<11}{value}" for label, value in _request(plan)) + "\n"

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        from launcher.config.ray import RaySection
        from launcher.plan.launch_plan import LaunchPlan

        section = RaySection.of(LaunchPlan.load(plan_path).config.cluster)
        arguments = [str(plan_path), str(attempt)]
        if section.is_http:
            try:
                job = jobs.submit(section, run, _MODULE, arguments)
            except SubmitError:
                run_store.update_status(run, state="failed", message="the job was not submitted")
                raise
            atomic_files.write_json(_submission_file(run, attempt), {"job": job, "address": section.address, "at": time.time()})
            _await_driver(run, section.address or "", job)
            return
        log = run.attempt(attempt) / "agent.log"
        detached_process.start(run, attempt, _MODULE, arguments, log, "Ray's driver")
        _await_joined(run, log)

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        file = _submission_file(run, attempt)
        if not file.is_file():
            return [("driver", str(run.attempt(attempt) / "agent.log"))]
        submitted = json_records.read_json(file)
        return [
            ("job", submitted["job"]),
            ("log", f"ray job logs --address {submitted['address']} -f {submitted['job']}"),
            ("dashboard", f"{submitted['address']}/#/jobs/{submitted['job']}"),
        ]

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        number = run_store.newest_attempt(run)
        file = _submission_file(run, number)
        if file.is_file():
            return self._of_job(run, status, json_records.read_json(file))
        if status.job is None:
            lost = status.state == "pending" and time.time() - status.updated_at > detached_process.START_DEADLINE_S
            message = "it was never started: the command that made it ended before"
            return replace(status, state="failed", message=message) if lost else status
        if detached_process.lives(run, status):
            return status
        # The driver writes the last state just before it ends: look once more before calling it lost.
        status = run_store.read_status(run)
        return status if status.state not in RUNNING_STATES else _lost(run, status)

    def await_end(self, run: RunDir) -> None:
        detached_process.await_end(run, _END_DEADLINE_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        status = self.status(run)
        if status.state not in RUNNING_STATES:
            raise SubmitError(f"the run is not running: it is {status.state}", where=str(run.root))
        number = run_store.newest_attempt(run)
        file, previous = _submission_file(run, number), run_records.read_cancel(run, number)
        json_records.write(run.cancel(number), CancelRequest(time.time(), save and previous is None))
        if previous is None or previous.save:
            return
        # Asked a third time, or a second time for no save: what was to hear it does not.
        if file.is_file():
            submitted = json_records.read_json(file)
            jobs.stop(submitted["address"], submitted["job"])
        elif (driver := detached_process.find(status)) is not None:
            driver.kill()
        else:
            where = f"process {(status.job or {}).get('pid')} on {(status.job or {}).get('host')}"
            raise SubmitError("the driver can only be killed on its own machine", where=str(run.root), value=where)
        run_store.update_status(run, state="cancelled", message="killed without saving")

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        raise SubmitError("drill does not support Ray", where="cluster", value="ray", remedy=self.drill_remedy)

    def _of_job(self, run: RunDir, status: Status, submitted: dict[str, str]) -> Status:
        known = replace(status, job={**(status.job or {}), "id": submitted["job"]})
        try:
            state, message = jobs.state(submitted["address"], submitted["job"])
        except SubmitError as error:
            # A tunnel may have broken, or lead to another cluster now: the run's own signs of life count.
            if detached_process.silence_s(run) > detached_process.SILENT_S:
                return _lost(run, known)
            said = f"Ray does not answer ({error.problems[0].what})"
            if isinstance(error, jobs.JobUnknown):
                said = f"the cluster at {submitted['address']} does not know the job {submitted['job']}"
            return replace(known, message=f"{said}; this is the last that is known")
        if state in ("PENDING", "RUNNING"):
            return known if status.job is not None else replace(known, message=message or f"Ray's job is {state.lower()}")
        now = run_store.read_status(run)
        if now.state not in RUNNING_STATES:
            return now
        if state == "STOPPED":
            return replace(known, state="cancelled", message="Ray's job was stopped")
        if now.job is None:
            return replace(known, state="failed", message=f"{_UNSEEN}: {_last_line(message)}; {_unseen_remedy(run, submitted)}")
        return replace(_lost(run, known), message=f"Ray's job ended as {state}: {message.splitlines()[0] if message else ''}")


def _request(plan: LaunchPlan) -> list[tuple[str, str]]:
    """What Ray is asked for, its own defaults included, as labels and values."""
    from launcher.config.ray import RaySection

    section, workers = RaySection.of(plan.config.cluster), plan.topology.world_size

    def or_default(value: object, default: str) -> str:
        return f"{default} (Ray's default)" if value is None else str(value)

    elastic = section.min_workers is not None and section.min_workers < workers
    sizes = f"{section.min_workers} to {workers}, looked for every " if elastic else str(workers)
    sizes += or_default(section.resize_seconds and f"{section.resize_seconds:g} s", "60 s") if elastic else ""
    resources = ", ".join(f"{name}: {amount:g}" for name, amount in section.resources(plan.topology.device).items())
    resources += "" if section.resources_per_worker else " (Ray's default)"
    nodes = [f"accelerator {section.accelerator_type}"] if section.accelerator_type else []
    nodes += [f"{label}={value}" for label, value in section.label_selector.items()]
    budgets = {
        "preemptions": "any number" if section.max_preemptions is None else str(section.max_preemptions),
        "of the machines": str(section.max_infrastructure_failures),
        "of the training": str(section.max_failures),
        "without progress": str(section.max_no_progress),
    }
    return [
        ("Ray", section.address or "one of the run's own, on this machine"),
        ("workers", f"{sizes}, each with {resources}, within {section.placement_minutes:g} minutes"),
        ("nodes", f"{', '.join(nodes) or 'any'}; placement {or_default(section.placement_strategy, 'PACK')}"),
        ("survived", ", ".join(f"{kind} {number}" for kind, number in budgets.items())),
        ("grace", f"{section.stop_grace_seconds:g} s to save, when stopped or about to lose a node"),
        ("storage", section.storage_path or str(RunDir(Path(plan.run_dir)).root / "ray")),
        ("passed on", ", ".join((*section.env, *section.pass_env)) or "no variables but keys"),
    ]


def _lost(run: RunDir, status: Status) -> Status:
    return replace(status, state="failed", message=f"{_LOST}; {detached_process.way_on(run)}")


def _submission_file(run: RunDir, attempt: int) -> Path:
    """Written by the submitting side when a cluster's Jobs API has taken the driver. Further attempts are the driver's."""
    while attempt > 1 and not (run.attempt(attempt) / "submitted.json").is_file():
        if not run_store.read_attempt(run, attempt).automatic:
            break
        attempt -= 1
    return run.attempt(attempt) / "submitted.json"


def _await_joined(run: RunDir, log: Path) -> None:
    """Wait until the driver has a Ray, so that one that cannot be joined is told now.

    Raises:
        RunError: in Ray's words.
    """
    deadline = time.monotonic() + _JOIN_DEADLINE_S
    while (status := run_store.read_status(run)).message == JOINING and time.monotonic() < deadline:
        if detached_process.find(status) is None:
            break
        time.sleep(_POLL_S)
    status = run_store.read_status(run)
    if status.state == "failed":
        raise RunError(status.message, where=str(log), remedy="look at cluster.address, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH")
    if status.message == JOINING:
        if (driver := detached_process.find(status)) is not None:
            driver.kill()
        run_store.update_status(run, state="failed", message="Ray was not joined in time")
        raise RunError("Ray was not joined in time", where=str(log), value=log.read_text(errors="replace")[-2000:])


def _await_driver(run: RunDir, address: str, job: str) -> None:
    """Wait a moment for the driver to announce itself, so that a head that does not see the run directory is told now.

    Raises:
        RunError: where the job has ended without that.
    """
    deadline = time.monotonic() + _DRIVER_S
    while run_store.read_status(run).job is None and time.monotonic() < deadline:
        with suppress(SubmitError):
            state, message = jobs.state(address, job)
            if state in _JOB_ENDED:
                break
        time.sleep(_ASK_S)
    else:
        # It has come, or waits in Ray's queue, which `status` tells.
        return
    run_store.refresh_directory(run.root)
    if run_store.read_status(run).job is None:
        said, remedy = _last_line(message), _unseen_remedy(run, {"job": job, "address": address})
        run_store.update_status(run, state="failed", message=f"{_UNSEEN}: {said}; {remedy}")
        raise RunError(_UNSEEN, where=str(run.root), value=said, remedy=remedy)


def _unseen_remedy(run: RunDir, submitted: dict[str, str]) -> str:
    log = f"ray job logs --address {submitted['address']} {submitted['job']}"
    return f"set run.root to a folder that the cluster's nodes see under the same path and may write to; the job's log: {log}"


def _last_line(message: str) -> str:
    """Ray's message on a job that has failed ends with the end of its log."""
    return next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "without a word")


def _require_no_keys(names: Sequence[str]) -> None:
    """Refuse to pass on what looks like a key: whoever has the cluster's token can read what a job was submitted with."""
    if keys := [name for name in names if looks_secret(f"cluster.env.{name}", os.environ.get(name) or "unknown")]:
        raise SubmitError(
            "keys must not travel with a job",
            where="cluster.pass_env",
            value=", ".join(keys),
            remedy="take them out, and set them where the cluster's Ray is started",
        )


def _require_private(address: str, host: str, allowed: bool) -> None:
    """Refuse a name that resolves to a public address; numbers are refused with the other settings."""
    from launcher.config.ray import is_exposed

    if allowed:
        return
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise SubmitError(
            f"the name of the cluster is not known: {error.strerror}",
            where="cluster.address",
            value=address,
            remedy="check the name, or write its address in numbers",
        ) from None
    if exposed := sorted(address for address in found if is_exposed(address)):
        raise SubmitError(
            "the address of the cluster is one that the whole internet can reach",
            where="cluster.address",
            value=f"{address} is {', '.join(exposed)}",
            remedy="use a private address or an ssh tunnel, or set cluster.allow_public_address=true",
        )


def _require_member(allowed: bool) -> None:
    """Refuse a machine on which no Ray runs; where a variable names one, refuse what would be refused as a setting."""
    named = os.environ.get("RAY_ADDRESS", "auto")
    if named != "auto":
        host = urlsplit(f"ray://{named}").hostname
        if "/" in named or ":" not in named or host is None:
            raise SubmitError(
                "RAY_ADDRESS does not name a cluster that a driver can join",
                where="RAY_ADDRESS in the environment",
                value=named,
                remedy="write it as host:port, unset it, or name the Jobs API: cluster.address=http://host:8265",
            )
        _require_private(f"auto, RAY_ADDRESS={named}", host, allowed)
        return
    if any(p.info["name"] == "raylet" for p in psutil.process_iter(["name"])):
        return
    raise SubmitError(
        "no Ray runs on this machine",
        where="cluster.address",
        value="auto",
        remedy="start one with: ray start, or leave the address out for a Ray of the run's own",
    )


def _require_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise SubmitError(
            f"there is no Ray at this address: {error.strerror or error}",
            where="cluster.address",
            value=address,
            remedy="start one there with: ray start --head, or leave the address out for a Ray of this machine's own",
        ) from None
