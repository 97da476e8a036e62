"""The result of a drill as a pure function of the run's records, and its lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from launcher.plan.quantities import format_count
from launcher.run_records import Attempt, ExitRecord

# An attempt and the number of restarts of its ranks by the node agents: one life of all ranks.
Life = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A trained step and its time, in seconds since the epoch."""

    life: Life
    number: int
    loss: float
    time: float

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Step:
        """From a line of metrics.jsonl that has a loss."""
        life = line["attempt"], int(line["run/restarts"])
        return cls(life, int(line["trainer/step"]), line["train/loss"], line["time"])


@dataclass(frozen=True)
class Hit:
    """The injected fault: the action, its time (seconds since the epoch), its node, and the life of the run that it hit."""

    action: str
    at: float
    host: str
    life: Life
    saved_step: int


@dataclass(frozen=True)
class Records:
    """The records of a run after a fault, once it has ended or recovered.

    Attributes:
        steps: in the order of training.
        exits: exit records by attempt.
        errors: messages of the ranks in the attempt that was hit.
        committed: steps of all checkpoints that the drill saw.
        resumed_attempt: the attempt that the drill started with `resume`, as a user would; None if the run continued by itself.
        ended_as: state and message with which the run ended before that; empty if it did not.
        last_status: last state and message of the run.
    """

    fault: str
    device: str
    run: str
    checkpoints: str
    keep_last: int
    hit: Hit
    steps: Sequence[Step]
    attempts: Mapping[int, Attempt]
    exits: Mapping[int, ExitRecord]
    errors: Sequence[str]
    committed: frozenset[int]
    resumed_attempt: int | None
    ended_as: str
    last_status: str


@dataclass(frozen=True)
class Report:
    """The result. Steps are optimizer steps, times are seconds since the fault; None for events that did not happen."""

    fault: str
    run: str
    action: str
    host: str
    happened: str
    continued: str
    reached_step: int
    resumed_step: int | None
    lost_steps: int | None
    trains_again_s: float | None
    caught_up_s: float | None
    checkpoints_kept: tuple[int, ...]
    checkpoints_lost: tuple[int, ...]
    replayed_steps: int
    differing_steps: int
    largest_difference: float
    problems: tuple[str, ...] = ()

    @property
    def has_recovered(self) -> bool:
        return not self.problems

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "has_recovered": self.has_recovered}, indent=2)


def progress(steps: Sequence[Step], hit: Life) -> tuple[int, list[Step]]:
    """Return the last step of the life that was hit, and the steps of later lives."""
    last = max((step.number for step in steps if step.life <= hit), default=0)
    return last, [step for step in steps if step.life > hit]


def judge(records: Records, intact_steps: frozenset[int]) -> Report:
    """Return whether the run recovered, and how; `intact_steps` are the steps of its intact checkpoints."""
    hit = records.hit
    last, again = progress(records.steps, hit.life)
    beyond = [step for step in again if step.number > last]
    resumed = again[0].number - 1 if again else None
    before = {step.number: step.loss for step in records.steps if step.life <= hit.life}
    replayed = [abs(step.loss - before[step.number]) for step in again if step.number in before]
    # Retention removes older ones.
    expected = sorted(records.committed | intact_steps)[-records.keep_last :]
    report = Report(
        fault=records.fault,
        run=records.run,
        action=hit.action,
        host=hit.host,
        happened=_happened(records, again),
        continued=_continued(records, again),
        reached_step=last,
        resumed_step=resumed,
        lost_steps=None if resumed is None else last - resumed,
        trains_again_s=again[0].time - hit.at if again else None,
        caught_up_s=beyond[0].time - hit.at if beyond else None,
        checkpoints_kept=tuple(sorted(intact_steps)),
        checkpoints_lost=tuple(step for step in expected if step not in intact_steps),
        replayed_steps=len(replayed),
        differing_steps=sum(difference != 0 for difference in replayed),
        largest_difference=max(replayed, default=0.0),
    )
    return replace(report, problems=tuple(_problems(report, records)))


