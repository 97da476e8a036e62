"""Why the ranks before these ended, where no rank was left to tell W&B."""

from __future__ import annotations

from contextlib import suppress

from launcher import run_store
from launcher.errors import LauncherError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events

# The kind of event by which a node's agent tells that it starts its ranks again.
RESTART = "restart"
# Ranks that are asked to save and stop have told it themselves.
_FAILURES = (Cause.INFRASTRUCTURE, Cause.BAD_NODE, Cause.FAILURE)


def failure_before(run: RunDir, number: int) -> str:
    """What made the agents start ranks again within attempt `number`, else what failed in the attempt that it follows by itself.

    Empty where nothing failed, or where that cannot be read.
    """
    with suppress(OSError, LauncherError, KeyError, TypeError):
        restarts = [event["text"] for event in read_events(run.events) if (event["attempt"], event["kind"]) == (number, RESTART)]
        if restarts:
            return str(restarts[-1])
        if number == 1 or not run_store.read_attempt(run, number).automatic:
            return ""
        ended = run_store.read_json(run.attempt(number - 1) / "exit.json")
        if ended["cause"] in _FAILURES:
            first = ended["first_failure"]
            log = f" (log: {first['log']})" if first else ""
            return f"attempt {number - 1} failed ({ended['cause']}): {ended['message']}{log}; this one follows it"
    return ""
