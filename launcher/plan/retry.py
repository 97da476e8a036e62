"""The retry policy: whether a run continues after an attempt has ended, and which nodes it avoids. Pure.

`decide` only returns a value; launcher.worker.slurm.job and launcher.worker.ray.attempts act on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from launcher.shell_commands import launcher_command

if TYPE_CHECKING:
    from launcher.config.sections.cluster import ManagedSection


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
class RestartedRanks:
    """Why the node agents restarted the ranks within an attempt.

    `exception` is the class of the Python exception that ended them, empty if a signal, a hang or broken hardware did. `step` is
    the number of completed optimizer steps, None before the model was loaded. `saved_step` is the step of the newest checkpoint.
    """

    exception: str
    step: int | None
    saved_step: int | None


@dataclass(frozen=True)
class AttemptEnd:
    """How one attempt ended.

    `began_step` and `saved_step` are the steps of the newest checkpoint at its start and at its end, None if there was none.
    `exception` and `step` are as in RestartedRanks; `restarts` are those of the ranks within the attempt, oldest first.
    """

    cause: Cause
    began_step: int | None
    saved_step: int | None
    message: str = ""
    bad_nodes: tuple[str, ...] = ()
    exception: str = ""
    step: int | None = None
    restarts: tuple[RestartedRanks, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Whether to run the next attempt (`again`), without the nodes in `exclude`; `state` is the run's state until then.

    Nodes are excluded until there is a newer checkpoint, because their fault may be temporary, and the other nodes may be too
    few.
    """

    again: bool
    state: str
    reason: str
    exclude: tuple[str, ...] = ()


# A run ends after this many consecutive preemptions and changes of size without a newer checkpoint: it never keeps its machines
# long enough.
MOST_FRUITLESS_PREEMPTIONS = 20
# A run continues after this many consecutive attempts without a newer checkpoint, apart from those that machines ended.
_MOST_WITHOUT_PROGRESS = 2
# The first failure and two resumes from one checkpoint: the same exception at the same step is then no coincidence.
_NUM_REPEATS = 3
FINAL = {Cause.COMPLETED: "completed", Cause.CANCELLED: "cancelled", Cause.LIMIT: "preempted"}
_FAILED_MACHINES = (Cause.INFRASTRUCTURE, Cause.BAD_NODE)
_TAKEN_AWAY = (Cause.PREEMPTED, Cause.RESIZED)
_OF_THE_MACHINES = (*_TAKEN_AWAY, *_FAILED_MACHINES)


def decide(last: AttemptEnd, history: Sequence[AttemptEnd], budgets: ManagedSection) -> Decision:
    """Decide what follows an attempt; `history` has the ends of earlier attempts, oldest first.

    A run continues after preemptions, time limits and machine failures while each cause stays within its budget and the run
    writes newer checkpoints. A user error ends the run at once, because the next attempt would fail in the same way. So does an
    exception that recurs at the same step after two resumes from one checkpoint.
    """
    if last.cause in FINAL:
        return Decision(False, FINAL[last.cause], last.message)
    # Whoever repeats the command of a backend that does not continue runs may have corrected the settings, or the machine.
    if last.cause is Cause.USER_ERROR and budgets.continues_by_itself:
        return Decision(False, "failed", last.message)
    attempts = [*history, last]
    reason = describe_repetition(attempts) or _describe_spent_budget(attempts, budgets)
    if reason:
        return Decision(False, "failed", "; ".join(filter(None, (last.message, reason))))
    # A failed check may be temporary: a run that has begun gets one more attempt with the same nodes.
    is_first_failed_check = bool(history) and history[-1].cause is not Cause.BAD_NODE
    needs_repair = budgets.continues_by_itself and not budgets.leaves_out_bad_nodes and not is_first_failed_check
    if last.cause is Cause.BAD_NODE and needs_repair:
        doctor = launcher_command("doctor", f"+cluster={budgets.kind}")
        return Decision(False, "failed", f"{last.message}; {budgets.bad_node_remedy}; check the nodes with: {doctor}")
    bad_nodes = dict.fromkeys(node for attempt in attempts[_find_newest_progress(attempts) :] for node in attempt.bad_nodes)
    return Decision(True, "pending", last.message, tuple(bad_nodes) if budgets.leaves_out_bad_nodes else ())


