"""What a Slurm job does around its tasks, on its first node.

`python -m launcher.worker.job begin PLAN` opens the attempt and prints its number, or nothing where nothing is left to do.
`python -m launcher.worker.job conclude PLAN ATTEMPT RC` reads how the nodes ended, lets plan.retry decide what follows, and
does it: the only place that runs a job again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.checkpoint import store
from launcher.clusters.slurm import cluster as slurm_cluster
from launcher.clusters.slurm import queue, site
from launcher.clusters.slurm.commands import SlurmError
from launcher.config.cluster import SlurmSection
from launcher.errors import EXIT_FAILED, LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Cause, Decision, Ended, decide
from launcher.plan.run_dir import RunDir
from launcher.run_store import Attempt
from launcher.worker import ending, network

_LOCK_WAIT_S = 60.0


def begin(plan_path: str) -> int | None:
    """Open the attempt of this job's start and return its number; None where the run is done or runs in another job.

    Raises:
        RunError: where the attempt may not start: its budget is spent, or the nodes are not joined by a private network.
    """
    plan = LaunchPlan.load(plan_path)
    run, section = RunDir(Path(plan.run_dir)), _section(plan)
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    with run_store.starting(run, wait_s=_LOCK_WAIT_S):
        number = run_store.newest_attempt(run)
        attempt = run_store.read_attempt(run, number)
        if attempt.job is not None:
            if attempt.job != job and _is_running(attempt.job, plan):
                print(f"job {attempt.job} runs {plan.run_name} already; this one leaves it alone", file=sys.stderr)
                return None
            ended = _ended(run, number, plan)
            if ended.cause in (Cause.COMPLETED, Cause.CANCELLED, Cause.LIMIT):
                print(f"{plan.run_name} is {ended.cause}; nothing is left to do", file=sys.stderr)
                return None
            decision = decide(ended, _history(run, number), section)
            if not decision.again:
                run_store.update_status(run, state=decision.state, message=decision.reason)
                raise RunError(decision.reason, where=str(run.attempt(number)))
            number = run_store.next_attempt(run, Attempt(store.newest_step(run.checkpoints), automatic=True))
            attempt = run_store.read_attempt(run, number)
        try:
            opened = _with_place(attempt, section, job, restart)
        except LauncherError as error:
            problem = error.problems[0]
            run_store.update_status(run, state="failed", message="; ".join(filter(None, (problem.what, problem.remedy))))
            raise
        run_store.write_attempt(run, number, opened)
        print(ending.marker(number, opened.nodes), file=sys.stderr)
        run_store.update_status(run, state="running", attempt=number, job={"id": job, "nodes": opened.nodes}, message="starting")
    return number


def conclude(plan_path: str, number: int, exit_code: int) -> int:
    """Record how the attempt ended and act on what follows; returns the job's exit code."""
    plan = LaunchPlan.load(plan_path)
    run, section, job = RunDir(Path(plan.run_dir)), _section(plan), os.environ["SLURM_JOB_ID"]
    attempt = run_store.read_attempt(run, number)
    details = _details(job)
    state = queue.state_beneath(job)
    found = ending.read(run, number, attempt, state, section.signal_lead_seconds, exit_code)
    ended = Ended(found.cause, attempt.resume_step, store.newest_step(run.checkpoints), found.message, found.bad_nodes)
    decision = decide(ended, _history(run, number), section)
    run_store.require_newest(run, number)
    run_store.write_json(run.attempt(number) / "exit.json", _record(found, ended, decision))
    message = f"{decision.reason}; runs again" if decision.again else decision.reason
    run_store.update_status(run, state=decision.state, step=found.step, message=message)
    print(f"attempt {number}: {found.cause}: {message}", flush=True)
    if decision.again:
        slurm_cluster.run_again(plan, run, job, decision, by_slurm=state == "PENDING" or _preempted_by_slurm(details))
    return 0 if decision.again or decision.state == "completed" else EXIT_FAILED


