"""The agent of one node of a run on Ray: `python -m launcher.worker.ray.agent PLAN ATTEMPT`.

Ray Train's worker (launcher.worker.ray.train_function) starts it, and passes the nodes and where they meet to its standard input.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from dataclasses import replace

from launcher import clock
from launcher.child_process import die_with_parent
from launcher.errors import LauncherError
from launcher.runs import run_store
from launcher.worker import postmortem
from launcher.worker.ray.train_function import agent_log
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.supervise import NodeAgent

_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, PREEMPT: PREEMPT}


def main(plan_path: str, attempt: int) -> int:
    """Run this node's part of one attempt and write its record; returns 0 if it has written it."""
    die_with_parent()
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    run = agent.run
    orders = json.loads(sys.stdin.read())
    number, nodes = orders.pop("number"), tuple(orders.pop("nodes"))
    place = replace(run_store.read_attempt(run, attempt), nodes=nodes, begun_at=clock.now(), **orders)
    if number == 0:
        run_store.write_attempt(run, attempt, place)
        postmortem.reserve_disk_space(run, attempt)
        with suppress(OSError, LauncherError):
            run_store.update_status(run, state="running", attempt=attempt, message="starting")
    agent.watch_requests()
    agent.supervise(place, number, agent_log(run, attempt, number))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
