"""This machine: the node agent as a detached process, found again by its process id and start time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from launcher import run_store
from launcher.config.cluster import ClusterSection
from launcher.errors import RunError, SubmitError
from launcher.facts import device
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_store import RUNNING_STATES, Status

_START_DEADLINE_S = 60.0
_END_DEADLINE_S = 30.0
_APART_S = 0.3


class LocalCluster:
    ask_s = 0.1

    def device(self, section: ClusterSection) -> DeviceFacts:
        return device()

    def check(self, plan: LaunchPlan) -> None:
        topology = plan.topology
        if topology.nodes > 1:
            raise SubmitError(
                f"cluster=local is this one machine, and the plan asks for {topology.nodes} nodes",
                where="cluster.nodes",
                value=str(topology.nodes),
                remedy="set cluster.nodes=1; `plan` shows a run of several nodes without starting it",
            )
        here = device()
        num_gpus = here.count if here.kind == "cuda" else 0
        if topology.device == "cuda" and topology.ranks_per_node > num_gpus:
            raise SubmitError(
                f"the plan asks for {topology.ranks_per_node} GPUs and this machine has {num_gpus or 'none'}",
                where="cluster.ranks_per_node",
                value=str(topology.ranks_per_node),
                remedy="set cluster.ranks_per_node and cluster.gpu_type to what is here",
            )
        states = plan.config.deepspeed
        if "nvme" in (states.offload_optimizer, states.offload_params) and not Path(states.nvme_path or "").is_dir():
            raise SubmitError(
                "this machine has no such folder for states on NVMe",
                where="deepspeed.nvme_path",
                value=str(states.nvme_path),
                remedy="set it to a folder on a local NVMe disk, or use deepspeed=zero3_offload",
            )
        needed = plan.memory.host_per_node_gib
        if topology.device == "cpu" and here.host_memory_gib and needed > here.host_memory_gib:
            raise SubmitError(
                f"model states need {needed:.0f} GiB and this machine has {here.host_memory_gib:.0f} GiB of memory",
                where="model.path",
                remedy="choose a smaller model or a machine with more memory",
            )

    def preview(self, plan: LaunchPlan) -> str | None:
        return None

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        log = run.attempt(attempt) / "agent.log"
        environment = {
            **os.environ,
            "PYTHONPATH": _with(run.code, os.environ.get("PYTHONPATH")),
            # The folder the user stands in may be a checkout; what was submitted is what runs.
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with open(log, "ab") as output:
            # A session of its own: closing the terminal or Ctrl-C does not reach the run by itself.
            process = subprocess.Popen(
                [sys.executable, "-m", "launcher.worker.agent", str(plan_path), str(attempt)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        _await_start(run, attempt, process)

    def started(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        return []

    def status(self, run: RunDir) -> Status:
        status = run_store.read_status(run)
        if status.state == "pending" and status.job is None and time.time() - status.updated_at > _START_DEADLINE_S:
            return replace(status, state="failed", message="it was never started: the command that made it ended before")
        if status.state not in RUNNING_STATES or status.job is None or status.job.get("host") != os.uname().nodename:
            return status
        if _agent(status) is not None:
            return status
        # The agent writes the last state just before it ends: look once more before calling it lost.
        status = run_store.read_status(run)
        if status.state not in RUNNING_STATES:
            return status
        return replace(
            status, state="failed", message="the node's agent is gone without a word (killed, or the machine restarted)"
        )

    def await_end(self, run: RunDir) -> None:
        agent = _agent(run_store.read_status(run))
        if agent is not None:
            try:
                agent.wait(_END_DEADLINE_S)
            except psutil.TimeoutExpired:
                agent.kill()

    def cancel(self, run: RunDir, save: bool = True) -> None:
        status = self.status(run)
        agent = _agent(status)
        if status.state not in RUNNING_STATES or agent is None:
            raise SubmitError(f"the run is not running: it is {status.state}", where=str(run.root))
        agent.send_signal(signal.SIGUSR1)
        if not save:
            # Two that are pending at once would be one.
            time.sleep(_APART_S)
            agent.send_signal(signal.SIGUSR1)


def _with(code: os.PathLike[str], path: str | None) -> str:
    return os.pathsep.join([os.fspath(code), *([path] if path else [])])


def _agent(status: Status) -> psutil.Process | None:
    """The agent's process, if it is still the one that wrote the status."""
    job = status.job or {}
    try:
        process = psutil.Process(int(job["pid"]))
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return process if alive and abs(process.create_time() - float(job["started"])) < 1 else None
    except (KeyError, psutil.NoSuchProcess):
        return None


def _await_start(run: RunDir, attempt: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the agent has announced itself, so that status and cancel work at once."""
    deadline = time.monotonic() + _START_DEADLINE_S
    while run_store.read_status(run).attempt != attempt:
        if process.poll() is not None or time.monotonic() > deadline:
            log = run.attempt(attempt) / "agent.log"
            if process.poll() is None:
                process.kill()
            run_store.update_status(run, state="failed", message="the node's agent did not start")
            raise RunError("the node's agent did not start", where=str(log), value=log.read_text(errors="replace")[-2000:])
        time.sleep(0.02)
