"""The result of a drill as a pure function of the run's records, and its lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.clusters.backends import InjectedFault
from launcher.run_records import ExitRecord

# An attempt and the number of restarts of its ranks by the node agents: one life of all ranks.
Life = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A trained step and its time, in seconds since the epoch."""

    life: Life
    number: int
    loss: float
    time: float


@dataclass(frozen=True)
class Records:
    """The records of a run after a fault, once it has ended or recovered.

    Attributes:
        injected, life, saved_step: the fault, the life of the run that it hit, and the newest checkpoint at that time.
        steps: in the order of training.
        exit_record: of the attempt that was hit; None if the attempt continued.
        committed, intact: steps of all checkpoints that the drill saw, and of those that are complete at the end.
        resumed_attempt: the attempt that the drill started with `resume`, as a user would; None if the run continued by itself.
        last_status: last state and message of the run before that.
    """

    fault: str
    device: str
    run: str
    keep_last: int
    injected: InjectedFault
    life: Life
    saved_step: int
    steps: Sequence[Step]
    exit_record: ExitRecord | None
    committed: frozenset[int]
    intact: frozenset[int]
    resumed_attempt: int | None
    last_status: str


def progress(steps: Sequence[Step], hit: Life) -> tuple[int, list[Step]]:
    """Return the last step of the life that was hit, and the steps of later lives."""
    last = max((step.number for step in steps if step.life <= hit), default=0)
    return last, [step for step in steps if step.life > hit]


def judge(records: Records) -> dict[str, Any]:
    """Return the report, with `has_recovered` and `problems`; times are seconds since the fault, None for what did not happen."""
    at = records.injected.at
    last, again = progress(records.steps, records.life)
    beyond = [step for step in again if step.number > last]
    resumed = again[0].number - 1 if again else None
    before = {step.number: step.loss for step in records.steps if step.life <= records.life}
    replayed = [abs(step.loss - before[step.number]) for step in again if step.number in before]
    # Retention removes older ones.
    expected = sorted(records.committed | records.intact)[-records.keep_last :]
    lost = [step for step in expected if step not in records.intact]
    num_differing = sum(difference != 0 for difference in replayed)
    problems = []
    if resumed is None:
        problems.append(f"the run did not train again: {records.last_status}")
    elif not beyond and not records.last_status.startswith("completed"):
        problems.append(f"the run trained again but did not get past step {last}: {records.last_status}")
    if lost:
        problems.append(f"committed checkpoints are missing or damaged: step {', '.join(map(str, lost))}")
    if resumed is not None and resumed < records.saved_step:
        problems.append(f"the run continued from step {resumed}, although step {records.saved_step} was saved before the fault")
    if records.fault == "preempt" and resumed is not None and last > resumed:
        problems.append("the run lost steps despite the notice: the save after the signal was not committed")
    # GPUs may add in a different order each time.
    if num_differing and records.device == "cpu":
        problems.append("the losses of the repeated steps differ: the restored state or the rows are not the same")
    happened, continued = _describe(records, again)
    return {
        "fault": records.fault,
        "run": records.run,
        "action": records.injected.description,
        "host": records.injected.host,
        "happened": happened,
        "continued": continued,
        "reached_step": last,
        "resumed_step": resumed,
        "lost_steps": None if resumed is None else last - resumed,
        "trains_again_s": again[0].time - at if again else None,
        "caught_up_s": beyond[0].time - at if beyond else None,
        "checkpoints_kept": sorted(records.intact),
        "replayed_steps": len(replayed),
        "differing_steps": num_differing,
        "problems": problems,
        "has_recovered": not problems,
    }


def _describe(records: Records, again: Sequence[Step]) -> tuple[str, str]:
    """Return why the life that was hit ended, from the run's records or the cluster, and how the run continued."""
    number, restart = again[0].life if again else (0, 0)
    is_same = number == records.life[0]
    if (record := records.exit_record) is not None:
        happened = " ".join(f"{record.cause or record.state}: {record.message}".split())
    else:
        happened = "the node agents restarted all ranks" if is_same else records.last_status
    if not again:
        return happened, "no"
    if is_same:
        return happened, f"in the same allocation, restart {restart} of its ranks"
    who = "the drill, as a user would (python -m launcher resume)" if number == records.resumed_attempt else "the launcher"
    return happened, f"as attempt {number}, started by {who}"


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines for the terminal, without what did not happen."""
    shown = {name.removesuffix("_s").replace("_", " "): value for name, value in report.items() if value not in (None, [])}
    values = {name: f"{value:.1f} s" if isinstance(value, float) else value for name, value in shown.items()}
    return [f"{name:<18}{', '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in values.items()]
