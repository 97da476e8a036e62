"""Why the ranks before these ended, where no rank was left to tell W&B."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from launcher import run_records, run_store
from launcher.errors import LauncherError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.plan.xids import BROKEN, LOST
from launcher.tracking.jsonl import read_events

# The field, in the alert by which a node's agent tells that it starts its ranks again, of how often it has.
RESTART = "restart"
# GPU faults that are named; one of a switch shows on all GPUs.
_MOST_FAULTS = 3
_BROKEN = (LOST, *(f"Xid {number} " for number in BROKEN))


class Failure(NamedTuple):
    """What has failed, in words; `recorded` where events.jsonl tells it already."""

    words: str
    recorded: bool


def failure_before(run: RunDir, number: int) -> Failure | None:
    """What made the agents start ranks again within attempt `number`, else what ended the attempt that it follows by itself.

    None where the ranks have told it themselves, where there are only more of them now, or where it cannot be read. The faults of
    GPUs that they had recorded are named as well: no rank has told those of, if no step came after them.
    """
    with suppress(OSError, LauncherError, KeyError, TypeError):
        alerts = [event for event in read_events(run.events) if event["kind"] == "alert"]
        own = [event for event in alerts if event["attempt"] == number]
        restarts = [i for i, event in enumerate(own) if RESTART in event["fields"]]
        if restarts:
            since = restarts[-2] if len(restarts) > 1 else 0
            return Failure(f"{own[restarts[-1]]['text']}{gpu_faults(own[since : restarts[-1]])}", recorded=True)
        if number == 1 or not run_store.read_attempt(run, number).automatic:
            return None
        record = run_records.read_exit(run, number - 1)
        if record is None or record.cause is None:
            return None
        if record.cause is not Cause.RESIZED and not run_records.outcome_file(run, number - 1).is_file():
            log = f" (log: {record.first_failure.log})" if record.first_failure else ""
            how = f"ended ({record.cause}): "
            told = [event for event in alerts if event["attempt"] == number - 1]
            recorded = any(how in event["text"] for event in told)
            words = f"attempt {number - 1} {how}{record.message}{log}; this one follows it{gpu_faults(told)}"
            return Failure(words, recorded)
    return None


def gpu_faults(alerts: Iterable[Mapping[str, Any]]) -> str:
    """What ranks have recorded among `alerts` of the faults of their GPUs, as the end of a sentence; empty where nothing.

    Those that a GPU has not got over come first: others follow them, on many GPUs.
    """
    found = list(dict.fromkeys(str(alert["text"]) for alert in alerts if str(alert["text"]).startswith(("Xid ", LOST))))
    found.sort(key=lambda text: not text.startswith(_BROKEN))
    more = len(found) - _MOST_FAULTS
    named = [*found[:_MOST_FAULTS], *([f"{more} more"] if more > 0 else [])]
    return f"; GPU faults: {'; '.join(named)}" if named else ""
