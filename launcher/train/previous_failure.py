"""Why the previous ranks ended, if none of them could report it to the trackers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from launcher.errors import LauncherError
from launcher.nvml import BROKEN_XIDS, LOST_GPU
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.tracking.jsonl import read_events

# In the alert of a node agent that restarts its ranks: the field with the number of restarts.
RESTART = "restart"
# Maximum number of GPU faults to name; a switch fault shows on all GPUs.
_MOST_FAULTS = 3
_BROKEN = (LOST_GPU, *(f"Xid {number} " for number in BROKEN_XIDS))


class PreviousFailure(NamedTuple):
    """The message about a failure; `is_recorded` is true if events.jsonl has it already."""

    message: str
    is_recorded: bool


def find_previous_failure(run: RunDir, number: int) -> PreviousFailure | None:
    """Return why node agents restarted the ranks of attempt `number`; otherwise, why the attempt before it ended, if it was
    continued automatically.

    Returns None if the ranks reported it themselves, if the run only changed its size, or if the records cannot be read. The
    message names GPU faults that the ranks recorded: a rank reports them with its next step, which it may never have reached.
    """
    with suppress(OSError, LauncherError, KeyError, TypeError):
        alerts = [event for event in read_events(run.events) if event["kind"] == "alert"]
        own = [event for event in alerts if event["attempt"] == number]
        restarts = [i for i, event in enumerate(own) if RESTART in event["fields"]]
        if restarts:
            since = restarts[-2] if len(restarts) > 1 else 0
            return PreviousFailure(
                f"{own[restarts[-1]]['text']}{describe_gpu_faults(own[since : restarts[-1]])}", is_recorded=True
            )
        if number == 1 or not run_store.read_attempt(run, number).automatic:
            return None
        record = journal.read_end(run, number - 1)
        if record is None:
            return None
        if record.cause is not Cause.RESIZED and journal.read_training(run, number - 1) is None:
            log = f" (log: {record.first_failure.log})" if record.first_failure else ""
            how = f"ended ({record.cause}): "
            earlier = [event for event in alerts if event["attempt"] == number - 1]
            is_recorded = any(how in event["text"] for event in earlier)
            message = (
                f"attempt {number - 1} {how}{record.message}{log}; this attempt continues the run{describe_gpu_faults(earlier)}"
            )
            return PreviousFailure(message, is_recorded)
    return None


def describe_gpu_faults(alerts: Iterable[Mapping[str, Any]]) -> str:
    """Return the GPU faults among `alerts` as the end of a sentence; empty if there are none.

    Faults that a GPU does not recover from come first, because they cause the others, often on many GPUs.
    """
    faults = list(dict.fromkeys(str(alert["text"]) for alert in alerts if str(alert["text"]).startswith(("Xid ", LOST_GPU))))
    faults.sort(key=lambda text: not text.startswith(_BROKEN))
    more = len(faults) - _MOST_FAULTS
    named = [*faults[:_MOST_FAULTS], *([f"{more} more"] if more > 0 else [])]
    return f"; GPU faults: {'; '.join(named)}" if named else ""
