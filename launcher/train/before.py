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


def failure_before(run: RunDir, number: int) -> str:
    """What made the agents start ranks again within attempt `number`, else what ended the attempt that it follows by itself.

    Empty where the ranks have told it themselves, where there are only more of them now, or where it cannot be read.
    """
    with suppress(OSError, LauncherError, KeyError, TypeError):
        restarts = [event["text"] for event in read_events(run.events) if (event["attempt"], event["kind"]) == (number, RESTART)]
        if restarts:
            return str(restarts[-1])
        if number == 1 or not run_store.read_attempt(run, number).automatic:
            return ""
        folder = run.attempt(number - 1)
        ended = run_store.read_json(folder / "exit.json")
        if ended["cause"] != Cause.RESIZED and not (folder / "outcome.json").is_file():
            first = ended["first_failure"]
            log = f" (log: {first['log']})" if first else ""
            return f"attempt {number - 1} ended ({ended['cause']}): {ended['message']}{log}; this one follows it"
    return ""
