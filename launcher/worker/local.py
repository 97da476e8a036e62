"""The agent of a run on this machine: `python -m launcher.worker.local PLAN ATTEMPT`. It also concludes the attempt."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from launcher import clock
from launcher.clusters import detached_process, network
from launcher.errors import EXIT_CODES, EXIT_FAILED
from launcher.plan.retry import Cause
from launcher.runs import journal, run_store
from launcher.runs.journal import AttemptConcluded, NodeEnded
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.sidecars.sidecar import AFTER_FAILURE_S
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.supervise import NodeAgent
from launcher.worker.wandb_closing import close_wandb_run

# Ctrl-C and TERM come from a person.
_SIGNALS = {signal.SIGINT: CANCEL, CANCEL: CANCEL, signal.SIGTERM: CANCEL, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}


def main(plan_path: str, attempt: int) -> int:
    """Run an attempt on this machine and conclude it; returns the exit code."""
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    run = agent.run
    agent.watch_requests()

    def check_gpus() -> None:
        # Imported in the thread, which nothing waits for.
        from launcher.worker.checks import node_check

        node_check.report_gpu_findings(agent.plan, attempt)

    if agent.plan.topology.device == "cuda":
        threading.Thread(target=check_gpus, name="gpu-check", daemon=True).start()
    begun = replace(run_store.read_attempt(run, attempt), begun_at=agent.started_at)
    run_store.write_attempt(run, attempt, begun)
    place = replace(begun, nodes=(network.node_name(),), **network.LOOPBACK.choose_meeting())

    def conclude(node: NodeEnded) -> tuple[AttemptConcluded, str]:
        end = postmortem.judge_local(run, attempt, node)
        postmortem.release_disk_space(run, attempt)
        with suppress(OSError):
            journal.append(run, attempt, end)
        if end.state == "failed":
            with suppress(OSError):
                append_event(run, attempt, "alert", f"the attempt failed: {end.message}", end.step)
        return end, end.message

    # Nothing starts another attempt that would continue the uploads.
    return lead_attempt(agent, place, conclude, after_failure_s=math.inf)


def lead_attempt(
    agent: NodeAgent,
    place: Attempt,
    conclude: Callable[[NodeEnded], tuple[AttemptConcluded, str]],
    *,
    why_ended: Callable[[], str] = str,
    after_failure_s: float = AFTER_FAILURE_S,
) -> int:
    """Run node 0 of an attempt, keep the run's status, and return the exit code; for the arguments see `NodeAgent.supervise`.

    When the ranks have ended, `conclude` returns the verdict on the attempt, which it has recorded, and the status's message.
    """
    run, attempt = agent.run, agent.attempt
    run_store.update_status(run, state="running", attempt=attempt, job=detached_process.describe_this_process(), message="")
    detached_process.start_liveness_file(run)
    postmortem.reserve_disk_space(run, attempt)
    end, message = AttemptConcluded(state="failed", cause=Cause.FAILURE), ""

    def is_complete(node: NodeEnded) -> bool:
        nonlocal end, message
        end, message = conclude(node)
        return end.state == "completed"

    log = run.agent_log(attempt)
    agent.supervise(place, 0, log, conclude=is_complete, why_ended=why_ended, after_failure_s=after_failure_s)
    # The attempt holds its machines until here. If the disk is full, the time comes from the liveness file instead.
    with suppress(OSError):
        journal.append(run, attempt, replace(end, ended_at=clock.now()))
    # The status shows the end only when the mirror has every committed checkpoint, and prompts are answered.
    run_store.update_status(run, state=end.state, step=end.step, message=message)
    close_wandb_run(agent.plan, agent.plan_path, run, attempt)
    return EXIT_CODES.get(end.state, EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
