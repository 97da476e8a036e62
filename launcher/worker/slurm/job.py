"""The steps of a Slurm job before and after its tasks, on its first node.

`python -m launcher.worker.slurm.job begin PLAN` opens the attempt and prints its number, or nothing if nothing is left to do.
`python -m launcher.worker.slurm.job conclude PLAN ATTEMPT RC` judges how the attempt ended, asks plan.retry for a decision and
acts on it. No other code runs a job again.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from launcher import clock
from launcher.checkpoint import store
from launcher.clusters import network
from launcher.clusters.slurm import cluster as slurm_cluster
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import EXIT_FAILED, LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Cause, Decision, decide
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.run_records import Attempt
from launcher.shell_commands import launcher_command
from launcher.tracking import goodput
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.postmortem import Evidence, write_if_possible
from launcher.worker.wandb_closing import close_wandb_run

_LOCK_WAIT_S = 60.0
# How long calls to a silent controller are retried. Most controllers are back within minutes, and the nodes idle meanwhile.
_BEGIN_PATIENCE_S = 300.0
_CONCLUDE_PATIENCE_S = 900.0
# The part of the job's time that is reserved for the conclusion.
_LAST_SECONDS_S = 10.0
# As in `srun: error: n1: task 1: Exited with exit code 7`. Tasks that a signal ended match the next pattern.
_SRUN_ERROR = re.compile(r"srun: error: ([\w.-]+): tasks? [\d,-]+: (Exited with exit code \d+)")
# As in `srun: error: n1: task 1: Killed`. The first such line is the cause: srun then ends the tasks on the other nodes.
_SRUN_SIGNAL = re.compile(r"srun: error: ([\w.-]+): tasks? [\d,-]+: (Killed|Segmentation fault|Aborted|Bus error|Out Of Memory)")
# As in `srun: error: Aborting, io error and missing step on node 1`; nodes are counted from 0.
_SRUN_MISSING = re.compile(r"srun: error: Aborting, .* on node (\d+)$", re.MULTILINE)
_SRUN_NODE_FAILURE = re.compile(r"Node failure on ([\w.-]+)")
# The terms of Slurm's accounting, its cgroup plugin and the kernel.
_OUT_OF_MEMORY = re.compile(r"exceeded memory limit|oom_kill|oom-kill|Out Of Memory", re.IGNORECASE)


def begin(plan_path: str) -> int | None:
    """Open the attempt of this job's start and return its number.

    None if the run is over, has reached a limit of its own, or runs in another job.

    Raises:
        RunError: if the attempt may not start: a retry budget is spent, the nodes share no private network, or Slurm does not
        answer whether another job runs it.
    """
    plan, until = LaunchPlan.load(plan_path), time.monotonic() + _BEGIN_PATIENCE_S
    run, section = RunDir(Path(plan.run_dir)), SlurmSection.of(plan.config.cluster)
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    with run_store.start_lock(run, wait_s=_LOCK_WAIT_S):
        number = run_store.newest_attempt(run)
        attempt = run_store.read_attempt(run, number)
        if attempt.job is not None:
            if attempt.job != job and _is_running(attempt.job, plan, until):
                print(f"job {attempt.job} runs {plan.run_name} already; this job does not run it", file=sys.stderr)
                return None
            is_concluded = journal.read_end(run, number) is not None
            state, lost = ("", []) if is_concluded else _find_end_of_start(attempt, job, restart, until)
            end = postmortem.end_of_attempt(run, number, section, read_evidence(run, number, attempt, state, lost=lost))
            if end.cause in (Cause.COMPLETED, Cause.CANCELLED, Cause.LIMIT):
                print(f"{plan.run_name} is {end.cause}; there is nothing left to do", file=sys.stderr)
                return None
            decision = decide(end, postmortem.history(run, number), section)
            if not decision.again:
                _end_run(plan, plan_path, run, number, decision)
                raise RunError(decision.reason, where=str(run.attempt(number)))
        if limit := goodput.reached_limit(run, plan, clock.now()):
            # It would cost more to load the model and train one step, only to stop.
            _end_run(plan, plan_path, run, number, Decision(False, "preempted", limit))
            print(f"{plan.run_name}: {limit}; the attempt is not started", file=sys.stderr)
            return None
        if attempt.job is not None:
            number = run_store.create_attempt(run, Attempt(store.newest_step(run.checkpoints), automatic=True))
            attempt = run_store.read_attempt(run, number)
        elif attempt.automatic:
            # The attempt was numbered before the job waited, possibly on a machine that did not see the newest checkpoint yet.
            attempt = replace(attempt, resume_step=store.newest_step(run.checkpoints))
        try:
            opened = _add_nodes(attempt, section, job, restart, until)
        except LauncherError as error:
            problem = error.problems[0]
            message = "; ".join(filter(None, (problem.message, problem.remedy)))
            _end_run(plan, plan_path, run, number, Decision(False, "failed", message))
            raise
        run_store.write_attempt(run, number, opened)
        postmortem.reserve_disk_space(run, number)
        print(marker(number, opened.nodes), file=sys.stderr)
        run_store.update_status(run, state="running", attempt=number, job={"id": job, "nodes": opened.nodes}, message="starting")
    return number


def _find_end_of_start(attempt: Attempt, job: str, restart: int, until: float) -> tuple[str, list[str]]:
    """Return Slurm's state for the job's previous start and that start's lost nodes; it may have been killed before it concluded.

    Without accounting the state is inferred: a start that was followed by another and lost no node was requeued by a person or
    by preemption. A node that was cut off and came back without a reboot leaves no trace.
    """
    lost = queue.find_lost_nodes(attempt.nodes, attempt.begun_at or 0.0, _seconds_left(until)) if attempt.nodes else []
    if attempt.job != job or not restart:
        return "", lost or []
    state = queue.state_of_start(job, restart - 1, _seconds_left(until))
    return state or ("REQUEUED" if lost == [] else ""), lost or []


def _end_run(plan: LaunchPlan, plan_path: str, run: RunDir, number: int, decision: Decision) -> None:
    """Report in the status, events.jsonl and W&B that the run ends before its next attempt has begun.

    The run is locked meanwhile. W&B may take most of a minute; another start waits longer than that for the lock.
    """
    run_store.update_status(run, state=decision.state, message=decision.reason)
    write_if_possible(lambda: append_event(run, number, "alert", f"the run ends: {decision.reason}"))
    write_if_possible(lambda: close_wandb_run(plan, plan_path, run, number))


def conclude(plan_path: str, number: int, exit_code: int) -> int:
    """Record how the attempt ended and act on the decision; returns the job's exit code."""
    plan = LaunchPlan.load(plan_path)
    run, section, job = RunDir(Path(plan.run_dir)), SlurmSection.of(plan.config.cluster), os.environ["SLURM_JOB_ID"]
    attempt = run_store.read_attempt(run, number)
    conclusion = postmortem.conclude(run, number, attempt, section, read_evidence(run, number, attempt, "", exit_code))
    until = time.monotonic() + _patience_s(attempt)
    # A finished run does not hold its nodes to wait for Slurm's answer.
    state = queue.state_beneath(job, attempt.restart, attempt.ends_at, _seconds_left(until) if conclusion.decision.again else 0.0)
    if state:
        conclusion = postmortem.conclude(run, number, attempt, section, read_evidence(run, number, attempt, state, exit_code))
    run_store.fence(run, number)
    conclusion.end_attempt(run, number)
    decision = conclusion.decision
    if decision.again:
        by_slurm = state == "PENDING" or _is_preempted_by_slurm(_read_details(job, until), until)
        slurm_cluster.run_again(plan, run, job, decision, by_slurm=by_slurm, retry_s=_seconds_left(until))
    else:
        write_if_possible(lambda: close_wandb_run(plan, plan_path, run, number))
    return 0 if decision.again or decision.state == "completed" else EXIT_FAILED


