"""Injects a fault into the processes of a run on this node: `python -m launcher.worker.fault_injection FAULT PLAN ATTEMPT`.

The drill (launcher.cli.drill) runs it on the node. It prints the injected fault as one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launcher import run_store
from launcher.clusters.faults import InjectedFault
from launcher.errors import EXIT_FAILED, LauncherError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.metrics_tail import newest_trained_step
from launcher.worker.ranks.rank_env import RankTitle

_HANG_DEADLINE_S = 25.0
_SETTLE_S = 0.5


@dataclass(frozen=True)
class NodeProcesses:
    """The processes of one attempt on this node; `ranks` is keyed by rank."""

    agent: psutil.Process
    ranks: dict[int, psutil.Process]

    @property
    def last_rank(self) -> tuple[int, psutil.Process]:
        return max(self.ranks.items())


def find(run: RunDir, attempt: int) -> NodeProcesses:
    """Find the agent and the ranks of `attempt` on this node.

    Raises:
        RunError: if there are none.
    """
    agents, ranks = [], {}
    for process in psutil.process_iter():
        try:
            # Other users can give their processes any name.
            if process.uids().real != os.getuid():
                continue
            if (title := RankTitle.of(process)) is not None:
                if title.attempt == attempt and Path(title.plan_path).is_relative_to(run.root):
                    ranks[title.rank] = process
                continue
            module, path, number = process.cmdline()[-3:]
            is_agent = module.startswith("launcher.worker.") and module.endswith(".agent")
            if is_agent and number == str(attempt) and Path(path).is_relative_to(run.root):
                agents.append(process)
        except (psutil.Error, ValueError):
            # Another user's process, or one that has just ended.
            continue
    if not agents or not ranks:
        raise RunError(
            f"attempt {attempt} has no agent with ranks on {os.uname().nodename}",
            where=str(run.root),
            remedy="the attempt has just ended, or has not started there yet; start the drill again",
        )
    return NodeProcesses(agents[0], ranks)


def preempt(here: NodeProcesses, plan: LaunchPlan) -> InjectedFault:
    """Send the signal that a scheduler sends when it takes the machine back."""
    here.agent.send_signal(signal.SIGUSR2)
    return _report("SIGUSR2 to the node's agent", here.agent)


def kill_rank(here: NodeProcesses, plan: LaunchPlan) -> InjectedFault:
    rank, process = here.last_rank
    process.kill()
    return _report(f"SIGKILL to rank {rank}", process)


def kill_node(here: NodeProcesses, plan: LaunchPlan) -> InjectedFault:
    """Kill the agent; its ranks die with it."""
    here.agent.kill()
    return _report("SIGKILL to the node's agent, and so to its ranks", here.agent)


def fill_disk(here: NodeProcesses, plan: LaunchPlan) -> InjectedFault:
    """Make writes fail in the middle of the next shard, as on a full disk; small files such as logs can still be written.

    The limit applies to the ranks' processes and ends with them. Python ignores SIGXFSZ, so the write fails with EFBIG.
    """
    limit = plan.checkpoint_bytes // plan.topology.world_size // 2
    for process in here.ranks.values():
        _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (limit, hard))
    ranks = f"rank{'s' if len(here.ranks) > 1 else ''} {', '.join(map(str, sorted(here.ranks)))}"
    return _report(f"no file of {ranks} can grow beyond {limit:,} bytes", *here.ranks.values())


def free_disk(here: NodeProcesses, plan: LaunchPlan) -> InjectedFault:
    """Remove the limit of `fill_disk`."""
    for process in here.ranks.values():
        _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    return _report("the file size limit is removed", *here.ranks.values())


def hang(here: NodeProcesses, plan: LaunchPlan) -> InjectedFault:
    """Stop one rank in the middle of a step.

    Raises:
        RunError: if every try hit a save, which may take longer than a step before it counts as a hang.
    """
    rank, process = here.last_rank
    run, every = RunDir(Path(plan.run_dir)), plan.config.checkpoint.save_every
    deadline = time.monotonic() + _HANG_DEADLINE_S
    while time.monotonic() < deadline:
        process.suspend()
        fault = _report(f"SIGSTOP to rank {rank}", process)
        # The other ranks continue until they wait for this one: the last step that they log is the last that it finished.
        time.sleep(_SETTLE_S)
        if newest_trained_step(run, run_store.read_status(run)) % every:
            return fault
        process.resume()
        time.sleep(_SETTLE_S)
    raise RunError(
        "every attempt to stop a rank during training met a save",
        where="checkpoint.save_every",
        value=str(every),
        remedy="raise it",
    )


def _report(description: str, *processes: psutil.Process) -> InjectedFault:
    return InjectedFault(description, time.time(), os.uname().nodename, tuple(process.pid for process in processes))


_ACTIONS: dict[str, Callable[[NodeProcesses, LaunchPlan], InjectedFault]] = {
    "preempt": preempt,
    "kill-rank": kill_rank,
    "kill-node": kill_node,
    "fill-disk": fill_disk,
    "free-disk": free_disk,
    "hang": hang,
}


def main(argv: Sequence[str]) -> int:
    fault, plan_path, attempt = argv
    try:
        plan = LaunchPlan.load(plan_path)
        here = find(RunDir(Path(plan.run_dir)), int(attempt))
        print(json.dumps(asdict(_ACTIONS[fault](here, plan))))
    except (LauncherError, psutil.Error) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
