"""Why an attempt on several nodes ended, told from what its nodes left behind and from what Slurm or Ray says of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher import json_records, run_store
from launcher.errors import WOULD_REPEAT
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.metrics_tail import newest_step
from launcher.worker import failure_record
from launcher.worker.checks import node_check

# Slurm sends its signal up to a minute before the lead begins.
_SIGNAL_SPREAD_S = 90.0
# As in `srun: error: n1: task 1: Exited with exit code 7`; a task that a signal ended is another matter.
_SRUN_ERROR = re.compile(r"srun: error: ([\w.-]+): tasks? [\d,-]+: (Exited with exit code \d+)")
# The words of Slurm's accounting, of its cgroup plugin, and of the kernel.
_OUT_OF_MEMORY = re.compile(r"exceeded memory limit|oom_kill|oom-kill|Out Of Memory", re.IGNORECASE)
_FINAL = tuple(kind.__name__ for kind in WOULD_REPEAT)
# An agent says so before it starts its ranks: its node lacks something.
_NODE_ERRORS = ("RunError", "SlurmError")
# What gloo, NCCL and the kernel say where the other end of a connection is gone: the consequence of another failure.
_PEER_LOST = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection timed out|no route to host"
    r"|remote process exited|ncclRemoteError|unhandled system error|ncclSystemError",
    re.IGNORECASE,
)
# What CUDA and the driver say of a GPU, and the kernel of shared storage, that has failed. A full disk is none of these.
_HARDWARE = re.compile(
    r"uncorrectable ECC|\bXid\b|fallen off the bus|GPU is lost|stale file handle|input/output error|ESTALE|\bEIO\b",
    re.IGNORECASE,
)
# Slurm's words for a job whose machines it took, and the word for workers that are gathered anew because there are more.
_TAKEN = {"TIMEOUT": Cause.TIME_LIMIT, "PREEMPTED": Cause.PREEMPTED, "RESIZED": Cause.RESIZED}


@dataclass(frozen=True)
class Ending:
    """Why and at which step an attempt ended, in words; `first_failure` is the record of the rank that failed first."""

    cause: Cause
    step: int
    message: str
    bad_nodes: tuple[str, ...] = ()
    first_failure: dict[str, Any] | None = None


def read(
    run: RunDir,
    number: int,
    attempt: Attempt,
    state: str,
    lead_s: float,
    exit_code: int | None,
    gone: Collection[str] | None = None,
) -> Ending:
    """Judge how attempt `number` ended, with a word about memory where that was what it lacked; see `_judged`."""
    found = _judged(run, number, attempt, state, lead_s, exit_code, gone)
    if found.cause is Cause.INFRASTRUCTURE and _OUT_OF_MEMORY.search(_output(run, number, attempt)):
        return replace(found, message=f"{found.message}; a memory limit was exceeded: raise cluster.mem")
    return found


def _judged(
    run: RunDir,
    number: int,
    attempt: Attempt,
    state: str,
    lead_s: float,
    exit_code: int | None,
    gone: Collection[str] | None,
) -> Ending:
    """`state` is Slurm's word for the job, `exit_code` srun's, None where the job left no word.

    `gone` are those of its nodes that Ray has lost, None where that is not known.
    """
    step = newest_step(run, run_store.read_status(run))
    outcome = run.attempt(number) / "outcome.json"
    nodes = {node: _record(run, number, node) for node in range(len(attempt.nodes))}
    left = [found for found in nodes.values() if found is not None]
    cancelled = run.cancel(number).is_file() or state == "CANCELLED"
    if outcome.is_file():
        interruption = _interruption(attempt, lead_s, outcome.stat().st_mtime)
        interruption = Cause.CANCELLED if cancelled else Cause.RESIZED if state == "RESIZED" else interruption
        return _by_outcome(json_records.read_json(outcome), interruption)
    if cancelled:
        return Ending(Cause.CANCELLED, step, f"cancelled at step {step} without saving")
    if problems := [problem for found in left for problem in found.get("problems", ())]:
        return _by_problems(problems, attempt, step)
    failed = [(attempt.nodes[node], found["first_failure"]) for node, found in nodes.items() if found and found["first_failure"]]
    lost = list(dict.fromkeys(attempt.nodes[node] for node, found in nodes.items() if found is None))
    first = _first([failure for _, failure in failed])
    if first is not None and first["kind"] in _FINAL and first["rank"] is not None:
        return Ending(Cause.USER_ERROR, step, _words(first), first_failure=first)
    taken = _TAKEN.get(state)
    if killed := [found["ended_at"] for found in left if found["stopped"] and found.get("killed")]:
        cause = taken or _interruption(attempt, lead_s, min(killed))
        return Ending(cause, step, f"killed at step {step}: it had not stopped in the time it was given", first_failure=first)
    if taken is not None:
        what = "the workers were gathered anew" if taken is Cause.RESIZED else f"the job ended as {state}"
        return Ending(taken, step, f"{what} at step {step} without saving", first_failure=first)
    if first is not None:
        return _by_failure(first, dict(failed), _without_word(lost, gone), attempt, step)
    if stopped := [found["ended_at"] for found in left if found["stopped"]]:
        return Ending(_interruption(attempt, lead_s, min(stopped)), step, "stopped before training had begun")
    if exit_code is not None and (refused := _refused(run, number, attempt, nodes)):
        return _by_refusals(refused, attempt, step)
    what = _without_word(lost, gone) or "the ranks ended without an outcome"
    code = f" (srun ended with {exit_code})" if exit_code is not None else ""
    return Ending(Cause.INFRASTRUCTURE, step, f"{what}{code}")


def _record(run: RunDir, number: int, node: int) -> dict[str, Any] | None:
    file = failure_record.node_file(run, number, node)
    return json_records.read_json(file) if file.is_file() else None


def _without_word(nodes: Sequence[str], gone: Collection[str] | None) -> str:
    """What is said of nodes that left no record; where one is lost, Ray ends the workers of all before they can leave theirs."""
    if not nodes:
        return ""
    if gone is None:
        return f"no word from {', '.join(nodes)}"
    lost = [node for node in nodes if node in gone]
    return f"Ray has lost {', '.join(lost)}" if lost else f"no word from {', '.join(nodes)}, which Ray still has"


def _by_outcome(outcome: Mapping[str, Any], interruption: Cause) -> Ending:
    """The ranks' own word; why they were interrupted they do not know: scancel's TERM comes as it comes when machines go."""
    causes = {"completed": Cause.COMPLETED, "cancelled": Cause.CANCELLED, "limit": Cause.LIMIT, "preempted": interruption}
    return Ending(causes[outcome["reason"]], outcome["step"], outcome["message"])


def _interruption(attempt: Attempt, lead_s: float, at: float) -> Cause:
    """What took the machines away at that time; the judgement itself may be made by the next start, hours later."""
    near = attempt.ends_at is not None and at > attempt.ends_at - lead_s - _SIGNAL_SPREAD_S
    return Cause.TIME_LIMIT if near else Cause.PREEMPTED


def _by_problems(problems: Sequence[Mapping[str, str]], attempt: Attempt, step: int) -> Ending:
    said = [f"{problem['where']}: {problem['what']} {problem['value']}".strip() for problem in problems]
    named = {problem["where"] for problem in problems if not problem["what"].startswith(node_check.NO_ROOM)}
    if not named:
        return Ending(Cause.FAILURE, step, "; ".join(dict.fromkeys(said)))
    return _by_nodes(named, said, attempt, step)


def _by_refusals(refused: Mapping[str, str], attempt: Attempt, step: int) -> Ending:
    shared = "is the run directory on storage that it shares?"
    said = [f"{node}: no agent could start there ({what}); {shared}" for node, what in refused.items()]
    return _by_nodes(set(refused), said, attempt, step)


def _by_nodes(named: set[str], said: Sequence[str], attempt: Attempt, step: int) -> Ending:
    """Nodes that are unfit; where most of them are, it is not the nodes, and leaving them out would not help."""
    nodes = tuple(dict.fromkeys(attempt.nodes))
    bad = tuple(node for node in nodes if node in named)
    message = "; ".join(dict.fromkeys(said))
    if len(bad) > max(1, len(nodes) // 2):
        return Ending(Cause.USER_ERROR, step, message)
    return Ending(Cause.BAD_NODE, step, message, bad)


def marker(number: int, nodes: Sequence[str]) -> str:
    """The line of a job's output with which an attempt begins; the output of all starts of a job is one file."""
    return f"attempt {number} begins on {', '.join(nodes)}"


