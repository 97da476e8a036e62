"""Signals the processes of a run on this node, for the drill: `python -m launcher.worker.fault_injection FAULT RUN ATTEMPT`."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import psutil

from launcher import clock
from launcher.clusters.backends import InjectedFault
from launcher.errors import EXIT_FAILED, LauncherError, RunError
from launcher.worker.ranks.rank_env import RankTitle

# The signal of each fault, and whether the node's agent receives it, rather than its last rank. The ranks die with the agent.
_SIGNALS = {
    "preempt": (signal.SIGUSR2, True),
    "kill-rank": (signal.SIGKILL, False),
    "kill-node": (signal.SIGKILL, True),
    "hang": (signal.SIGSTOP, False),
}


def find(run: Path, attempt: int) -> tuple[psutil.Process, dict[int, psutil.Process]]:
    """Find the agent and the ranks of `attempt` on this node."""
    agents, ranks = [], {}
    for process in psutil.process_iter():
        try:
            # Other users can give their processes any name.
            if process.uids().real != os.getuid():
                continue
            if (title := RankTitle.of(process)) is not None:
                if title.attempt == attempt and Path(title.plan_path).is_relative_to(run):
                    ranks[title.rank] = process
                continue
            module, path, number = process.cmdline()[-3:]
            is_agent = module == "launcher.worker.local" or module.endswith(".agent")
            if is_agent and number == str(attempt) and Path(path).is_relative_to(run):
                agents.append(process)
        except (psutil.Error, ValueError):
            # Another user's process, or one that has just ended.
            continue
    if not agents or not ranks:
        message = f"attempt {attempt} has no agent with ranks on {os.uname().nodename}"
        raise RunError(message, where=str(run), remedy="the attempt has just ended or not started there; start the drill again")
    return agents[0], ranks


def inject(fault: str, run: Path, attempt: int) -> InjectedFault:
    """Send the fault's signal to the agent or to the last rank of `attempt` on this node."""
    agent, ranks = find(run, attempt)
    number, to_agent = _SIGNALS[fault]
    rank = max(ranks)
    (agent if to_agent else ranks[rank]).send_signal(number)
    target = "the node's agent" if to_agent else f"rank {rank}"
    return InjectedFault(f"{number.name} to {target}", clock.now(), os.uname().nodename)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(inject(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))))
    except (LauncherError, psutil.Error) as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)