def marker(number: int, nodes: Sequence[str]) -> str:
    """Return the line that begins an attempt in its job's output; one file holds the output of all starts of a job."""
    return f"attempt {number} begins on {', '.join(nodes)}"


def read_evidence(
    run: RunDir, number: int, attempt: Attempt, state: str, exit_code: int | None = None, lost: Sequence[str] = ()
) -> Evidence:
    """Return what Slurm knows about the end of an attempt, and what srun printed since the attempt began.

    `state` is Slurm's state of the job, `exit_code` srun's, and `lost` are the nodes that Slurm has lost; each may be unknown.
    """
    file, nodes = run.agent_log(number, str(attempt.job)), attempt.nodes
    text = file.read_text(errors="replace") if file.is_file() else ""
    output = text.rpartition(marker(number, nodes))[2]
    failed = [node for node in nodes if node in {*_SRUN_NODE_FAILURE.findall(output), *lost}]
    silence = {node: f"{node} was lost (Slurm: node failure)" for node in failed}
    # After the loss of an agent or of a slurmstepd, srun itself ends the tasks on the other nodes.
    if (missing := _SRUN_MISSING.search(output)) is not None and int(missing[1]) < len(nodes):
        culprit = nodes[int(missing[1])]
        silence.setdefault(culprit, f"srun lost its slurmstepd on {culprit}")
    elif killed := _SRUN_SIGNAL.search(output):
        silence.setdefault(killed[1], f"the agent of {killed[1]} was killed (srun: {killed[2]})")
    return Evidence(
        state,
        exit_code,
        failed_nodes=failed,
        silence=silence,
        refused={node: error for node, error in _SRUN_ERROR.findall(output) if node in nodes},
        is_out_of_memory=_OUT_OF_MEMORY.search(output) is not None,
    )