def _refused(run: RunDir, number: int, attempt: Attempt, nodes: Mapping[int, Any]) -> dict[str, str]:
    """Nodes whose task ended by itself before its agent could leave a record, with srun's words."""
    return {
        node: what
        for node, what in _SRUN_ERROR.findall(_output(run, number, attempt))
        if node in attempt.nodes and nodes.get(attempt.nodes.index(node)) is None
    }


def _output(run: RunDir, number: int, attempt: Attempt) -> str:
    """What the job has printed since the attempt began."""
    output = run.jobs / str(attempt.job) / f"{attempt.job}_0_log.out"
    text = output.read_text(errors="replace") if output.is_file() else ""
    return text.rpartition(marker(number, attempt.nodes))[2]


def _first(failures: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The failure that the others followed from."""

    def order(failure: Mapping[str, Any]) -> tuple[bool, bool, bool, float]:
        # A rank's own word comes before the agents' about each other, and clocks of nodes differ: times come last.
        consequence = _PEER_LOST.search(failure["message"]) is not None
        return failure["rank"] is None, failure["kind"] != "killed", consequence, failure["at"] or 0.0

    return min(failures, key=order, default=None)


def _words(failure: Mapping[str, Any]) -> str:
    who = "a node's agent" if failure["rank"] is None else f"rank {failure['rank']}"
    return f"{who}: {failure['message']}"


def _by_failure(
    first: dict[str, Any], failures: Mapping[str, Mapping[str, Any]], lost: str, attempt: Attempt, step: int
) -> Ending:
    """A failure that is no mistake of the user's; `failures` by node, `lost` tells of the nodes that left no record."""
    words = _words(first)
    if lost:
        return Ending(Cause.INFRASTRUCTURE, step, f"{words}; {lost}", first_failure=first)
    if first["rank"] is None and first["kind"] in _NODE_ERRORS:
        said = {node: f"{node}: {found['message']}" for node, found in failures.items() if found["kind"] in _NODE_ERRORS}
        found = _by_nodes(set(said), list(said.values()), attempt, step)
        # Where most nodes do not meet, it may be the head node's port or network at that moment: it may be another one next.
        cause = Cause.INFRASTRUCTURE if found.cause is Cause.USER_ERROR else found.cause
        return replace(found, cause=cause, first_failure=first)
    machines = first["rank"] is None or first["kind"] == "killed"
    machines = machines or _PEER_LOST.search(first["message"]) or _HARDWARE.search(first["message"])
    return Ending(Cause.INFRASTRUCTURE if machines else Cause.FAILURE, step, words, first_failure=first)
