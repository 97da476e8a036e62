"""The agent of one node of a Slurm job: `python -m launcher.worker.slurm.agent PLAN ATTEMPT`.

It meets the agents of the other nodes, checks the node, runs its ranks and writes the node's record. The job concludes the
attempt when all of its nodes have ended (launcher.worker.slurm.job).
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time

from launcher import json_records, run_store
from launcher.clusters.cgroups import record_limits
from launcher.errors import Problem
from launcher.run_records import FailureRecord, NodeRecord, node_file
from launcher.worker import failure_record, node_agents
from launcher.worker.agent import NodeAgent
from launcher.worker.limits import cause_of
from launcher.worker.mirror_process import AFTER_FAILURE_S, MirrorProcess
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.slurm import node as slurm_node

# TERM comes from Slurm, which takes the nodes back, and not from a person.
_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, PREEMPT: PREEMPT}


def main(plan_path: str, attempt: int) -> int:
    """Run this node's part of one attempt and write its record; returns the exit code."""
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    plan, run, stopper = agent.plan, agent.run, agent.stopper
    record = run_store.read_attempt(run, attempt)
    number = int(os.environ["SLURM_NODEID"])
    record_limits(run, attempt, number)
    stopper.kill_at = slurm_node.kill_at(record, plan)
    if run.cancel(attempt).is_file():
        # Requested before this process listened to signals.
        stopper.request(CANCEL)
    mirror: MirrorProcess | None = None
    failure: FailureRecord | None = None
    problems: list[Problem] = []
    try:
        node = node_agents.node_info(plan, record, number)
        slurm_node.save_before_end(record, plan, stopper.request)
        store = node_agents.connect(record, node)
        problems = node_agents.check(store, plan, run, attempt, record, node)
        if not problems and not stopper.requested:
            mirror = agent.start_mirror() if node.is_head else None
            failure = agent.run_ranks(node, store, record.job)
    except Exception as error:
        failure = failure_record.from_exception(error, run.agent_log(attempt, record.job), limit=cause_of(error, run.root))
    agent.close()
    node_record = NodeRecord(
        number,
        ended_at=time.time(),
        host=os.uname().nodename,
        started_at=agent.started_at,
        stopped=stopper.requested,
        killed=stopper.killed,
        first_failure=failure,
        problems=tuple(problems),
    )
    json_records.write(node_file(run, attempt, number), node_record)
    stopper.finish(mirror, math.inf if failure is None else AFTER_FAILURE_S)
    return 0 if failure is None and not problems else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
