"""Why the ranks before these ended, where no rank was left to tell W&B."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from launcher import run_store
from launcher.errors import LauncherError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events

# The field, in the alert by which a node's agent tells that it starts its ranks again, of how often it has.
RESTART = "restart"


class Failure(NamedTuple):
    """What has failed, in words; `recorded` where events.jsonl tells it already."""

    words: str
    recorded: bool


def failure_before(run: RunDir, number: int) -> Failure | None:
    """What made the agents start ranks again within attempt `number`, else what ended the attempt that it follows by itself.

    None where the ranks have told it themselves, where there are only more of them now, or where it cannot be read.
    """
    with suppress(OSError, LauncherError, KeyError, TypeError):
        alerts = [event for event in read_events(run.events) if event["kind"] == "alert"]
        restarts = [event["text"] for event in alerts if event["attempt"] == number and RESTART in event["fields"]]
        if restarts:
            return Failure(str(restarts[-1]), recorded=True)
        if number == 1 or not run_store.read_attempt(run, number).automatic:
            return None
        folder = run.attempt(number - 1)
        ended = run_store.read_json(folder / "exit.json")
        if ended["cause"] != Cause.RESIZED and not (folder / "outcome.json").is_file():
            first = ended["first_failure"]
            log = f" (log: {first['log']})" if first else ""
            how = f"ended ({ended['cause']}): "
            recorded = any(event["attempt"] == number - 1 and how in event["text"] for event in alerts)
            return Failure(f"attempt {number - 1} {how}{ended['message']}{log}; this one follows it", recorded)
    return None
