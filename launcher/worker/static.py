"""The agent of one machine among several that run the same command: `python -m launcher.worker.static PLAN ATTEMPT NODE`.

The agent of node 0 concludes the attempt when the other machines have left their records or are lost, which the commands report.
`python -m launcher.worker.static PLAN` judges the previous attempt for a repeated command, and prints a JSON object.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.child_process import die_with_parent
from launcher.clusters import static
from launcher.clusters.static_meeting import LOST_S
from launcher.config.sections.static import StaticSection
from launcher.errors import EXIT_FAILED
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Cause, Decision, decide
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import AttemptConcluded, NodeEnded
from launcher.worker import postmortem
from launcher.worker.local import lead_attempt
from launcher.worker.postmortem import Evidence
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.supervise import NodeAgent

# TERM comes from the provider, which takes the machine back; the command turns Ctrl-C into a cancel request.
_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_LOOK_S = 0.2
# How long the ranks may take to fail by themselves once another machine has failed or is lost: their own errors say more.
_OWN_ERRORS_S = 10.0


def main(plan_path: str, attempt: int, number: int) -> int:
    """Run this machine's part of one attempt and write its record; node 0 also concludes the attempt. Returns the exit code."""
    die_with_parent()
    agent = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if agent is None:
        return 1
    run, section = agent.run, StaticSection.of(agent.plan.config.cluster)
    record = run_store.read_attempt(run, attempt)
    peers = Peers(run, attempt, number, agent.ranks.send_signal)
    agent.watch_requests(peers.look)
    if number:
        node = agent.supervise(record, number, static.agent_log(run, attempt, number), why_ended=lambda: peers.reason)
        return EXIT_FAILED if node.problems or node.first_failure is not None else 0

    def conclude(_: NodeEnded) -> tuple[AttemptConcluded, str]:
        # A machine whose ranks hang has no record and is not lost: its agent kills them, because this machine's record shows a
        # failure.
        until = time.monotonic() + section.stop_grace_seconds + LOST_S
        while peers.num_ended < len(record.nodes) - 1 and time.monotonic() < until:
            time.sleep(_LOOK_S)
        judged = postmortem.conclude(run, attempt, record, section, Evidence())
        run_store.fence(run, attempt, refresh=True)
        decision = judged.decision
        if decision.again:
            # Nothing restarts it automatically, but whoever started the command may repeat it.
            state = "preempted" if judged.ending.cause in (Cause.PREEMPTED, Cause.TIME_LIMIT) else "failed"
            judged = replace(judged, decision=Decision(False, state, f"{decision.reason}; {static.REPEAT}"))
        judged.write(run, attempt)
        return judged.verdict(), judged.message

    return lead_attempt(agent, record, conclude, why_ended=lambda: peers.reason)


class Peers:
    """What the journal tells about the other machines, at each `look`; `num_ended` of them have left a record or are lost.

    Once the attempt cannot go on without one, `kill_ranks` is called until machine `node` has left its own record, for `reason`.
    """

    def __init__(self, run: RunDir, attempt: int, node: int, kill_ranks: Callable[[int], None]) -> None:
        self._run, self._attempt, self._node, self._kill_ranks = run, attempt, node, kill_ranks
        self._kill_at = math.inf
        self.num_ended = 0
        self.reason = ""

    def look(self) -> None:
        state = journal.read_state(self._run, self._attempt)
        self.num_ended = len({*state.nodes, *state.lost} - {self._node})
        failures = [record.first_failure.line for record in state.nodes.values() if record.first_failure is not None]
        reasons = [*(text for node, text in state.lost.items() if node != self._node), *failures]
        if self._node in state.nodes or not reasons:
            return
        self._kill_at = min(self._kill_at, time.monotonic() + _OWN_ERRORS_S)
        if time.monotonic() >= self._kill_at:
            # Worded so that failure_record.PEER_LOST matches: the failure of this machine's ranks is a consequence.
            self.reason = self.reason or f"remote process exited: {reasons[0]}"
            self._kill_ranks(signal.SIGKILL)


def judge_previous(plan: LaunchPlan) -> dict[str, Any]:
    """Judge the newest attempt of a run whose machines have all ended: return whether a repeated command continues it, and why.

    The budgets that apply on every backend stop a provider that repeats the command endlessly.
    """
    run, section = RunDir(Path(plan.run_dir)), StaticSection.of(plan.config.cluster)
    number = run_store.newest_attempt(run)
    if not number:
        return {"again": True, "reason": ""}
    end = postmortem.end_of_attempt(run, number, section, Evidence())
    decision = decide(end, postmortem.history(run, number), section)
    return {"again": decision.again, "reason": decision.reason}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(judge_previous(LaunchPlan.load(sys.argv[1]))))
    else:
        sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
