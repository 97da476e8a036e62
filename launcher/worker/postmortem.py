"""Why an attempt ended and what follows: an ordered table of rules over its journal and what the backend knows."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from launcher import clock
from launcher.checkpoint import store
from launcher.clusters.check_results import NO_ROOM
from launcher.clusters.limits import limit_that_killed_agents
from launcher.config.sections.cluster import ManagedSection
from launcher.errors import WOULD_REPEAT, Problem
from launcher.plan import retry
from launcher.plan.quantities import list_first
from launcher.plan.retry import AttemptEnd, Cause, Decision, RestartedRanks, decide
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import AttemptConcluded, AttemptState, FailureRecord, NodeEnded
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import append_event
from launcher.tracking.run_metrics import newest_trained_step
from launcher.worker import failure_record
from launcher.worker.signals import CANCEL, PREEMPT

# Slurm sends its signal up to a minute before the lead begins. The clocks of the controller and of the storage may differ by
# five minutes, as MUNGE tolerates.
_SIGNAL_SPREAD_S = 90.0 + 300.0
_FINAL = tuple(kind.__name__ for kind in WOULD_REPEAT)
# Errors that an agent raises before it starts its ranks because its node lacks something.
_NODE_ERRORS = ("RunError", "DamagedRun", "UnreadableRun", "SlurmError")
# Slurm's states for a job that lost its machines, and the state for nodes that more nodes replace.
_REQUEUED = ("PENDING", "REQUEUED")
_TAKEN = {"TIMEOUT": Cause.TIME_LIMIT, "PREEMPTED": Cause.PREEMPTED, "RESIZED": Cause.RESIZED}
# How many nodes, and how many findings, the message of an attempt's end lists.
_NODES_SHOWN, _FINDINGS_SHOWN = 4, 6
# The space that is reserved for the records of an attempt's end.
_RESERVED_BYTES = 512 * 1024


@dataclass(frozen=True)
class Ending:
    """Why and at which step an attempt ended."""

    cause: Cause
    step: int
    message: str
    bad_nodes: tuple[str, ...] = ()
    first_failure: FailureRecord | None = None


@dataclass(frozen=True)
class Evidence:
    """All that is known about the end of an attempt: the backend fills the first part, `judge` adds the second.

    Attributes:
        state: the scheduler's state of the job; empty if unknown, or without a scheduler.
        exit_code: srun's; None if the job did not record it.
        failed_nodes: the nodes that Slurm has lost, if known.
        silence: why a node left no record, keyed by its name, the first cause first.
        refused: the error of each node on which no agent could start, keyed by its name.
        is_out_of_memory: the scheduler ended processes that exceeded a memory limit of the job.
        stops_mean: why ranks are asked to stop on this backend; None if the time of the request decides.
        lead_s: how long before its end the job is asked to save.
    """

    state: str = ""
    exit_code: int | None = None
    failed_nodes: Collection[str] = ()
    silence: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    is_out_of_memory: bool = False
    stops_mean: Cause | None = None
    attempt: Attempt = field(default_factory=lambda: Attempt(None))
    journal: AttemptState = field(default_factory=AttemptState)
    step: int = 0
    is_cancelled: bool = False
    lead_s: float = 0.0

    @cached_property
    def ended_nodes(self) -> list[NodeEnded]:
        """The records of the attempt's nodes, in their order."""
        return [self.journal.nodes[node] for node in range(len(self.attempt.nodes)) if node in self.journal.nodes]

    @cached_property
    def silent(self) -> list[str]:
        """The nodes that left no record, by name."""
        nodes = self.attempt.nodes
        return list(dict.fromkeys(name for node, name in enumerate(nodes) if node not in self.journal.nodes))

    @cached_property
    def problems(self) -> list[Problem]:
        """What the node checks found."""
        return [problem for record in self.ended_nodes for problem in record.problems]

    @cached_property
    def failures(self) -> list[tuple[str, FailureRecord]]:
        """The name and the first failure of each node that had one."""
        names = self.attempt.nodes
        has_peers = len(set(names)) > 1
        failed = [(names[record.node], record.first_failure) for record in self.ended_nodes if record.first_failure is not None]
        return [(name, replace(failure, host=name if has_peers else "")) for name, failure in failed]

    @cached_property
    def first(self) -> FailureRecord | None:
        """The failure that caused the others."""
        return failure_record.first_of(failure for _, failure in self.failures)

    @property
    def is_consequence(self) -> bool:
        """No rank has failed, or only because it lost its connection to another process."""
        return self.first is None or failure_record.is_consequence(self.first)

    @property
    def by_signal(self) -> bool:
        """The signals with which a scheduler ends a job may have caused the first failure."""
        return self.first is not None and self.first.exit_code in (-CANCEL, -PREEMPT, -signal.SIGTERM, -signal.SIGKILL)

    @cached_property
    def silence_message(self) -> str:
        """What is known about the nodes that left no record; empty if there are none."""
        parts = [reason for node, reason in self.silence.items() if node in self.silent]
        if rest := [node for node in self.silent if node not in self.silence]:
            parts.append(f"no record from {list_first(rest, _NODES_SHOWN)}")
        return list_first(parts, _FINDINGS_SHOWN, "; ")

    def interruption(self, at: float) -> Cause:
        """Return what took the machines away at that time; the next start may judge this hours later."""
        ends_at = self.attempt.ends_at
        is_near = ends_at is not None and at > ends_at - self.lead_s - _SIGNAL_SPREAD_S
        return Cause.TIME_LIMIT if is_near else Cause.PREEMPTED

    def ended(self, cause: Cause, message: str, bad_nodes: tuple[str, ...] = ()) -> Ending:
        return Ending(cause, self.step, message, bad_nodes, self.first)


