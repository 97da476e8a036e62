"""What happens after an attempt has ended: run it again, and without which nodes, or leave it to a person.

`decide` only returns a value; one place acts on it (launcher.worker.slurm.job).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.config.cluster import ManagedSection


class Cause(StrEnum):
    """Why an attempt ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    LIMIT = "limit"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    INFRASTRUCTURE = "infrastructure"
    BAD_NODE = "bad_node"
    RESIZED = "resized"
    FAILURE = "failure"
    USER_ERROR = "user_error"


@dataclass(frozen=True)
class Ended:
    """How one attempt ended; the steps are those of the newest checkpoint when it began and then, None where there was none."""

    cause: Cause
    began_step: int | None
    saved_step: int | None
    message: str = ""
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """`again`: run the next attempt, without the nodes in `exclude`. `state` is what the run is until then.

    Nodes are left out until a newer checkpoint is there: what a check finds may pass, and a few nodes less may be too few.
    """

    again: bool
    state: str
    reason: str
    exclude: tuple[str, ...] = ()


# Preemptions and changes of size without a newer checkpoint between them that a run survives: its machines are never left to it
# for long enough.
MOST_FRUITLESS_PREEMPTIONS = 20
_FINAL = {Cause.COMPLETED: "completed", Cause.CANCELLED: "cancelled", Cause.LIMIT: "preempted"}
_FAILED_MACHINES = (Cause.INFRASTRUCTURE, Cause.BAD_NODE)
_TAKEN_AWAY = (Cause.PREEMPTED, Cause.RESIZED)
_OF_THE_MACHINES = (*_TAKEN_AWAY, *_FAILED_MACHINES)


def decide(ended: Ended, history: Sequence[Ended], budgets: ManagedSection) -> Decision:
    """Decide what follows `ended`; `history` holds the attempts before it, oldest first.

    A run of its own accord continues after preemptions, time limits and failures of the machines as long as each kind
    stays within its budget and checkpoints move on. A mistake of the user's ends it at once: it would repeat itself.
    """
    if ended.cause in _FINAL:
        return Decision(False, _FINAL[ended.cause], ended.message)
    if ended.cause is Cause.USER_ERROR:
        return Decision(False, "failed", ended.message)
    attempts = [*history, ended]
    stopped = _spent(attempts, budgets) or _stuck(attempts, budgets.max_no_progress)
    if stopped:
        return Decision(False, "failed", "; ".join(filter(None, (ended.message, stopped))))
    # A check may fail for a moment, and a run that has begun is not lost to that; nor is it tried for ever.
    seldom = bool(history) and history[-1].cause is not Cause.BAD_NODE
    if ended.cause is Cause.BAD_NODE and not budgets.leaves_out_bad_nodes and not seldom:
        return Decision(False, "failed", f"{ended.message}; {budgets.bad_node_remedy}")
    bad = dict.fromkeys(node for attempt in attempts[_newest_move(attempts) :] for node in attempt.bad_nodes)
    return Decision(True, "pending", ended.message, tuple(bad) if budgets.leaves_out_bad_nodes else ())


def _spent(attempts: Sequence[Ended], budgets: ManagedSection) -> str:
    """The budget that the last attempt overdrew, in words; empty where none is.

    What ends a run that moves on is counted anew from the last attempt that left a newer checkpoint; that attempt's own
    end counts, for it came after the checkpoint.
    """
    since = _newest_move(attempts)
    kinds: tuple[tuple[str, int | None, tuple[Cause, ...]], ...] = (
        ("cluster.max_preemptions", budgets.max_preemptions, (Cause.PREEMPTED,)),
        ("cluster.max_infrastructure_failures", budgets.max_infrastructure_failures, _FAILED_MACHINES),
        ("cluster.max_failures", budgets.max_failures, (Cause.FAILURE,)),
    )
    for key, budget, causes in kinds:
        counted = attempts if causes == (Cause.PREEMPTED,) else attempts[since:]
        count = sum(attempt.cause in causes for attempt in counted)
        if budget is not None and attempts[-1].cause in causes and count > budget:
            return f"{key}={budget} is used up"
    fruitless = [attempt.cause for attempt in attempts[since:] if attempt.cause in _TAKEN_AWAY and not _moved(attempt)]
    if attempts[-1].cause in _TAKEN_AWAY and len(fruitless) >= MOST_FRUITLESS_PREEMPTIONS:
        what = "preemptions and changes of size" if Cause.RESIZED in fruitless else "preemptions"
        remedy = (
            "raise cluster.resize_seconds"
            if attempts[-1].cause is Cause.RESIZED
            else "save more often with checkpoint.save_every"
        )
        return f"{len(fruitless)} {what} without a newer checkpoint between them; {remedy}"
    return ""


def _newest_move(attempts: Sequence[Ended]) -> int:
    """The index of the last attempt that left a newer checkpoint, 0 where none did."""
    return max((i for i, attempt in enumerate(attempts) if _moved(attempt)), default=0)


def _moved(attempt: Ended) -> bool:
    """True where the attempt left a checkpoint newer than the one it began with."""
    return attempt.saved_step is not None and (attempt.began_step is None or attempt.saved_step > attempt.began_step)


def _stuck(attempts: Sequence[Ended], budget: int) -> str:
    """Said where more than `budget` attempts in a row have ended without a checkpoint newer than the one they began with."""
    in_a_row = 0
    for attempt in attempts:
        # What the machines ended says nothing about the run, and has budgets of its own.
        in_a_row = 0 if _moved(attempt) or attempt.cause in _OF_THE_MACHINES else in_a_row + 1
    return (
        f"{in_a_row} attempts in a row without a newer checkpoint (cluster.max_no_progress={budget})" if in_a_row > budget else ""
    )
