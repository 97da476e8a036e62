"""The checks of a node: before a run starts, and for `launcher doctor`.

`python -m launcher.worker.checks.node_check [NAME] < CONFIG.json` prints doctor's report of one machine. Before a start, every
node reads the reports of all nodes, so that all reach the same verdict and can name a node that does not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from launcher import nvml
from launcher.child_process import die_with_parent
from launcher.clusters.check_results import OK, WARNING, CheckResult, MachineReport, failure, to_lines, with_differences
from launcher.clusters.network import node_name
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, Problem, RunError, describe
from launcher.hardware import may_use_gpus
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs import json_records
from launcher.tracking.jsonl import append_event
from launcher.worker.checks import gpus, machine
from launcher.worker.checks.machine import CheckedNode, kill_children

if TYPE_CHECKING:
    from torch.distributed import Store

# A published report can be read in one round trip; a timeout of zero would wait forever.
_SHORTEST_WAIT_S = 0.1
_SHORT_S, _LONG_S = 60.0, 240.0


@dataclass(frozen=True)
class Check:
    """One row of the table: failures of a check before a start refuse it, warnings are alerts of the run."""

    name: str
    function: Callable[[CheckedNode], Iterator[CheckResult]]
    deadline_s: float
    runs: Literal["always", "doctor", "start"] = "always"


# To add a check, add a function to a module of this folder, and a row.
CHECKS = (
    Check("machine", machine.check_memory, _SHORT_S),
    Check("network", machine.check_adapters, _SHORT_S),
    Check("packages", machine.check_packages, _SHORT_S),
    Check("run.root", machine.check_run_storage, _LONG_S),
    Check("inputs", machine.check_inputs, _SHORT_S, "start"),
    Check("/dev/shm", machine.check_shared_memory, _SHORT_S),  # noqa: S108
    Check("compiler", machine.check_build_tools, _SHORT_S),
    Check("GPUs", gpus.check_gpus, 2 * _SHORT_S),
    Check("torch", gpus.check_torch, _LONG_S, "doctor"),
    Check("kernels", machine.check_kernels, _LONG_S, "doctor"),
    Check("all-reduce", gpus.check_all_reduce, _LONG_S, "doctor"),
)


def run_checks(node: CheckedNode, names: Sequence[str] = ()) -> Iterator[CheckResult]:
    """Yield the results of all checks, or of those in `names`. In parallel, they would disturb each other's measurements."""
    skipped = "start" if node.plan is None else "doctor"
    for check in CHECKS:
        if check.runs == skipped or (names and check.name not in names):
            continue
        if check.name == "GPUs" and node.plan is not None and node.device == "cpu":
            continue
        yield from run_check(check, node)


def run_check(check: Check, node: CheckedNode) -> list[CheckResult]:
    """Return the results of one check under its name, with a failure if it raises or misses its deadline."""
    results: list[CheckResult] = []

    def collect() -> None:
        try:
            results.extend(check.function(node))
        # A broken machine may make a check raise anything; the other checks must still report.
        except Exception as error:
            results.append(failure(f"the check failed: {describe(error)}", "look at this part of the machine"))

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(check.deadline_s)
    found = [*results]
    if thread.is_alive():
        seen = f"no answer within {check.deadline_s:.0f} s: a device, a driver or a mount may hang"
        found.append(failure(seen, "look at dmesg, nvidia-smi and df on this machine"))
    return [replace(result, name=check.name) for result in found]


def check_node(plan: LaunchPlan, attempt: int) -> MachineReport:
    """Check this node for an attempt; what makes it slow is an alert."""
    node = CheckedNode(plan.config, plan.topology.device, plan.topology.ranks_per_node, plan, attempt)
    results = tuple(run_checks(node))
    send_alerts((result for result in results if result.verdict == WARNING), node)
    return MachineReport(node_name(), results)


def report_gpu_findings(plan: LaunchPlan, attempt: int) -> None:
    """Send an alert about what is wrong with this machine's GPUs and its shared memory; refuse nothing.

    For runs on this machine alone: a person may share a GPU with a process of their own, or name another type for an unknown GPU.
    """
    node = CheckedNode(plan.config, "cuda", plan.topology.ranks_per_node, plan, attempt)
    send_alerts(run_checks(node, ("/dev/shm", "GPUs")), node)  # noqa: S108


def send_alerts(results: Iterable[CheckResult], node: CheckedNode) -> None:
    """Send an alert about each result that is not ok."""
    for result in results:
        # Another check reports a run directory that cannot be written.
        with contextlib.suppress(OSError):
            if result.verdict != OK:
                append_event(node.run, node.attempt, "alert", f"{node_name()}: {result.seen}: {result.remedy}")


def exchange(store: Store, report: MachineReport, hosts: Sequence[str], node: int, deadline_s: float) -> list[Problem]:
    """Publish this node's report, read all others, and return the problems of all nodes in the order of `hosts`.

    `node` is this node's index in `hosts`. Node 0 may host the store, and returns last.
    """
    deadline = time.monotonic() + deadline_s
    try:
        store.set(f"node-check/{node}", json.dumps(json_records.encode(report)))
        reported = [index for index in range(len(hosts)) if _await_key(store, f"node-check/{index}", deadline)]
        answers = {index: json.loads(store.get(f"node-check/{index}")) for index in reported}
        store.set(f"node-check/{node}/done", "")
        if node == 0:
            for index in reported:
                _await_key(store, f"node-check/{index}/done", deadline)
    except RuntimeError as error:
        raise RunError(
            "the connection to the head node broke while the nodes were checked",
            where=report.machine,
            value=str(error).splitlines()[0],
            remedy=f"check whether {hosts[0]} still runs; the network between the nodes may be unstable",
        ) from None
    reports = [json_records.decode(MachineReport, answer, "the store") for answer in answers.values()]
    compared = dict(zip(answers, with_differences(reports), strict=True))
    problems: list[Problem] = []
    for index, host in enumerate(hosts):
        if index in compared:
            problems += compared[index].problems
        else:
            remedy = "look at its log, or run without this node"
            problems.append(Problem(f"the node did not report within {deadline_s:g} s", where=host, remedy=remedy))
    return problems


def _await_key(store: Store, key: str, deadline: float) -> bool:
    from torch.distributed import DistStoreError

    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), _SHORTEST_WAIT_S)))
    except DistStoreError:
        return False
    return True


def main(name: str) -> None:
    """Print doctor's report of this machine, under the scheduler's name for it."""

    def end(*_: Any) -> None:
        # Files that a check created are removed at exit.
        kill_children(os.getpid())
        sys.exit(EXIT_FAILED)

    signal.signal(signal.SIGTERM, end)
    # The parent is the command, or the Ray worker, that requested the report.
    die_with_parent(signal.SIGTERM)
    config = RunConfig.model_validate_json(sys.stdin.read())
    num_gpus = 0
    # The check of the GPUs reports a driver that does not answer.
    with contextlib.suppress(nvml.NvmlError):
        num_gpus = len(nvml.list_gpus()) if may_use_gpus() else 0
    device = "cuda" if num_gpus or config.cluster.gpu_type else "cpu"
    node = CheckedNode(config, device, config.cluster.ranks_per_node or num_gpus or 1)
    print("\n".join(to_lines(MachineReport(name, tuple(run_checks(node))))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else node_name())
    # A check that hangs in the kernel must not keep the process alive.
    os._exit(0)
