"""The agent of one node of a run's job: `python -m launcher.worker.slurm.agent PLAN ATTEMPT`, which Slurm starts on each node.

The job concludes the attempt when all of its nodes have ended (launcher.worker.slurm.job).
`python -m launcher.worker.slurm.agent evaluate FOLDER GPUS` runs one node's processes of an evaluation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from launcher.child_process import exit_on_termination
from launcher.config.sections.slurm import SlurmSection
from launcher.plan.launch_plan import LaunchPlan
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.worker.sidecars.sidecar import SUBMISSION_S
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.supervise import NodeAgent

# TERM comes from Slurm, which takes the nodes back, not from a person.
_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, PREEMPT: PREEMPT}
# Seconds between the end of the ranks and the end of the job, for srun's exit, the records and a requeue.
_CONCLUDE_S = 20.0


def main(plan_path: str, attempt: int) -> int:
    """Run this node's part of one attempt and write its record; returns the exit code."""
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    plan, run, stopper = agent.plan, agent.run, agent.stopper
    record = run_store.read_attempt(run, attempt)
    stopper.kill_at = kill_at(record, plan)
    if record.ends_at is not None:
        # Whether or not Slurm's signal arrives.
        lead_s = SlurmSection.of(plan.config.cluster).signal_lead_seconds
        timer = threading.Timer(record.ends_at - lead_s - time.time(), stopper.request, (PREEMPT,))
        timer.daemon = True
        timer.start()
    log = run.agent_log(attempt, record.job)
    node = agent.supervise(record, int(os.environ["SLURM_NODEID"]), log, answers_s=SUBMISSION_S)
    return 1 if node.problems or node.first_failure is not None else 0


def kill_at(record: Attempt, plan: LaunchPlan) -> float | None:
    """Return when ranks that do not stop are killed, as a time.monotonic() time: the job must conclude before Slurm ends it."""
    if record.ends_at is None:
        return None
    margin_s = min(_CONCLUDE_S, SlurmSection.of(plan.config.cluster).signal_lead_seconds / 4)
    return time.monotonic() + record.ends_at - margin_s - time.time()


def answer_prompts(folder: str, num_gpus: int) -> int:
    """Run this node's processes of an evaluation; returns the exit code."""
    from launcher.evaluate.node import run_node

    exit_on_termination()
    return run_node(folder, int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]), num_gpus)


if __name__ == "__main__":
    if sys.argv[1] == "evaluate":
        sys.exit(answer_prompts(sys.argv[2], int(sys.argv[3])))
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