def _happened(records: Records, again: Sequence[Step]) -> str:
    """Return why the life that was hit ended, from the run's records or the cluster."""
    record = records.exits.get(records.hit.life[0])
    if records.fault == "fill-disk" and (error := _disk_error(records)):
        return error
    if record is not None:
        return " ".join(f"{record.cause or record.state}: {record.message}".split())
    if again and again[0].life[0] == records.hit.life[0]:
        return "the node agents restarted all ranks"
    return records.ended_as or records.last_status


def _disk_error(records: Records) -> str | None:
    """Return the message of a rank that could not write a checkpoint, or None."""
    record = records.exits.get(records.hit.life[0])
    messages = (*records.errors, record.message if record is not None else "")
    for message in messages:
        if records.checkpoints in message:
            first, *more = message.splitlines()
            return " ".join(" ".join([first, *takewhile(lambda line: line.startswith(" "), more)]).split())
    return None


def _saved_since(records: Records) -> int | None:
    """Return the step of the newest checkpoint committed after the fault, or None."""
    newest = max(records.committed, default=0)
    return newest if newest > records.hit.saved_step else None


def _continued(records: Records, again: Sequence[Step]) -> str:
    if not again and records.fault == "fill-disk" and (saved := _saved_since(records)):
        return f"training continued, and step {saved} was saved once there was space again"
    if not again:
        return "no"
    number, restart = again[0].life
    job, before = records.attempts[number].job, records.attempts[records.hit.life[0]].job
    where = f"job {job}" if job else "this machine"
    if number == records.hit.life[0]:
        return f"in the same allocation ({where}), restart {restart} of its ranks"
    if number == records.resumed_attempt:
        return f"as attempt {number}, which the drill started, as a user would (python -m launcher resume)"
    return f"as attempt {number}, {'requeued as the same' if job == before else 'submitted again as another'} {where}"


def _problems(report: Report, records: Records) -> Iterator[str]:
    if records.fault == "fill-disk" and _saved_since(records):
        pass
    elif report.resumed_step is None:
        yield f"the run did not train again: {records.last_status}"
    elif report.caught_up_s is None and not records.last_status.startswith("completed"):
        yield f"the run trained again but did not get past step {report.reached_step}: {records.last_status}"
    if report.checkpoints_lost:
        yield f"committed checkpoints are missing or damaged: step {', '.join(map(str, report.checkpoints_lost))}"
    if report.resumed_step is not None and report.resumed_step < records.hit.saved_step:
        saved = records.hit.saved_step
        yield f"the run continued from step {report.resumed_step}, although step {saved} was saved before the fault"
    if records.fault == "preempt" and report.lost_steps:
        yield "the run lost steps despite the notice: the save after the signal was not committed"
    if records.fault == "fill-disk" and _disk_error(records) is None:
        yield "no rank reported that it could not write a checkpoint"
    # GPUs may add in a different order each time.
    if report.differing_steps and records.device == "cpu":
        yield "the losses of the repeated steps differ: the restored state or the rows are not the same"


def lines(report: Report) -> list[str]:
    """Return the report as lines for the terminal."""
    resumed = "" if report.resumed_step is None else f", continued from {report.resumed_step}: {report.lost_steps} lost"
    intact_steps = ", ".join(map(str, report.checkpoints_kept)) or "none"
    rows = [
        ("fault", f"{report.fault}: {report.action} on {report.host}"),
        ("happened", report.happened),
        ("continued", report.continued),
        ("steps", f"reached {report.reached_step}{resumed}"),
        ("seconds", _seconds(report)),
        ("kept", f"checkpoints of step {intact_steps}"),
        ("losses", _losses(report)),
        *(("problem", problem) for problem in report.problems),
        ("verdict", "recovered" if report.has_recovered else "did NOT recover"),
    ]
    return [f"{label:<11}{value}" for label, value in rows]


def _seconds(report: Report) -> str:
    if report.trains_again_s is None:
        return "-"
    caught_up = "" if report.caught_up_s is None else f", {report.caught_up_s:.1f} until it was past step {report.reached_step}"
    return f"{report.trains_again_s:.1f} from the fault to the next step{caught_up}"


def _losses(report: Report) -> str:
    if not report.replayed_steps:
        return "no step was repeated"
    steps = f"{format_count(report.replayed_steps, 'step')} repeated"
    if not report.differing_steps:
        return f"{steps}, all with the same loss"
    return f"{steps}, {report.differing_steps} with a different loss (by at most {report.largest_difference:.2g})"