@dataclass(frozen=True)
class Rule:
    """`judge` concludes from the evidence if `applies`, and no earlier rule of the table does."""

    name: str
    applies: Callable[[Evidence], bool]
    judge: Callable[[Evidence], Ending]


def _judge_training(evidence: Evidence) -> Ending:
    training = evidence.journal.training
    assert training is not None
    # Ranks cannot know why they were interrupted: scancel sends the same TERM as a preemption.
    cause = evidence.interruption(training.at)
    if training.reason != "preempted":
        cause = Cause(training.reason)
    elif evidence.is_cancelled:
        cause = Cause.CANCELLED
    elif evidence.state == "RESIZED":
        cause = Cause.RESIZED
    return Ending(cause, training.step, training.message)


def _judge_node_checks(evidence: Evidence) -> Ending:
    found = [(problem.where, f"{problem.message} {problem.value}".strip()) for problem in evidence.problems]
    # A full disk is shared: no other node would have room.
    unfit = {problem.where for problem in evidence.problems if not problem.message.startswith(NO_ROOM)}
    if not unfit:
        return Ending(Cause.FAILURE, evidence.step, _join_findings(found))
    return replace(_blame_nodes(evidence, unfit, found), first_failure=None)


def _judge_killed(evidence: Evidence) -> Ending:
    killed_at = min(record.at for record in evidence.ended_nodes if record.stopped and record.killed)
    cause = evidence.stops_mean or _TAKEN.get(evidence.state) or evidence.interruption(killed_at)
    return evidence.ended(cause, f"killed at step {evidence.step} without saving")


def _judge_taken(evidence: Evidence) -> Ending:
    cause = _TAKEN[evidence.state]
    event = "the number of nodes changed" if cause is Cause.RESIZED else f"the job ended as {evidence.state}"
    return evidence.ended(cause, f"{event} at step {evidence.step} without saving")


def _judge_lost_node(evidence: Evidence) -> Ending:
    first = evidence.first
    assert first is not None
    if first.rank is None or evidence.is_consequence:
        return evidence.ended(Cause.INFRASTRUCTURE, f"{evidence.silence_message}; as a consequence, {first.line}")
    return evidence.ended(Cause.INFRASTRUCTURE, f"{_describe_failure(first)}; {evidence.silence_message}")


def _judge_agents(evidence: Evidence) -> Ending:
    found = {node: one.message for node, one in evidence.failures if one.kind in _NODE_ERRORS}
    ending = _blame_nodes(evidence, found, found.items())
    # If most nodes do not meet, the head node's port or network may be at fault; the next attempt may have another head node.
    return replace(ending, cause=Cause.INFRASTRUCTURE) if ending.cause is Cause.USER_ERROR else ending