def _patience_s(attempt: Attempt) -> float:
    """Return how long, in seconds, to retry calls to Slurm at the end; Slurm kills the job when its time is over."""
    left_s = math.inf if attempt.ends_at is None else attempt.ends_at - _LAST_SECONDS_S - time.time()
    return max(0.0, min(_CONCLUDE_PATIENCE_S, left_s))


def _seconds_left(until: float) -> float:
    """Return the seconds until a time of time.monotonic(), at least 0."""
    return max(0.0, until - time.monotonic())


def _add_nodes(attempt: Attempt, section: SlurmSection, job: str, restart: int, until: float) -> Attempt:
    """Return the attempt with the nodes of this start, and the address and port where their agents meet."""
    addresses = network.node_addresses(os.environ["SLURM_JOB_NODELIST"], _seconds_left(until))
    endpoint = network.LOOPBACK
    if len(addresses) > 1:
        endpoint = network.require_private(network.own_endpoint([*addresses.values()], section.interface), section.interface)
    return replace(
        attempt,
        job=job,
        restart=restart,
        nodes=tuple(addresses),
        ends_at=float(ends) if (ends := _read_details(job, until).get("EndTime", "")).isdigit() else None,
        begun_at=clock.now(),
        **endpoint.choose_meeting(),
    )


def _read_details(job: str, until: float) -> Mapping[str, str]:
    """Return Slurm's details of the job; empty if Slurm does not answer in time."""
    try:
        return queue.read_details(job, _seconds_left(until))
    except SlurmError:
        return {}


def _is_preempted_by_slurm(details: Mapping[str, str], until: float) -> bool:
    """Return whether Slurm is preempting the job and will requeue it by itself.

    With preempt/partition_prio the partition's PreemptMode decides this; with preempt/qos the QOS does. In doubt the answer is
    False: one start too many ends in seconds because `begin` finds nothing to do, but one too few ends the run.
    """
    preempted = details.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "")
    if not preempted or details.get("Requeue") != "1":
        return False
    try:
        config = slurm("scontrol", "show", "config", retry_s=_seconds_left(until))
        partition = slurm("scontrol", "show", "partition", details.get("Partition", ""), retry_s=_seconds_left(until))
    except SlurmError:
        return False
    by_partition = re.search(r"^PreemptType\s*=\s*preempt/partition_prio\s*$", config, re.MULTILINE)
    mode = re.search(r"\bPreemptMode=(\S+)", partition)
    return by_partition is not None and mode is not None and "REQUEUE" in mode[1].split(",")


def _is_running(job: str, plan: LaunchPlan, until: float) -> bool:
    """Return whether the job is running on nodes. Without an answer, the status stays: the other job may write it."""
    try:
        known = queue.read_job(job, 0.0, plan.run_name, _seconds_left(until))
    except SlurmError as error:
        problem = error.problems[0]
        raise RunError(
            f"Slurm did not answer whether job {job} still runs {plan.run_name}: {problem.message}",
            where=problem.where,
            value=problem.value,
            remedy=f"when Slurm answers, look with: {launcher_command('status', plan.run_dir)}, "
            f"and continue with: {launcher_command('resume', plan.run_dir)}",
        ) from None
    return known is not None and known.queued and known.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


def main(argv: Sequence[str]) -> int:
    try:
        if argv[0] == "begin":
            # The script reads the attempt's number from standard output, so nothing else may be printed there.
            with redirect_stdout(sys.stderr):
                number = begin(argv[1])
            print("" if number is None else number)
            return 0
        # On a requeue, Slurm sends TERM to the whole job and KILL only later; the conclusion must complete in between.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return conclude(argv[1], int(argv[2]), int(argv[3]))
    except LauncherError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return EXIT_FAILED
    except FileNotFoundError as error:
        if Path(argv[1]).is_file():
            raise
        print(f"the run directory has been moved or removed: {error}; nothing is written there", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