def describe_repetition(attempts: Sequence[AttemptEnd]) -> str:
    """Return a message if the same exception recurred at the same step after two resumes from one checkpoint; otherwise "".

    A restart of the ranks within an attempt also counts as a resume. The last of `attempts` may still be in progress: its ranks
    have ended and would be restarted.
    """
    last = attempts[-1]
    # For each start of the ranks, the step from which they started and how they ended. Machine failures are left out: they say
    # nothing about the exceptions before and after them.
    ends: list[tuple[int | None, RestartedRanks]] = []
    for attempt in attempts:
        began_step = attempt.began_step
        for ranks in attempt.restarts:
            if ranks.exception:
                ends.append((began_step, ranks))
            began_step = ranks.saved_step
        if attempt.cause not in _OF_THE_MACHINES:
            ends.append((began_step, RestartedRanks(attempt.exception, attempt.step, attempt.saved_step)))
    ends = ends[-_NUM_REPEATS:]
    expected = (last.exception, last.step, last.saved_step)
    is_same = all((ranks.exception, ranks.step, ranks.saved_step) == expected for _, ranks in ends)
    is_resumed = all(began_step == last.saved_step for began_step, _ in ends[1:])
    if not last.exception or len(ends) < _NUM_REPEATS or not is_same or not is_resumed:
        return ""
    activity = "before the first step" if last.step is None else f"in step {last.step + 1}"
    start = "the initial weights" if last.saved_step is None else f"the checkpoint of step {last.saved_step}"
    return f"{last.exception} {activity} occurred {_NUM_REPEATS} times, twice after a resume from {start}: it repeats"


def _describe_spent_budget(attempts: Sequence[AttemptEnd], budgets: ManagedSection) -> str:
    """Return a message if the last attempt exceeded a budget, or too many attempts left no newer checkpoint; otherwise "".

    Causes are counted from the last attempt that left a newer checkpoint. The end of that attempt counts too, because it came
    after the checkpoint.
    """
    since = _find_newest_progress(attempts)
    kinds: tuple[tuple[str, int, tuple[Cause, ...]], ...] = (
        ("cluster.max_infrastructure_failures", budgets.max_infrastructure_failures, _FAILED_MACHINES),
        ("cluster.max_failures", budgets.max_failures, (Cause.FAILURE,)),
    )
    for key, budget, causes in kinds:
        count = sum(attempt.cause in causes for attempt in attempts[since:])
        if attempts[-1].cause in causes and count > budget:
            return f"{key}={budget} is used up"
    fruitless = [attempt.cause for attempt in attempts[since:] if attempt.cause in _TAKEN_AWAY and not _made_progress(attempt)]
    if attempts[-1].cause in _TAKEN_AWAY and len(fruitless) >= MOST_FRUITLESS_PREEMPTIONS:
        interruptions = "preemptions and changes of size" if Cause.RESIZED in fruitless else "preemptions"
        remedy = "save more often with checkpoint.save_every"
        return f"{len(fruitless)} {interruptions} without a newer checkpoint between them; {remedy}"
    in_a_row = 0
    for attempt in attempts:
        # Machine failures say nothing about the run, and have their own budgets.
        in_a_row = 0 if _made_progress(attempt) or attempt.cause in _OF_THE_MACHINES else in_a_row + 1
    return f"{in_a_row} attempts in a row without a newer checkpoint" if in_a_row > _MOST_WITHOUT_PROGRESS else ""


def _find_newest_progress(attempts: Sequence[AttemptEnd]) -> int:
    """Return the index of the last attempt that left a newer checkpoint, 0 if none did."""
    return max((i for i, attempt in enumerate(attempts) if _made_progress(attempt)), default=0)


def _made_progress(attempt: AttemptEnd) -> bool:
    """Return whether the attempt left a newer checkpoint than it started with."""
    return attempt.saved_step is not None and (attempt.began_step is None or attempt.saved_step > attempt.began_step)