def _judge_failure(evidence: Evidence) -> Ending:
    first = evidence.first
    assert first is not None
    cause = Cause.INFRASTRUCTURE if failure_record.is_of_machines(first) else Cause.FAILURE
    return evidence.ended(cause, _describe_failure(first))


def _judge_stopped(evidence: Evidence) -> Ending:
    stopped_at = min(record.at for record in evidence.ended_nodes if record.stopped)
    return evidence.ended(evidence.stops_mean or evidence.interruption(stopped_at), "stopped before training had begun")


def _judge_refused(evidence: Evidence) -> Ending:
    shared = "check that the run directory is on storage that all nodes share"
    refused = {node: error for node, error in evidence.refused.items() if node in evidence.silent}
    found = [(node, f"no agent could start there ({error}); {shared}") for node, error in refused.items()]
    return _blame_nodes(evidence, refused, found)


def _judge_silence(evidence: Evidence) -> Ending:
    message = evidence.silence_message or "the ranks ended without an outcome"
    code = f" (srun ended with {evidence.exit_code})" if evidence.exit_code is not None else ""
    return evidence.ended(Cause.INFRASTRUCTURE, f"{message}{code}")


# The first rule that applies decides.
RULES: tuple[Rule, ...] = (
    # Rank 0 reports the end once everything is saved: how processes end afterwards, or what the scheduler does, changes nothing.
    Rule("training_ended", lambda e: e.journal.training is not None, _judge_training),
    # A person wanted the end. What fails while the ranks are stopped is no reason to run again, so this precedes all failures.
    Rule(
        "cancelled",
        lambda e: e.is_cancelled,
        lambda e: Ending(Cause.CANCELLED, e.step, f"cancelled at step {e.step} without saving"),
    ),
    # The ranks were never started: records of failures and of a stop can only be consequences.
    Rule("failed_node_checks", lambda e: bool(e.problems), _judge_node_checks),
    # It would happen again wherever the run continues, so it precedes whatever took the machines away meanwhile.
    Rule(
        "user_error",
        lambda e: e.first is not None and e.first.kind in _FINAL and e.first.rank is not None,
        lambda e: e.ended(Cause.USER_ERROR, _describe_failure(e.first)),
    ),
    # The agents ended the ranks, and the scheduler the agents: failures after that are consequences. What the agents did is more
    # exact than the scheduler's state, which has a cause for both.
    Rule("killed_after_grace_period", lambda e: any(one.stopped and one.killed for one in e.ended_nodes), _judge_killed),
    Rule("taken_by_scheduler", lambda e: e.state in _TAKEN, _judge_taken),
    # A job is also requeued when one of its nodes is lost, or by a person after a failure: it explains the end only where no node
    # was lost, and no rank failed by itself.
    Rule(
        "requeued",
        lambda e: (
            e.state in _REQUEUED
            and not any(node in e.failed_nodes for node in e.attempt.nodes)
            and (e.is_consequence or e.by_signal or (e.first is not None and e.first.rank is None))
        ),
        lambda e: e.ended(Cause.PREEMPTED, f"the job was requeued at step {e.step} without saving"),
    ),
    # Ranks that have nothing to save end by the agents' signal itself, which is no failure. One node that was asked to stop
    # speaks for the silent ones: the same request ended them.
    Rule(
        "stopped_before_training",
        lambda e: any(one.stopped for one in e.ended_nodes) and (e.first is None or e.first.exit_code in (-CANCEL, -PREEMPT)),
        _judge_stopped,
    ),
    # Of several nodes one was lost, and the others failed because of that, or at the same time: machines precede exceptions.
    Rule("failure_beside_silent_nodes", lambda e: e.first is not None and bool(e.silent), _judge_lost_node),
    # Every node left a record, so the first failure is the cause. Agents that could not start their ranks name nodes to avoid,
    # which the general rule for failures does not.
    Rule(
        "agent_without_ranks",
        lambda e: e.first is not None and e.first.rank is None and e.first.kind in _NODE_ERRORS,
        _judge_agents,
    ),
    Rule("failure", lambda e: e.first is not None, _judge_failure),
    # No node has reported anything but silence. Without srun's own exit code its errors may be consequences of a lost node.
    Rule(
        "no_agent_could_start",
        lambda e: e.exit_code is not None and any(node in e.silent for node in e.refused),
        _judge_refused,
    ),
    # Nothing else is known.
    Rule("silence", lambda e: True, _judge_silence),
)


