"""The agent of one machine among several that run the same command: `python -m launcher.worker.static PLAN ATTEMPT NODE`.

As on Slurm, it meets the agents of the other machines, checks its machine, runs its ranks and writes its record. The agent of
node 0 concludes the attempt when the other machines have left their records or are lost.

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

from launcher import run_store
from launcher.child_process import die_with_parent
from launcher.clusters import detached_process, static
from launcher.config.sections.static import StaticSection
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import AttemptEnd, Cause, Decision, decide
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.runs import journal
from launcher.runs.journal import NodeEnded
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.cancel_watch import watch_for_cancel
from launcher.worker.postmortem import Conclusion, Evidence
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.supervise import NodeAgent
from launcher.worker.wandb_closing import close_wandb_run

# TERM comes from the provider, which takes the machine back; the command turns Ctrl-C into a cancel request.
_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_LOOK_S = 0.2
_EXIT_INTERRUPTED = 130
_PEERS_LOOK_S = 0.5
# How long the ranks may take to fail by themselves once another machine has failed: their own errors say more.
_FAILED_S, _LOST_S = 30.0, 10.0


def main(plan_path: str, attempt: int, number: int) -> int:
    """Run this machine's part of one attempt and write its record; node 0 also concludes the attempt. Returns the exit code."""
    die_with_parent()
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    plan, run = agent.plan, agent.run
    section, record = StaticSection.of(plan.config.cluster), run_store.read_attempt(run, attempt)
    peers = Peers(run, attempt, record, number, agent.ranks.send_signal).start()
    watch_for_cancel(run, attempt)
    if number == 0:
        job = {**detached_process.describe_this_process(), "nodes": record.nodes}
        run_store.update_status(run, state="running", attempt=attempt, job=job, message="starting")
        postmortem.reserve_disk_space(run, attempt)
    conclusion: Conclusion | None = None

    def conclude(node: NodeEnded) -> bool:
        nonlocal conclusion
        peers.ranks_have_ended()
        if number != 0:
            return False
        conclusion = _conclude(run, attempt, record, section, peers.heartbeats)
        conclusion.write(run, attempt)
        return conclusion.decision.state == "completed"

    log = static.agent_log(run, attempt, number)
    node = agent.supervise(record, number, log, conclude=conclude, why_ended=peers.why_ended)
    if conclusion is None:
        return 1 if node.problems or node.first_failure is not None else 0
    state = conclusion.decision.state
    # The status shows the end only when the mirror has every committed checkpoint, and prompts are answered.
    with suppress(OSError, LauncherError):
        run_store.update_status(run, state=state, step=conclusion.ending.step, message=conclusion.message)
    postmortem.release_disk_space(run, attempt)
    close_wandb_run(plan, plan_path, run, attempt)
    return 0 if state == "completed" else _EXIT_INTERRUPTED if state in ("cancelled", "preempted") else 1


def _conclude(
    run: RunDir, attempt: int, record: Attempt, section: StaticSection, heartbeats: static.HeartbeatWatch
) -> Conclusion:
    """Judge the attempt once the other machines have left their records or are lost.

    A machine whose ranks hang still sends heartbeats: its agent kills them once this machine's record shows a failure.
    """
    until = time.monotonic() + section.stop_grace_seconds + static.LOST_S
    while time.monotonic() < until:
        with suppress(OSError):
            if all(state.ended or state.lost for state in heartbeats.look()):
                break
        time.sleep(_LOOK_S)
    silence: dict[str, str] = {}
    with suppress(OSError):
        silence = static.describe_silence(heartbeats.look())
    judged = postmortem.conclude(run, attempt, record, section, Evidence(silence=silence))
    run_store.fence(run, attempt, refresh=True)
    decision = judged.decision
    if decision.again:
        # Nothing restarts it automatically, but whoever started the command may repeat it.
        state = "preempted" if judged.ending.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT) else "failed"
        decision = Decision(False, state, f"{decision.reason}; {static.REPEAT}")
    return replace(judged, decision=decision)


class Peers:
    """Watches the run directory for failed machines, from a thread; writes this machine's heartbeat to it.

    Once the ranks cannot go on, `kill_ranks` is called repeatedly until `stop`; `why_ended` then returns why. `heartbeats` is the
    watch over all machines of the attempt.
    """

    def __init__(self, run: RunDir, attempt: int, record: Attempt, node: int, kill_ranks: Callable[[int], None]) -> None:
        self._run, self._attempt, self._record, self._node = run, attempt, record, node
        self._kill_ranks = kill_ranks
        self.heartbeats = static.HeartbeatWatch(run, attempt, record)
        self._reason = ""
        self._failed_at: dict[int, float] = {}
        self._written_at = -1e9
        self._watches_peers = True
        self._ended = threading.Event()

    def start(self) -> Peers:
        self._write_alive()

        def watch() -> None:
            while not self._ended.wait(_PEERS_LOOK_S):
                if time.monotonic() - self._written_at > static.INTERVAL_S:
                    self._write_alive()
                # Storage may fail for a while; no machine is judged by unreadable files.
                with suppress(OSError, LauncherError):
                    if self._watches_peers and len(self._record.nodes) > 1:
                        self._look_at_peers()
                if self._reason and self._watches_peers:
                    self._kill_ranks(signal.SIGKILL)

        threading.Thread(target=watch, name="peers", daemon=True).start()
        return self

    def ranks_have_ended(self) -> None:
        """Stop killing ranks; the heartbeat continues."""
        self._watches_peers = False

    def stop(self) -> None:
        self._ended.set()

    def why_ended(self) -> str:
        """Return why the ranks were killed; empty if they were not."""
        return self._reason

    def _write_alive(self) -> None:
        with suppress(OSError):
            static.write_alive(self._run, self._attempt, self._node, self._record.nodes[self._node])
            self._written_at = time.monotonic()

    def _look_at_peers(self) -> None:
        if time.monotonic() - self._written_at > 2 * static.INTERVAL_S + _PEERS_LOOK_S:
            # Storage did not accept this machine's own heartbeat, so the other machines may not be able to write theirs.
            return
        states = self.heartbeats.look()
        now = time.monotonic()
        for node, state in enumerate(states):
            if node == self._node:
                continue
            reason, patience_s = state.lost, _LOST_S
            if state.ended:
                record, patience_s = journal.read_node(self._run, self._attempt, node), _FAILED_S
                failure = None if record is None else record.first_failure
                reason = f"{state.name}: {failure.line}" if failure is not None else ""
            if not reason:
                self._failed_at.pop(node, None)
                continue
            # Worded so that failure_record.PEER_LOST matches: the failure of this machine's ranks is a consequence.
            if now - self._failed_at.setdefault(node, now) > patience_s:
                self._reason = self._reason or f"remote process exited: {reason}"


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
    record = run_store.read_attempt(run, number)

    def alert(text: str) -> None:
        with suppress(OSError):
            append_event(run, number, "alert", text)

    silence = static.describe_silence(static.read_states(run, number, record))
    end = postmortem.end_of_attempt(run, number, section, Evidence(silence=silence), alert)
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
