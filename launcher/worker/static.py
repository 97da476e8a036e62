"""The agent of one machine among several that run the same command: `python -m launcher.worker.static PLAN ATTEMPT NODE`.

As on Slurm, it meets the agents of the other machines, checks its machine, runs its ranks and writes its record. The agent of
node 0 concludes the attempt when the other machines have left their records or are lost, of which the command tells it.

`python -m launcher.worker.static PLAN` judges the previous attempt for a repeated command, and prints a JSON object.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.child_process import die_with_parent
from launcher.clusters import detached_process, static
from launcher.clusters.static_meeting import LOST_S, MeetingMessage
from launcher.config.sections.static import StaticSection
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import AttemptEnd, Cause, Decision, decide
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_store
from launcher.runs.journal import NodeEnded
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.cancel_watch import watch_for_cancel
from launcher.worker.postmortem import Conclusion, Evidence
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.supervise import NodeAgent
from launcher.worker.wandb_closing import close_wandb_run

# TERM comes from the provider, which takes the machine back; the command turns Ctrl-C into a cancel request.
_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_LOOK_S, _KILL_EVERY_S = 0.2, 0.5
_EXIT_INTERRUPTED = 130
# How long the ranks may take to fail by themselves once another machine has failed: their own errors say more.
_FAILED_S, _LOST_S = 30.0, 10.0


def main(plan_path: str, attempt: int, number: int) -> int:
    """Run this machine's part of one attempt and write its record; node 0 also concludes the attempt. Returns the exit code."""
    die_with_parent()
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    plan, run = agent.plan, agent.run
    record = run_store.read_attempt(run, attempt)
    peers = Peers(agent.ranks.send_signal).start()
    watch_for_cancel(run, attempt)
    if number == 0:
        job = {**detached_process.describe_this_process(), "nodes": record.nodes}
        run_store.update_status(run, state="running", attempt=attempt, job=job, message="starting")
        detached_process.start_liveness_file(run)
        postmortem.reserve_disk_space(run, attempt)
    conclusion: Conclusion | None = None

    def conclude(node: NodeEnded) -> bool:
        nonlocal conclusion
        peers.ranks_ended.set()
        if number != 0:
            return False
        conclusion = _conclude(agent, record, peers)
        conclusion.write(run, attempt)
        return conclusion.decision.state == "completed"

    log = static.agent_log(run, attempt, number)
    node = agent.supervise(record, number, log, conclude=conclude, why_ended=lambda: peers.reason)
    if conclusion is None:
        return 1 if node.problems or node.first_failure is not None else 0
    state = conclusion.decision.state
    # The status shows the end only when the mirror has every committed checkpoint, and prompts are answered.
    with suppress(OSError, LauncherError):
        run_store.update_status(run, state=state, step=conclusion.ending.step, message=conclusion.message)
    postmortem.release_disk_space(run, attempt)
    close_wandb_run(plan, plan_path, run, attempt)
    return 0 if state == "completed" else _EXIT_INTERRUPTED if state in ("cancelled", "preempted") else 1


def _conclude(agent: NodeAgent, record: Attempt, peers: Peers) -> Conclusion:
    """Judge the attempt once the agents of the other machines have ended.

    A machine whose ranks hang is still connected: its agent kills them once this machine's record shows a failure.
    """
    run, attempt, section = agent.run, agent.attempt, StaticSection.of(agent.plan.config.cluster)
    until = time.monotonic() + section.stop_grace_seconds + LOST_S
    while len(peers.ends) < len(record.nodes) - 1 and time.monotonic() < until:
        time.sleep(_LOOK_S)
    with suppress(OSError):
        # Otherwise a network file system may not show their records yet.
        atomic_files.refresh_directory(run.attempt(attempt))
    silence = {record.nodes[node]: end.text for node, end in peers.ends.items() if end.is_lost}
    judged = postmortem.conclude(run, attempt, record, section, Evidence(silence=silence))
    run_store.fence(run, attempt, refresh=True)
    decision = judged.decision
    if decision.again:
        # Nothing restarts it automatically, but whoever started the command may repeat it.
        state = "preempted" if judged.ending.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT) else "failed"
        decision = Decision(False, state, f"{decision.reason}; {static.REPEAT}")
    return replace(judged, decision=decision)


class Peers:
    """The ends of the other machines' agents, by node; this machine's command writes them to this process's standard input.

    Once the ranks cannot go on because of one, `kill_ranks` is called repeatedly until `ranks_ended` is set, and `reason` is why.
    """

    def __init__(self, kill_ranks: Callable[[int], None]) -> None:
        self.ends: dict[int, MeetingMessage] = {}
        self.reason = ""
        self.ranks_ended = threading.Event()
        self._kill_ranks = kill_ranks

    def start(self) -> Peers:
        def listen() -> None:
            for line in sys.stdin:
                end = json_records.loads(MeetingMessage, line.encode(), "standard input")
                self.ends[end.node] = end
                if end.text:
                    threading.Thread(target=self._end_ranks, args=(end,), daemon=True).start()

        threading.Thread(target=listen, name="peers", daemon=True).start()
        return self

    def _end_ranks(self, end: MeetingMessage) -> None:
        wait_s = _LOST_S if end.is_lost else _FAILED_S
        while not self.ranks_ended.wait(wait_s):
            # Worded so that failure_record.PEER_LOST matches: the failure of this machine's ranks is a consequence.
            self.reason = self.reason or f"remote process exited: {end.text}"
            self._kill_ranks(signal.SIGKILL)
            wait_s = _KILL_EVERY_S


def judge_previous(plan: LaunchPlan) -> dict[str, Any]:
    """Judge the newest attempt of a run whose machines have all ended: whether a repeated command continues the run.

    A user error, which ends the run on backends that start attempts by themselves, counts as a failure here, because a person may
    have corrected it meanwhile. The budgets that apply on every backend stop a provider that repeats the command endlessly.

    `over` means that nothing is left to do. Otherwise `again` is whether the run continues, and `reason` why it does not.
    """
    run, section = RunDir(Path(plan.run_dir)), StaticSection.of(plan.config.cluster)
    number = run_store.newest_attempt(run)
    if not number:
        return {"over": False, "again": True, "reason": ""}

    def alert(text: str) -> None:
        with suppress(OSError):
            append_event(run, number, "alert", text)

    end = postmortem.end_of_attempt(run, number, section, Evidence(), alert)
    if end.cause in (Cause.COMPLETED, Cause.CANCELLED, Cause.LIMIT):
        return {"over": True, "again": False, "reason": f"{plan.run_name} is {end.cause}: {end.message}"}
    history = postmortem.history(run, number)
    decision = decide(_correctable(end), [_correctable(earlier) for earlier in history], section)
    # A machine that failed its check may since have been replaced.
    again = decision.again or (end.cause is Cause.BAD_NODE and len(history) < section.max_failures)
    return {"over": False, "again": again, "reason": decision.reason}


def _correctable(end: AttemptEnd) -> AttemptEnd:
    return replace(end, cause=Cause.FAILURE) if end.cause is Cause.USER_ERROR else end


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(judge_previous(LaunchPlan.load(sys.argv[1]))))
    else:
        sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
