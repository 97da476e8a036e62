"""How an attempt ended and what follows, told from what is on disk; shared by the backends that run a run again by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from launcher import atomic_files, json_records, run_store
from launcher.checkpoint import store
from launcher.config.cluster import ManagedSection
from launcher.plan.retry import Cause, Decision, Ended, decide
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker import postmortem
from launcher.worker.postmortem import Ending


@dataclass(frozen=True)
class Conclusion:
    """`found` is how the attempt ended, `ended` the same for the budgets, `decision` what plan.retry makes of it."""

    found: Ending
    ended: Ended
    decision: Decision

    @property
    def message(self) -> str:
        return f"{self.decision.reason}; runs again" if self.decision.again else self.decision.reason

    @property
    def alert(self) -> str | None:
        """What is told at once of an attempt that ended otherwise than it was meant to."""
        if self.decision.state in ("completed", "cancelled") or self.found.cause is Cause.LIMIT:
            return None
        return f"the attempt ended ({self.found.cause}): {self.message}"

    def record(self, run: RunDir, number: int, decided: bool = True) -> None:
        """Write exit.json; `decided` is False where the decision is still to be made by the next start."""
        values: dict[str, Any] = {
            "state": self.decision.state if decided else "failed",
            "cause": self.found.cause,
            "step": self.found.step,
            "message": self.found.message,
            "began_step": self.ended.began_step,
            "saved_step": self.ended.saved_step,
            "bad_nodes": self.found.bad_nodes,
            "first_failure": self.found.first_failure,
            # Who decides later does not know when it was.
            "ended_at": time.time() if decided else None,
        }
        atomic_files.write_json(run.attempt(number) / "exit.json", values)


def conclude(
    run: RunDir,
    number: int,
    attempt: Attempt,
    section: ManagedSection,
    state: str = "",
    exit_code: int | None = None,
    gone: Collection[str] | None = None,
) -> Conclusion:
    """Judge attempt `number`; `state` is the scheduler's word for its machines, empty where it is not known.

    `gone` are those of its nodes that Ray has lost, None where that is not known.
    """
    found = postmortem.read(run, number, attempt, state, section.lead_s, exit_code, gone)
    ended = Ended(found.cause, attempt.resume_step, store.newest_step(run.checkpoints), found.message, found.bad_nodes)
    return Conclusion(found, ended, decide(ended, history(run, number), section))


def ended_before(
    run: RunDir,
    number: int,
    section: ManagedSection,
    state: str = "",
    gone: Collection[str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Ended:
    """How attempt `number` ended; where it left no word, its machines are taken for lost, or as `state` and `gone` say.

    Nobody has been told of that yet: `tell` gets the alert where the run goes on. Whoever ends it says so.
    """
    file = run.attempt(number) / "exit.json"
    if file.is_file():
        return _from_record(json_records.read_json(file))
    concluded = conclude(run, number, run_store.read_attempt(run, number), section, state, gone=gone)
    concluded.record(run, number, decided=False)
    if tell is not None and concluded.decision.again and concluded.alert is not None:
        tell(concluded.alert)
    return concluded.ended


def history(run: RunDir, number: int) -> list[Ended]:
    """The attempts before `number` back to the one that a person started, oldest first."""
    found: list[Ended] = []
    while number > 1 and run_store.read_attempt(run, number).automatic:
        number -= 1
        file = run.attempt(number) / "exit.json"
        if file.is_file():
            found.insert(0, _from_record(json_records.read_json(file)))
    return found


def _from_record(record: dict[str, Any]) -> Ended:
    return Ended(
        Cause(record["cause"]), record["began_step"], record["saved_step"], record["message"], tuple(record["bad_nodes"])
    )