def _with_place(attempt: Attempt, section: SlurmSection, job: str, restart: int) -> Attempt:
    """The attempt with the nodes of this start and the place where their agents meet."""
    addresses = network.node_addresses(os.environ["SLURM_JOB_NODELIST"])
    endpoint = network.own_endpoint(list(addresses.values()), section.interface)
    if network.is_public(endpoint.address):
        raise RunError(
            "the nodes would meet at an address that the whole internet can reach",
            where=f"{endpoint.interface} of {os.uname().nodename}",
            value=endpoint.address,
            remedy="set cluster.interface to a private network",
        )
    return Attempt(
        resume_step=attempt.resume_step,
        job=job,
        restart=restart,
        nodes=tuple(addresses),
        address=endpoint.address,
        interface=endpoint.interface,
        port=network.free_port(endpoint.address),
        ends_at=_end_time(_details(job)),
        automatic=attempt.automatic,
    )


def _ended(run: RunDir, number: int, plan: LaunchPlan) -> Ended:
    """How the attempt before ended; where it left no word, its machines are taken for lost."""
    file = run.attempt(number) / "exit.json"
    if file.is_file():
        return _from_record(run_store.read_json(file))
    attempt = run_store.read_attempt(run, number)
    found = ending.read(run, number, attempt, "", _section(plan).signal_lead_seconds, None)
    ended = Ended(found.cause, attempt.resume_step, store.newest_step(run.checkpoints), found.message, found.bad_nodes)
    run_store.write_json(file, _record(found, ended, None))
    return ended


def _history(run: RunDir, number: int) -> list[Ended]:
    """The attempts before `number` back to the one that a person started, oldest first."""
    history: list[Ended] = []
    while number > 1 and run_store.read_attempt(run, number).automatic:
        number -= 1
        file = run.attempt(number) / "exit.json"
        if file.is_file():
            history.insert(0, _from_record(run_store.read_json(file)))
    return history


def _record(found: ending.Ending, ended: Ended, decision: Decision | None) -> dict[str, Any]:
    return {
        "state": decision.state if decision else "failed",
        "cause": found.cause,
        "step": found.step,
        "message": found.message,
        "began_step": ended.began_step,
        "saved_step": ended.saved_step,
        "bad_nodes": found.bad_nodes,
        "first_failure": found.first_failure,
        "ended_at": time.time(),
    }


def _from_record(record: Mapping[str, Any]) -> Ended:
    return Ended(
        Cause(record["cause"]), record["began_step"], record["saved_step"], record["message"], tuple(record["bad_nodes"])
    )


def _details(job: str) -> Mapping[str, str]:
    """What Slurm says of the job now; nothing where it does not answer."""
    try:
        return queue.details(job)
    except SlurmError:
        return {}


def _end_time(details: Mapping[str, str]) -> float | None:
    ends = details.get("EndTime", "")
    return float(ends) if ends.isdigit() else None


def _preempted_by_slurm(details: Mapping[str, str]) -> bool:
    """True where Slurm preempts the job and has said that it will run it again by itself."""
    preempted = details.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "")
    return preempted and details.get("Requeue") == "1" and _preempt_mode(details.get("Partition", "")) == "REQUEUE"


def _preempt_mode(partition: str) -> str:
    try:
        known = site.read().partitions
    except SlurmError:
        return ""
    return next((found.preempt_mode for found in known if found.name == partition), "")


def _is_running(job: str, plan: LaunchPlan) -> bool:
    try:
        known = queue.job(job, 0.0, plan.run_name)
    except SlurmError:
        return True
    return known is not None and known.queued and known.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


def _section(plan: LaunchPlan) -> SlurmSection:
    section = plan.config.cluster
    assert isinstance(section, SlurmSection)
    return section


def main(argv: Sequence[str]) -> int:
    try:
        if argv[0] == "begin":
            number = begin(argv[1])
            print("" if number is None else number)
            return 0
        # A requeue makes Slurm send TERM to all of the job, and KILL only later: what is begun must come to its end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return conclude(argv[1], int(argv[2]), int(argv[3]))
    except LauncherError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
