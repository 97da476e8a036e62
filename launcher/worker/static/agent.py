"""The agent of one machine among several that run the same command: `python -m launcher.worker.static.agent PLAN ATTEMPT NODE`.

As on Slurm, it meets the agents of the other machines, checks its machine, runs its ranks and writes its record. The agent of
node 0 concludes the attempt when the other machines have left their records or are lost.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from launcher import run_store
from launcher.child_process import die_with_parent
from launcher.clusters import detached_process
from launcher.clusters.cgroups import record_limits
from launcher.clusters.static import nodes
from launcher.clusters.static.cluster import REPEAT
from launcher.config.sections.static import StaticSection
from launcher.errors import LauncherError
from launcher.plan.retry import Cause, Decision
from launcher.run_records import Attempt
from launcher.tracking.jsonl import append_event
from launcher.worker import disk_reserve, node_agents, postmortem
from launcher.worker.agent import NodeAgent
from launcher.worker.sidecars.sidecar import AFTER_FAILURE_S
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.static.peers import Peers
from launcher.worker.wandb_closing import close_wandb_run

# TERM comes from the provider, which takes the machine back; the command turns Ctrl-C into a cancel request.
_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_LOOK_S = 0.2
_EXIT_INTERRUPTED = 130


def main(plan_path: str, attempt: int, number: int) -> int:
    """Run this machine's part of one attempt and write its record; returns the exit code."""
    die_with_parent()
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    plan, run, stopper = agent.plan, agent.run, agent.stopper
    section, record = StaticSection.of(plan.config.cluster), run_store.read_attempt(run, attempt)
    peers = Peers(run, attempt, record, number, agent.ranks.send_signal).start()
    if number == 0:
        job = {**detached_process.describe_this_process(), "nodes": record.nodes}
        run_store.update_status(run, state="running", attempt=attempt, job=job, message="starting")
        disk_reserve.keep(run, attempt)
    record_limits(run, attempt, number)
    if run.cancel(attempt).is_file():
        stopper.request(CANCEL)
    result = node_agents.run_node(agent, record, number, nodes.agent_log(run, attempt, number), why_ended=peers.why_ended)
    peers.ranks_have_ended()
    agent.close()
    node_agents.write_record(agent, number, record.nodes[number], result)
    if number == 0:
        _await_records(peers.heartbeats, section)

        def finish(state: str) -> None:
            # A machine that is taken back has no time for answers.
            stopper.finish(result.answers, math.inf if state == "completed" else 0.0, uses_grace=False)
            stopper.finish(result.mirror, math.inf if result.failure is None else AFTER_FAILURE_S)

        return _conclude(agent, record, section, peers.heartbeats, finish)
    return result.exit_code


def _await_records(heartbeats: nodes.HeartbeatWatch, section: StaticSection) -> None:
    """Wait until every other machine has left its record or is lost, for as long as their ranks need to end.

    A machine whose ranks hang still sends heartbeats: its agent kills them once this machine's record shows a failure.
    """
    until = time.monotonic() + section.stop_grace_seconds + nodes.LOST_S
    while time.monotonic() < until:
        with suppress(OSError):
            if not any(not state.ended and not state.lost for state in heartbeats.look()):
                return
        time.sleep(_LOOK_S)


def _conclude(
    agent: NodeAgent, record: Attempt, section: StaticSection, heartbeats: nodes.HeartbeatWatch, finish: Callable[[str], None]
) -> int:
    """Judge the attempt and record how it ended; returns the exit code. Nothing restarts it automatically."""
    run, number = agent.run, agent.attempt
    silence: dict[str, str] = {}
    with suppress(OSError):
        silence = nodes.describe_silence(heartbeats.look())
    judged = postmortem.conclude(run, number, record, section, silence=silence)
    run_store.fence(run, number, refresh=True)
    conclusion = replace(judged, decision=_without_successor(judged.ending.cause, judged.decision))
    disk_reserve.release_if_full(run, number)
    with suppress(OSError):
        conclusion.record(run, number)
    if (alert := conclusion.alert) is not None:
        with suppress(OSError):
            append_event(run, number, "alert", alert, conclusion.ending.step)
    state = conclusion.decision.state
    # The status shows the end only when the mirror has every committed checkpoint, and prompts are answered.
    finish(state)
    with suppress(OSError, LauncherError):
        run_store.update_status(run, state=state, step=conclusion.ending.step, message=conclusion.message)
    disk_reserve.release(run, number)
    close_wandb_run(agent.plan, agent.plan_path, run, number)
    return 0 if state == "completed" else _EXIT_INTERRUPTED if state in ("cancelled", "preempted") else 1


def _without_successor(cause: Cause, decision: Decision) -> Decision:
    """Return the decision for a backend that starts no further attempts: whoever started the command may repeat it."""
    if not decision.again:
        return decision
    state = "preempted" if cause in (Cause.PREEMPTED, Cause.TIME_LIMIT) else "failed"
    return Decision(False, state, f"{decision.reason}; {REPEAT}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
