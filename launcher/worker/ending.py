"""Why an attempt on several nodes ended, told from what its nodes left behind and from what Slurm says of the job."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher import run_store
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.run_store import Attempt
from launcher.worker import record

# Slurm sends its signal up to a minute before the lead begins.
_SIGNAL_SPREAD_S = 90.0
# As in `srun: error: n1: task 1: Exited with exit code 7`; a task that a signal ended is another matter.
_SRUN_ERROR = re.compile(r"srun: error: ([\w.-]+): tasks? [\d,-]+: (Exited with exit code \d+)")
# The words of Slurm's accounting, of its cgroup plugin, and of the kernel.
_OUT_OF_MEMORY = re.compile(r"exceeded memory limit|oom_kill|oom-kill|Out Of Memory", re.IGNORECASE)
# A repetition would end in the same way.
_USER_ERRORS = ("ConfigError", "DataError", "RunError")


@dataclass(frozen=True)
class Ending:
    """Why and at which step an attempt ended, in words; `first_failure` is the record of the rank that failed first."""

    cause: Cause
    step: int
    message: str
    bad_nodes: tuple[str, ...] = ()
    first_failure: dict[str, Any] | None = None


def read(run: RunDir, number: int, attempt: Attempt, state: str, lead_s: float, exit_code: int | None) -> Ending:
    """Judge how attempt `number` ended, with a word about memory where that was what it lacked; see `_judged`."""
    found = _judged(run, number, attempt, state, lead_s, exit_code)
    if found.cause is Cause.INFRASTRUCTURE and _OUT_OF_MEMORY.search(_output(run, number, attempt)):
        return replace(found, message=f"{found.message}; the job's memory limit was exceeded: raise cluster.mem")
    return found


def _judged(run: RunDir, number: int, attempt: Attempt, state: str, lead_s: float, exit_code: int | None) -> Ending:
    """`state` is Slurm's word for the job, `exit_code` srun's, None where the job left no word."""
    step = run_store.read_status(run).step
    outcome = run.attempt(number) / "outcome.json"
    nodes = {node: _record(run, number, node) for node in range(len(attempt.nodes))}
    left = [found for found in nodes.values() if found is not None]
    cancelled = (run.attempt(number) / "cancel.json").is_file() or state == "CANCELLED"
    if outcome.is_file():
        interruption = _interruption(attempt, lead_s, outcome.stat().st_mtime)
        return _by_outcome(run_store.read_json(outcome), Cause.CANCELLED if cancelled else interruption)
    if cancelled:
        return Ending(Cause.CANCELLED, step, f"cancelled at step {step} without saving")
    if problems := [problem for found in left for problem in found.get("problems", ())]:
        return _by_problems(problems, attempt, step)
    failures = [found["first_failure"] for found in left if found["first_failure"] is not None]
    if failures:
        return _by_failure(failures, step)
    if stopped := [found["ended_at"] for found in left if found["stopped"]]:
        return Ending(_interruption(attempt, lead_s, min(stopped)), step, "stopped before training had begun")
    if exit_code is not None and (refused := _refused(run, number, attempt, nodes)):
        return _by_refusals(refused, attempt, step)
    lost = [attempt.nodes[node] for node, found in nodes.items() if found is None]
    what = f"no word from {', '.join(lost)}" if lost else "the ranks ended without an outcome"
    code = f" (srun ended with {exit_code})" if exit_code is not None else ""
    return Ending(Cause.INFRASTRUCTURE, step, f"{what}{code}")


def _record(run: RunDir, number: int, node: int) -> dict[str, Any] | None:
    file = record.node_file(run, number, node)
    return run_store.read_json(file) if file.is_file() else None


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
    return _by_nodes({problem["where"] for problem in problems}, said, attempt, step)


def _by_refusals(refused: Mapping[str, str], attempt: Attempt, step: int) -> Ending:
    shared = "is the run directory on storage that it shares?"
    said = [f"{node}: no agent could start there ({what}); {shared}" for node, what in refused.items()]
    return _by_nodes(set(refused), said, attempt, step)


def _by_nodes(named: set[str], said: Sequence[str], attempt: Attempt, step: int) -> Ending:
    """Nodes that are unfit; where most of them are, it is not the nodes, and leaving them out would not help."""
    bad = tuple(node for node in attempt.nodes if node in named)
    message = "; ".join(dict.fromkeys(said))
    if len(bad) > max(1, len(attempt.nodes) // 2):
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


def _by_failure(failures: Sequence[dict[str, Any]], step: int) -> Ending:
    # A rank's own word comes before the agents' about each other.
    first = min(failures, key=lambda failure: (failure["rank"] is None, failure["kind"] != "killed", failure["at"] or 0.0))
    who = "a node's agent" if first["rank"] is None else f"rank {first['rank']}"
    if first["kind"] in _USER_ERRORS and first["rank"] is not None:
        cause = Cause.USER_ERROR
    elif first["rank"] is None or first["kind"] == "killed":
        cause = Cause.INFRASTRUCTURE
    else:
        cause = Cause.FAILURE
    return Ending(cause, step, f"{who}: {first['message']}", first_failure=first)
