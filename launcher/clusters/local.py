"""The backend for this machine: the node agent runs as a detached process."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters import detached_process
from launcher.clusters.backends import (
    FAULT_DEADLINE_S,
    Cluster,
    InjectedFault,
    fault_command,
    read_fault_report,
)
from launcher.clusters.limits import limit_that_killed_agents
from launcher.errors import RunError, SubmitError
from launcher.hardware import device
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store

if TYPE_CHECKING:
    from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

# Ending takes a second, but far longer on a busy machine. An agent that is killed records no end.
_END_DEADLINE_S = 120.0
# The records of an attempt's end need more than this.
_FULL_BYTES = 64 * 1024


class LocalCluster(Cluster):
    """This machine; see `Cluster`."""

    status_interval_s = 0.1
    drill_remedy = None

    def check(self, plan: LaunchPlan) -> None:
        check_here(plan)

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        log = run.attempt(attempt) / "agent.log"
        detached_process.start(run, attempt, "launcher.worker.local", [str(plan_path), str(attempt)], log, "the node's agent")

    def explain_lost(self, run: RunDir) -> str:
        with suppress(OSError):
            if (free := shutil.disk_usage(run.root).free) < _FULL_BYTES:
                full = f"the disk of {run.root} is full ({format_size(free)} free)"
                return f"{full}: the node agent could not record how the run ended"
        if problem := run_store.describe_storage_problem(run):
            return f"the node agent ended without recording a result{problem}"
        if limit := limit_that_killed_agents(run, run_store.newest_attempt(run), [0]):
            return f"{limit}: the node agent ended without recording a result"
        return "the node agent ended without recording a result: it was killed, or the machine restarted"

    def await_end(self, run: RunDir) -> None:
        detached_process.await_end(run, _END_DEADLINE_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        detached_process.request_cancel(run, self.status(run), save)

    def inject_fault(self, run: RunDir, attempt: int, fault: str) -> InjectedFault:
        command = fault_command(run, attempt, fault)
        done = subprocess.run(command, capture_output=True, text=True, timeout=FAULT_DEADLINE_S)
        if done.returncode:
            raise RunError("the fault could not be injected", where=str(run.root), value=done.stderr.strip())
        return read_fault_report(done.stdout)


def check_here(plan: LaunchPlan) -> None:
    """Reject a plan that this machine cannot run."""
    topology = plan.topology
    if topology.nodes > 1:
        raise SubmitError(
            f"the plan needs {topology.nodes} nodes and this is one machine",
            where="cluster.nodes",
            value=str(topology.nodes),
            remedy="set cluster.nodes=1, or choose a cluster such as cluster=slurm; `plan` shows multi-node runs too",
        )
    here = device()
    require_gpus(plan, here)
    section = plan.config.deepspeed
    if "nvme" in (section.offload_optimizer, section.offload_params) and not Path(section.nvme_path or "").is_dir():
        raise SubmitError(
            "the folder for NVMe offload does not exist on this machine",
            where="deepspeed.nvme_path",
            value=str(section.nvme_path),
            remedy="set it to a folder on a local NVMe disk, or use deepspeed=zero3_offload",
        )
    needed = plan.memory.host_per_node_gib
    if topology.device == "cpu" and here.host_memory_gib and needed > here.host_memory_gib:
        raise SubmitError(
            f"model states need {needed:.0f} GiB and this machine has {here.host_memory_gib:.0f} GiB of memory",
            where="model.path",
            remedy="choose a smaller model or a machine with more memory",
        )


def require_gpus(plan: LaunchPlan, here: DeviceFacts) -> None:
    """Reject a plan for more GPUs on a node than this machine has."""
    topology, num_gpus = plan.topology, here.count if here.kind == "cuda" else 0
    if topology.device == "cuda" and topology.ranks_per_node > num_gpus:
        why = f" ({here.problem})" if here.problem else ""
        raise SubmitError(
            f"the plan asks for {topology.ranks_per_node} GPUs and this machine has {num_gpus or 'none'}{why}",
            where="cluster.ranks_per_node",
            value=str(topology.ranks_per_node),
            remedy="set cluster.ranks_per_node and cluster.gpu_type to what this machine has",
        )