def find_rule(evidence: Evidence) -> Rule:
    """Return the rule that decides why an attempt ended."""
    return next(rule for rule in RULES if rule.applies(evidence))


def _join_findings(found: Iterable[tuple[str, str]]) -> str:
    """Return what was found, as pairs of node and finding, in one text of limited length; what nodes share is said once."""
    nodes_of: dict[str, dict[str, None]] = {}
    for node, finding in found:
        nodes_of.setdefault(finding, {})[node] = None
    texts = [f"{list_first([*nodes], _NODES_SHOWN)}: {finding}" for finding, nodes in nodes_of.items()]
    return list_first(texts, _FINDINGS_SHOWN, "; ")


def _blame_nodes(evidence: Evidence, unfit: Collection[str], found: Iterable[tuple[str, str]]) -> Ending:
    """If most nodes are unfit, the cause lies elsewhere, and excluding them would not help."""
    nodes = tuple(dict.fromkeys(evidence.attempt.nodes))
    bad_nodes = tuple(node for node in nodes if node in unfit)
    message = _join_findings(found)
    if len(bad_nodes) > max(1, len(nodes) // 2):
        return evidence.ended(Cause.USER_ERROR, message)
    return evidence.ended(Cause.BAD_NODE, message, bad_nodes)


def _describe_failure(failure: FailureRecord | None) -> str:
    return "" if failure is None else f"{failure.source}: {failure.message}"


def judge(run: RunDir, number: int, attempt: Attempt, lead_s: float, evidence: Evidence) -> Ending:
    """Return why attempt `number` of a managed run ended; `lead_s` is how long before its end the job is asked to save."""
    state = journal.read_state(run, number)
    evidence = replace(
        evidence,
        silence={**{attempt.nodes[node]: text for node, text in state.lost.items()}, **evidence.silence},
        attempt=attempt,
        journal=state,
        step=newest_trained_step(run, run_store.read_status(run)),
        is_cancelled=run.cancel(number).is_file() or evidence.state == "CANCELLED",
        lead_s=lead_s,
    )
    ending = find_rule(evidence).judge(evidence)
    if ending.cause is not Cause.INFRASTRUCTURE:
        return ending
    if evidence.is_out_of_memory:
        return replace(ending, message=f"a memory limit was exceeded (raise cluster.additional_parameters.mem): {ending.message}")
    silent = [node for node in range(len(attempt.nodes)) if node not in evidence.journal.nodes]
    limit = limit_that_killed_agents(run, number, silent)
    return replace(ending, message=f"{limit}: {ending.message}") if limit and limit not in ending.message else ending


def judge_local(run: RunDir, attempt: int, node: NodeEnded) -> AttemptConcluded:
    """Return how an attempt on this machine ended, by the same table; only a person stops a run here, and nothing restarts it.

    `node` is the record of the node's agent, which a full disk may keep from the journal.
    """
    evidence = Evidence(
        stops_mean=Cause.CANCELLED,
        attempt=Attempt(None, nodes=(node.host,)),
        journal=journal.fold([*journal.read(run, attempt), node]),
        step=newest_trained_step(run, run_store.read_status(run)),
    )
    ending = find_rule(evidence).judge(evidence)
    states = retry.FINAL | {Cause.PREEMPTED: "preempted"}
    message, state = ending.message, states.get(ending.cause, "failed")
    if ending.cause is Cause.CANCELLED and evidence.journal.training is None:
        checkpoints = store.list_checkpoints(run.checkpoints)
        newest = f"the newest checkpoint is of step {checkpoints[-1].step}" if checkpoints else "there is no checkpoint"
        message = f"{message}; {newest}"
    elif state == "failed" and ending.first_failure is not None:
        message = "; ".join(filter(None, (message, describe_repetition(run, attempt, ending.first_failure))))
    return AttemptConcluded(
        state=state, cause=ending.cause, step=ending.step, message=message, first_failure=ending.first_failure
    )


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
        """Record the verdict, and an alert for an attempt that did not end as planned."""
        release_disk_space(run, number)
        write_if_possible(lambda: journal.append(run, number, self.verdict()))
        if (alert := self.alert) is not None:
            write_if_possible(lambda: append_event(run, number, "alert", alert, self.ending.step))

    def end_attempt(self, run: RunDir, number: int) -> None:
        """Write the conclusion, and the state of the run that follows from it."""
        self.write(run, number)
        state, step = self.decision.state, self.ending.step
        write_if_possible(lambda: run_store.update_status(run, state=state, step=step, message=self.message))
        write_if_possible(lambda: print(f"attempt {number}: {self.ending.cause}: {self.message}", flush=True))

    def verdict(self, decided: bool = True) -> AttemptConcluded:
        """Return the event for the journal; `decided` is False if the next start of the run makes the decision."""
        return AttemptConcluded(
            state=self.decision.state if decided else "failed",
            step=self.ending.step,
            message=self.ending.message,
            cause=self.ending.cause,
            began_step=self.ended.began_step,
            saved_step=self.ended.saved_step,
            bad_nodes=self.ending.bad_nodes,
            first_failure=self.ending.first_failure,
            # A later start cannot know when the attempt ended.
            ended_at=clock.now() if decided else None,
        )


def conclude(run: RunDir, number: int, attempt: Attempt, section: ManagedSection, evidence: Evidence) -> Conclusion:
    """Judge attempt `number` and decide what follows."""
    ending = judge(run, number, attempt, section.save_lead_s or 0.0, evidence)
    saved_step = store.newest_step(run.checkpoints)
    ended = AttemptEnd(ending.cause, attempt.resume_step, saved_step, ending.message, ending.bad_nodes)
    ended = _add_failures(run, number, ended, ending.first_failure)
    return Conclusion(ending, ended, decide(ended, history(run, number), section))


def end_of_attempt(run: RunDir, number: int, section: ManagedSection, evidence: Evidence) -> AttemptEnd:
    """Return how attempt `number` ended: as recorded, or else by judging and recording it now.

    Of an attempt that is judged now, it sends the alert if the run continues; otherwise that of the run's end follows.
    """
    if (ended := _read_end(run, number)) is not None:
        return ended
    conclusion = conclude(run, number, run_store.read_attempt(run, number), section, evidence)
    journal.append(run, number, conclusion.verdict(decided=False))
    if conclusion.decision.again and (alert := conclusion.alert) is not None:
        write_if_possible(lambda: append_event(run, number, "alert", alert))
    return conclusion.ended


def history(run: RunDir, number: int) -> list[AttemptEnd]:
    """Return the ends of the attempts before `number`, back to the one that a person started, oldest first."""
    ends: list[AttemptEnd] = []
    while number > 1 and (attempt := run_store.find_attempt(run, number)) is not None and attempt.automatic:
        number -= 1
        if (ended := _read_end(run, number)) is not None:
            ends.insert(0, ended)
    return ends


def _read_end(run: RunDir, number: int) -> AttemptEnd | None:
    verdict = journal.read_end(run, number)
    if verdict is None:
        return None
    ended = AttemptEnd(verdict.cause, verdict.began_step, verdict.saved_step, verdict.message, verdict.bad_nodes)
    return _add_failures(run, number, ended, verdict.first_failure)


def _add_failures(run: RunDir, number: int, ended: AttemptEnd, failure: FailureRecord | None) -> AttemptEnd:
    """Return the end of attempt `number` with the exceptions of its last ranks and of the ranks that were restarted."""
    restarts = tuple(
        RestartedRanks(failure_record.exception_of(restart.first_failure), restart.first_failure.step, restart.saved_step)
        for restart in journal.read_restarts(run, number)
    )
    if failure is None or ended.cause is not Cause.FAILURE:
        return replace(ended, restarts=restarts)
    return replace(ended, exception=failure_record.exception_of(failure), step=failure.step, restarts=restarts)


def describe_repetition(run: RunDir, number: int, failure: FailureRecord) -> str:
    """Return why the ranks of attempt `number` would fail again after this failure, by plan.retry; empty if they may not."""
    attempt, saved_step = run_store.read_attempt(run, number), store.newest_step(run.checkpoints)
    ended = _add_failures(run, number, AttemptEnd(Cause.FAILURE, attempt.resume_step, saved_step), failure)
    return retry.describe_repetition([*history(run, number), ended])


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
    """Free the space before the records are written."""
    with suppress(OSError):
        _reserve_path(run, attempt).unlink()


def _reserve_path(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / ".reserve"
