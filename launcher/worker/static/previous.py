"""Decides whether a repeated command continues a run: `python -m launcher.worker.static.previous PLAN` prints a JSON object.

The previous attempt is judged by its records and by the budgets that apply on every backend. A user error, which ends the run on
backends that start attempts by themselves, counts as a failure here, because a person may have corrected it meanwhile. The
budget stops a provider that repeats the command endlessly.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher import run_store
from launcher.clusters.static import nodes
from launcher.config.sections.static import StaticSection
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import AttemptEnd, Cause, decide
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem


@dataclass(frozen=True)
class Continuation:
    """`over` means that nothing is left to do. Otherwise `again` is whether the run continues, and `reason` why it does not."""

    over: bool
    again: bool
    reason: str


def judge_previous(plan: LaunchPlan) -> Continuation:
    """Judge the newest attempt of a run whose machines have all ended."""
    run, section = RunDir(Path(plan.run_dir)), StaticSection.of(plan.config.cluster)
    number = run_store.newest_attempt(run)
    if not number:
        return Continuation(False, True, "")
    record = run_store.read_attempt(run, number)

    def alert(text: str) -> None:
        with suppress(OSError):
            append_event(run, number, "alert", text)

    silence = nodes.describe_silence(nodes.read_states(run, number, record))
    end = postmortem.end_of_attempt(run, number, section, on_alert=alert, silence=silence)
    if end.cause in (Cause.COMPLETED, Cause.CANCELLED, Cause.LIMIT):
        return Continuation(True, False, f"{plan.run_name} is {end.cause}: {end.message}")
    decision = decide(_correctable(end), [_correctable(end) for end in postmortem.history(run, number)], section)
    # A machine that failed its check may since have been replaced.
    again = decision.again or (end.cause is Cause.BAD_NODE and len(postmortem.history(run, number)) < section.max_failures)
    return Continuation(False, again, decision.reason)


def _correctable(end: AttemptEnd) -> AttemptEnd:
    return replace(end, cause=Cause.FAILURE) if end.cause is Cause.USER_ERROR else end


if __name__ == "__main__":
    print(json.dumps(asdict(judge_previous(LaunchPlan.load(sys.argv[1])))))
