"""The agent of one node of a Slurm job: `python -m launcher.worker.slurm.agent PLAN ATTEMPT`.

It meets the agents of the other nodes, checks the node, runs its ranks and writes the node's record. The job concludes the
attempt when all of its nodes have ended (launcher.worker.slurm.job).
"""

from __future__ import annotations

import math
import os
import signal
import sys

from launcher import run_store
from launcher.clusters.cgroups import record_limits
from launcher.worker import node_agents
from launcher.worker.agent import NodeAgent
from launcher.worker.sidecars.sidecar import AFTER_FAILURE_S, SUBMISSION_S
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.slurm import node as slurm_node

# TERM comes from Slurm, which takes the nodes back, not from a person.
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
        # Requested before this process listened for signals.
        stopper.request(CANCEL)
    slurm_node.save_before_end(record, plan, stopper.request)
    result = node_agents.run_node(agent, record, number, run.agent_log(attempt, record.job), record.job)
    agent.close()
    node_agents.write_record(agent, number, os.uname().nodename, result)
    is_complete = result.exit_code == 0 and not stopper.requested
    stopper.finish(result.answers, SUBMISSION_S if is_complete else 0.0, uses_grace=False)
    stopper.finish(result.mirror, math.inf if result.failure is None else AFTER_FAILURE_S)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
