"""Determines why an attempt ended and what follows, from its ranks' and nodes' records and the scheduler's job state."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher import json_records, run_records, run_store
from launcher.checkpoint import store
from launcher.clusters.check_results import NO_ROOM
from launcher.clusters.limits import limit_that_killed_agents
from launcher.config.sections.cluster import ManagedSection
from launcher.errors import WOULD_REPEAT, RunError
from launcher.hardware import is_full
from launcher.plan import retry
from launcher.plan.retry import AttemptEnd, Cause, Decision, RestartedRanks, decide
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, ExitRecord, FailureRecord
from launcher.tracking.jsonl import append_event
from launcher.tracking.run_metrics import newest_trained_step
from launcher.worker import failure_record
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.slurm import job_output

# Slurm sends its signal up to a minute before the lead begins. The clocks of the controller and of the storage may differ by
# five minutes, as MUNGE tolerates.
_SIGNAL_SPREAD_S = 90.0 + 300.0
_FINAL = tuple(kind.__name__ for kind in WOULD_REPEAT)
# Errors that an agent raises before it starts its ranks because its node lacks something.
_NODE_ERRORS = ("RunError", "DamagedRun", "SlurmError")
# Slurm's states for a job that lost its machines, and the state for Ray workers that are replaced by a different number.
_REQUEUED = ("PENDING", "REQUEUED")
_TAKEN = {"TIMEOUT": Cause.TIME_LIMIT, "PREEMPTED": Cause.PREEMPTED, "RESIZED": Cause.RESIZED}
# The space that is reserved for the records of an attempt's end.
_RESERVED_BYTES = 512 * 1024
# The most that the records of an attempt's end take.
_NEEDED_BYTES = 128 * 1024


@dataclass(frozen=True)
class Ending:
    """Why and at which step an attempt ended."""

    cause: Cause
    step: int
    message: str
    bad_nodes: tuple[str, ...] = ()
    first_failure: FailureRecord | None = None


@dataclass(frozen=True)
class Conclusion:
    """How an attempt ended (`ended` holds this for the retry budgets), and what plan.retry decides."""

    ending: Ending
    ended: AttemptEnd
    decision: Decision

    @property
    def message(self) -> str:
        return f"{self.decision.reason}; runs again" if self.decision.again else self.decision.reason

    @property
    def alert(self) -> str | None:
        """The alert for an attempt that did not end as planned; None for one that did."""
        if self.decision.state in ("completed", "cancelled") or self.ending.cause is Cause.LIMIT:
            return None
        return f"the attempt ended ({self.ending.cause}): {self.message}"

    def write(self, run: RunDir, number: int) -> None:
        """Write exit.json, and an alert for an attempt that did not end as planned."""
        release_space_if_full(run, number)
        write_if_possible(lambda: self.record(run, number))
        if (alert := self.alert) is not None:
            write_if_possible(lambda: append_event(run, number, "alert", alert, self.ending.step))

    def record(self, run: RunDir, number: int, decided: bool = True) -> None:
        """Write exit.json; `decided` is False if the next start of the run makes the decision."""
        record = ExitRecord(
            state=self.decision.state if decided else "failed",
            step=self.ending.step,
            message=self.ending.message,
            cause=self.ending.cause,
            began_step=self.ended.began_step,
            saved_step=self.ended.saved_step,
            bad_nodes=self.ending.bad_nodes,
            first_failure=self.ending.first_failure,
            # A later start cannot know when the attempt ended.
            ended_at=time.time() if decided else None,
        )
        json_records.write(run_records.exit_file(run, number), record)


@dataclass(frozen=True)
class Evidence:
    """What a backend knows about the end of an attempt, beside the records of its ranks and nodes.

    `state` is the scheduler's state of the job, empty if unknown. `exit_code` is srun's, None if the job did not record it.
    `lost_nodes` names the attempt's nodes that Ray has lost, None if unknown; `failed_nodes` names those that Slurm has lost, if
    known. `silence` maps a node's name to the reason why it left no record, for backends without a scheduler.
    """

    state: str = ""
    exit_code: int | None = None
    lost_nodes: Collection[str] | None = None
    failed_nodes: Collection[str] = ()
    silence: Mapping[str, str] = field(default_factory=dict)


def conclude(run: RunDir, number: int, attempt: Attempt, section: ManagedSection, evidence: Evidence) -> Conclusion:
    """Judge attempt `number` and decide what follows."""
    ending = judge(run, number, attempt, section.save_lead_s or 0.0, evidence)
    saved_step = store.newest_step(run.checkpoints)
    ended = AttemptEnd(ending.cause, attempt.resume_step, saved_step, ending.message, ending.bad_nodes)
    ended = _add_failures(run, number, ended, ending.first_failure)
    return Conclusion(ending, ended, decide(ended, history(run, number), section))


def end_of_attempt(
    run: RunDir, number: int, section: ManagedSection, evidence: Evidence, on_alert: Callable[[str], None] | None = None
) -> AttemptEnd:
    """Return how attempt `number` ended: from its exit.json, or else by judging and recording it now.

    `on_alert` receives the alert of an attempt that is judged now, if the run continues; otherwise the caller sends the alert.
    """
    record = run_records.read_exit(run, number)
    if record is not None:
        return _from_record(run, number, record)
    conclusion = conclude(run, number, run_store.read_attempt(run, number), section, evidence)
    conclusion.record(run, number, decided=False)
    if on_alert is not None and conclusion.decision.again and conclusion.alert is not None:
        on_alert(conclusion.alert)
    return conclusion.ended


def history(run: RunDir, number: int) -> list[AttemptEnd]:
    """Return the ends of the attempts before `number`, back to the one that a person started, oldest first."""
    ends: list[AttemptEnd] = []
    while number > 1 and run_store.read_attempt(run, number).automatic:
        number -= 1
        record = run_records.read_exit(run, number)
        if record is not None:
            ends.insert(0, _from_record(run, number, record))
    return ends


def _from_record(run: RunDir, number: int, record: ExitRecord) -> AttemptEnd:
    if record.cause is None:
        path = str(run_records.exit_file(run, number))
        raise RunError("a record of the run is damaged: this field is missing", where=f"{path}: cause", remedy="remove the file")
    ended = AttemptEnd(record.cause, record.began_step, record.saved_step, record.message, record.bad_nodes)
    return _add_failures(run, number, ended, record.first_failure)


def _add_failures(run: RunDir, number: int, ended: AttemptEnd, failure: FailureRecord | None) -> AttemptEnd:
    """Return the end of attempt `number` with the exceptions of its last ranks and of the ranks that were restarted."""
    restarts = tuple(
        RestartedRanks(failure_record.exception_of(record.first_failure), record.first_failure.step, record.saved_step)
        for record in run_records.read_restarts(run, number)
    )
    if failure is None or ended.cause is not Cause.FAILURE:
        return replace(ended, restarts=restarts)
    return replace(ended, exception=failure_record.exception_of(failure), step=failure.step, restarts=restarts)


def describe_repetition(run: RunDir, number: int, failure: FailureRecord) -> str:
    """Return why the ranks of attempt `number` would fail again after a restart, given this failure; empty if they may not.

    An exception counts as repeating if it came back at the same step after two resumes from one checkpoint; see
    launcher.plan.retry.
    """
    attempt, saved_step = run_store.read_attempt(run, number), store.newest_step(run.checkpoints)
    ended = _add_failures(run, number, AttemptEnd(Cause.FAILURE, attempt.resume_step, saved_step), failure)
    return retry.describe_repetition([*history(run, number), ended])


def judge(run: RunDir, number: int, attempt: Attempt, lead_s: float, evidence: Evidence) -> Ending:
    """Return why attempt `number` of a managed run ended; `lead_s` is how long before its end the job is asked to save."""
    ending = _find_ending(run, number, attempt, lead_s, evidence)
    if ending.cause is not Cause.INFRASTRUCTURE:
        return ending
    if job_output.exceeded_memory(job_output.read_output(run, number, attempt)):
        return replace(ending, message=f"a memory limit was exceeded (raise cluster.additional_parameters.mem): {ending.message}")
    silent = [node for node in range(len(attempt.nodes)) if not run_records.node_file(run, number, node).is_file()]
    limit = limit_that_killed_agents(run, number, silent)
    return replace(ending, message=f"{limit}: {ending.message}") if limit and limit not in ending.message else ending


def _find_ending(run: RunDir, number: int, attempt: Attempt, lead_s: float, evidence: Evidence) -> Ending:
    state, exit_code, silence = evidence.state, evidence.exit_code, evidence.silence
    step = newest_trained_step(run, run_store.read_status(run))
    outcome = run_records.read_outcome(run, number)
    by_node = {node: run_records.read_node(run, number, node) for node in range(len(attempt.nodes))}
    records = [record for record in by_node.values() if record is not None]
    cancelled = run.cancel(number).is_file() or state == "CANCELLED"
    if outcome is not None:
        written_at = run_records.outcome_file(run, number).stat().st_mtime
        interruption = _find_interruption(attempt, lead_s, written_at)
        # Ranks cannot know why they were interrupted: scancel sends the same TERM as a preemption.
        interruption = Cause.CANCELLED if cancelled else Cause.RESIZED if state == "RESIZED" else interruption
        causes = {"completed": Cause.COMPLETED, "cancelled": Cause.CANCELLED, "limit": Cause.LIMIT, "preempted": interruption}
        return Ending(causes[outcome.reason], outcome.step, outcome.message)
    if cancelled:
        return Ending(Cause.CANCELLED, step, f"cancelled at step {step} without saving")
    if problems := [problem for record in records for problem in record.problems]:
        messages = [f"{problem.where}: {problem.message} {problem.value}".strip() for problem in problems]
        unfit = {problem.where for problem in problems if not problem.message.startswith(NO_ROOM)}
        if not unfit:
            return Ending(Cause.FAILURE, step, "; ".join(dict.fromkeys(messages)))
        return _from_unfit_nodes(unfit, messages, attempt, step)
    has_peers = len(set(attempt.nodes)) > 1
    failures = {
        node: replace(record.first_failure, host=attempt.nodes[node] if has_peers else "")
        for node, record in by_node.items()
        if record and record.first_failure
    }
    silent = list(dict.fromkeys(attempt.nodes[node] for node, record in by_node.items() if record is None))
    output = job_output.read_output(run, number, attempt) if silent or state in _REQUEUED else ""
    failed = [node for node in attempt.nodes if node in {*job_output.find_failed_nodes(output), *evidence.failed_nodes}]
    first = failure_record.first_of(failures.values())
    if first is not None and first.kind in _FINAL and first.rank is not None:
        return Ending(Cause.USER_ERROR, step, _describe_failure(first), first_failure=first)
    taken = _TAKEN.get(state)
    if killed := [record.ended_at for record in records if record.stopped and record.killed]:
        cause = taken or _find_interruption(attempt, lead_s, min(killed))
        return Ending(cause, step, f"killed at step {step}: it had not stopped within the grace period", first_failure=first)
    if taken is not None:
        event = "the number of workers changed" if taken is Cause.RESIZED else f"the job ended as {state}"
        return Ending(taken, step, f"{event} at step {step} without saving", first_failure=first)
    is_explained = first is None or failure_record.is_consequence(first)
    # The signals with which Slurm ends a job may have caused the failure.
    by_signal = first is not None and first.exit_code in (-CANCEL, -PREEMPT, -signal.SIGTERM, -signal.SIGKILL)
    if state in _REQUEUED and not failed and (is_explained or by_signal or (first is not None and first.rank is None)):
        return Ending(Cause.PREEMPTED, step, f"the job was requeued at step {step} without saving", first_failure=first)
    lost = _describe_silent(silent, evidence.lost_nodes, failed, output, attempt.nodes)
    if any(node in silence for node in silent):
        lost = "; ".join(silence.get(node, f"no record from {node}") for node in silent)
    if run_records.lost_coordinator_file(run, number).is_file() and "Ray has lost" not in lost and is_explained:
        # Workers that have lost the coordinator end their ranks and leave no record.
        names = ", ".join(dict.fromkeys(attempt.nodes))
        message = f"the run's coordinator was killed or has ended, and the ranks on {names} with it"
        return Ending(Cause.INFRASTRUCTURE, step, message, first_failure=first)
    if first is not None:
        return _from_failure(first, {attempt.nodes[node]: failure for node, failure in failures.items()}, lost, attempt, step)
    if stopped := [record.ended_at for record in records if record.stopped]:
        return Ending(_find_interruption(attempt, lead_s, min(stopped)), step, "stopped before training had begun")
    if exit_code is not None:
        output = job_output.read_output(run, number, attempt)
        if refused := job_output.find_refusals(output, attempt, by_node):
            shared = "check that the run directory is on storage that all nodes share"
            messages = [f"{node}: no agent could start there ({error}); {shared}" for node, error in refused.items()]
            return _from_unfit_nodes(set(refused), messages, attempt, step)
    message = lost or "the ranks ended without an outcome"
    code = f" (srun ended with {exit_code})" if exit_code is not None else ""
    return Ending(Cause.INFRASTRUCTURE, step, f"{message}{code}")


def _describe_silent(
    nodes: Sequence[str], lost_nodes: Collection[str] | None, failed: Sequence[str], output: str, all_nodes: Sequence[str]
) -> str:
    """Describe nodes that left no record. If Ray loses a node, it ends the workers on all nodes before they can leave records.

    `failed` are the nodes that Slurm has lost, `output` is the job's output.
    """
    if not nodes:
        return ""
    if lost_nodes is not None:
        lost = [node for node in nodes if node in lost_nodes]
        return f"Ray has lost {', '.join(lost)}" if lost else f"no record from {', '.join(nodes)}, which Ray still has"
    failed = [node for node in dict.fromkeys(failed) if node in nodes]
    parts = [f"{node} was lost (Slurm: node failure)" for node in failed]
    culprit, reason = job_output.find_culprit(output, all_nodes)
    if culprit in nodes and culprit not in failed:
        parts.append(reason)
    known = {*failed, culprit}
    if rest := [node for node in nodes if node not in known]:
        parts.append(f"no record from {', '.join(rest)}")
    return "; ".join(parts)


def _find_interruption(attempt: Attempt, lead_s: float, at: float) -> Cause:
    """Return what took the machines away at that time; the next start may judge this hours later."""
    near = attempt.ends_at is not None and at > attempt.ends_at - lead_s - _SIGNAL_SPREAD_S
    return Cause.TIME_LIMIT if near else Cause.PREEMPTED


def _from_unfit_nodes(unfit: set[str], messages: Sequence[str], attempt: Attempt, step: int) -> Ending:
    """If most nodes are unfit, the cause lies elsewhere, and excluding them would not help."""
    nodes = tuple(dict.fromkeys(attempt.nodes))
    bad_nodes = tuple(node for node in nodes if node in unfit)
    message = "; ".join(dict.fromkeys(messages))
    if len(bad_nodes) > max(1, len(nodes) // 2):
        return Ending(Cause.USER_ERROR, step, message)
    return Ending(Cause.BAD_NODE, step, message, bad_nodes)


def _from_failure(
    first: FailureRecord, failures: Mapping[str, FailureRecord], silent: str, attempt: Attempt, step: int
) -> Ending:
    """Judge a failure that is not a user error; `failures` is keyed by node, `silent` describes the nodes without a record."""
    message = _describe_failure(first)
    if silent:
        if first.rank is None or failure_record.is_consequence(first):
            message, silent = silent, f"as a consequence, {first.line}"
        return Ending(Cause.INFRASTRUCTURE, step, f"{message}; {silent}", first_failure=first)
    if first.rank is None and first.kind in _NODE_ERRORS:
        messages = {node: f"{node}: {failure.message}" for node, failure in failures.items() if failure.kind in _NODE_ERRORS}
        ending = _from_unfit_nodes(set(messages), list(messages.values()), attempt, step)
        # If most nodes do not meet, the head node's port or network may be at fault; the next attempt may have another head node.
        cause = Cause.INFRASTRUCTURE if ending.cause is Cause.USER_ERROR else ending.cause
        return replace(ending, cause=cause, first_failure=first)
    cause = Cause.INFRASTRUCTURE if failure_record.is_of_machines(first) else Cause.FAILURE
    return Ending(cause, step, message, first_failure=first)


def _describe_failure(failure: FailureRecord) -> str:
    return f"{failure.source}: {failure.message}"


def judge_local(run: RunDir, attempt: int, failure: FailureRecord | None, stopped: bool, killed: bool) -> ExitRecord:
    """Return how an attempt on this machine ended: from rank 0's record, or else as the node's agent saw it.

    `stopped`: the ranks were asked to stop. `killed`: they did not stop in time.
    """
    outcome = run_records.read_outcome(run, attempt) if failure is None else None
    if outcome is not None:
        return ExitRecord(outcome.state, outcome.step, outcome.message, reason=outcome.reason, checkpoint=outcome.checkpoint)
    step = newest_trained_step(run, run_store.read_status(run))
    checkpoints = store.list_checkpoints(run.checkpoints)
    newest = f"the newest checkpoint is of step {checkpoints[-1].step}" if checkpoints else "there is no checkpoint"
    if killed:
        return ExitRecord("cancelled", step, f"killed at step {step} without saving; {newest}", first_failure=failure)
    if stopped and (failure is None or failure.exit_code in (-CANCEL, -PREEMPT)):
        return ExitRecord("cancelled", step, f"stopped before training had begun; {newest}", first_failure=failure)
    if failure is None:
        return ExitRecord("failed", step, "the ranks ended without an outcome")
    message = "; ".join(filter(None, (_describe_failure(failure), describe_repetition(run, attempt, failure))))
    return ExitRecord("failed", step, message, first_failure=failure)


def write_if_possible(write: Callable[[], object]) -> None:
    """Call `write`; on failure, print it: a full disk must not stop the run. The next start judges by the records."""
    try:
        write()
    except OSError as error:
        with suppress(OSError):
            print(f"the conclusion could not be written, but the launcher acts on it: {error}", file=sys.stderr, flush=True)


def reserve_disk_space(run: RunDir, attempt: int) -> None:
    """Reserve space with a file for the records of an attempt's end; without it, the end on a full disk is not recorded."""
    with suppress(OSError), open(_reserve_path(run, attempt), "wb") as file:
        # Write random bytes: compressing and copy-on-write file systems allocate nothing for zeros.
        file.write(os.urandom(_RESERVED_BYTES))
        os.fsync(file.fileno())


def release_disk_space(run: RunDir, attempt: int) -> None:
    """Free the space; call it when the records are written."""
    with suppress(OSError):
        _reserve_path(run, attempt).unlink()


def release_space_if_full(run: RunDir, attempt: int) -> bool:
    """Free the space if the disk has no room for the records; returns whether it had none."""
    probe = run.attempt(attempt) / ".probe"
    try:
        with open(probe, "wb") as file:
            file.write(os.urandom(_NEEDED_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        has_no_room = is_full(error)
    else:
        has_no_room = False
    with suppress(OSError):
        probe.unlink()
    if has_no_room:
        release_disk_space(run, attempt)
    return has_no_room


def _reserve_path(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / ".reserve"
