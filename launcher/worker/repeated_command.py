"""Decides whether a repeated command continues a run: `python -m launcher.worker.repeated_command PLAN` prints a JSON object.

The previous attempt is judged by its records and by the budgets that apply on every backend. A user error, which ends the run on
backends that start attempts by themselves, counts as a failure here, because a person may have corrected it meanwhile. The
budget stops a provider that repeats the command endlessly.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.clusters import static
from launcher.config.sections.static import StaticSection
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import AttemptEnd, Cause, decide
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem


def judge_previous(plan: LaunchPlan) -> dict[str, Any]:
    """Judge the newest attempt of a run whose machines have all ended.

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
    end = postmortem.end_of_attempt(run, number, section, on_alert=alert, silence=silence)
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
    print(json.dumps(judge_previous(LaunchPlan.load(sys.argv[1]))))
