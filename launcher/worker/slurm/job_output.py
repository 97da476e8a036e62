"""Reads from a Slurm job's output on which nodes srun could not start an agent, and which agents or nodes it lost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, NodeRecord

# As in `srun: error: n1: task 1: Exited with exit code 7`. Tasks that a signal ended match the next pattern.
_SRUN_ERROR = re.compile(r"srun: error: ([\w.-]+): tasks? [\d,-]+: (Exited with exit code \d+)")
# As in `srun: error: n1: task 1: Killed`. The first such line is the cause: srun then ends the tasks on the other nodes.
_SRUN_SIGNAL = re.compile(r"srun: error: ([\w.-]+): tasks? [\d,-]+: (Killed|Segmentation fault|Aborted|Bus error|Out Of Memory)")
# As in `srun: error: Aborting, io error and missing step on node 1`; nodes are counted from 0.
_SRUN_MISSING = re.compile(r"srun: error: Aborting, .* on node (\d+)$", re.MULTILINE)
_SRUN_NODE_FAILURE = re.compile(r"Node failure on ([\w.-]+)")
# The terms of Slurm's accounting, its cgroup plugin and the kernel.
_OUT_OF_MEMORY = re.compile(r"exceeded memory limit|oom_kill|oom-kill|Out Of Memory", re.IGNORECASE)


def marker(number: int, nodes: Sequence[str]) -> str:
    """Return the line that begins an attempt in its job's output; one file holds the output of all starts of a job."""
    return f"attempt {number} begins on {', '.join(nodes)}"


def read_output(run: RunDir, number: int, attempt: Attempt) -> str:
    """Return what the job printed since the attempt began; empty if the attempt is not a Slurm job."""
    output = run.agent_log(number, str(attempt.job))
    text = output.read_text(errors="replace") if output.is_file() else ""
    return text.rpartition(marker(number, attempt.nodes))[2]


def exceeded_memory(output: str) -> bool:
    """Return whether a memory limit of the job ended processes."""
    return _OUT_OF_MEMORY.search(output) is not None


def find_failed_nodes(output: str) -> list[str]:
    """Return the nodes that Slurm has lost."""
    return _SRUN_NODE_FAILURE.findall(output)


def find_refusals(output: str, attempt: Attempt, by_node: Mapping[int, NodeRecord | None]) -> dict[str, str]:
    """Return srun's error for each node whose task exited by itself before its agent could leave a record."""
    return {
        node: error
        for node, error in _SRUN_ERROR.findall(output)
        if node in attempt.nodes and by_node.get(attempt.nodes.index(node)) is None
    }


def find_culprit(output: str, nodes: Sequence[str]) -> tuple[str, str]:
    """Return the node whose agent or slurmstepd was lost first, and what happened there; empty strings if srun names none.

    After either loss, srun itself ends the tasks on the other nodes.
    """
    if (missing := _SRUN_MISSING.search(output)) is not None and int(missing[1]) < len(nodes):
        return nodes[int(missing[1])], f"srun lost its slurmstepd on {nodes[int(missing[1])]}"
    if killed := _SRUN_SIGNAL.search(output):
        return killed[1], f"the agent of {killed[1]} was killed (srun: {killed[2]})"
    return "", ""
