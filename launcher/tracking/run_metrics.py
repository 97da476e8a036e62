"""What metrics.jsonl says of a run: its main numbers, the steps that goodput needs, overfitting, and the loss on general text.

The main numbers come from a file of any length: only a few lines are decoded, the others are searched.
"""

from __future__ import annotations

import math
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.plan.run_dir import RunDir
from launcher.runs.run_records import Status
from launcher.tracking.jsonl import Line, continued_lines, decode_lines, iter_lines, read_metrics
from launcher.tracking.metrics import STEP
from launcher.tracking.verdicts import GeneralLoss

# Steps to take medians over: single steps vary.
_NUM_RECENT = 20
_TRAINED = b'"train/loss"'
# Patterns of lines that record a wait between steps.
_WAITS = (b'"time/eval_s"', b'"ckpt/stall_s"')
_LOSSES = ("train/loss", "eval/held_out/loss", "trainer/epoch")
_TRAIN_LOSS, _HELD_OUT_LOSS, _EPOCH = _LOSSES
# The held-out loss varies by about this share between evaluations of a model that has stopped learning.
_MIN_RISE_FRAC = 0.01


@dataclass(frozen=True)
class MetricsTail:
    """`recent` are the last training steps of one attempt, newest first; `losses` are sampled from the whole run."""

    recent: tuple[Line, ...]
    losses: tuple[float, ...]
    eval_loss: float | None
    eval_step: int | None

    @property
    def last(self) -> Line:
        """The last training step; empty if there is none."""
        return self.recent[0] if self.recent else {}


def read_tail(
    path: str | Path, num_points: int = 40, resumed: Mapping[int, int] | None = None, num_recent: int = _NUM_RECENT
) -> MetricsTail:
    """Read the main numbers of a run, with up to `num_points` losses and `num_recent` steps. A missing file counts as empty.

    `resumed` are the steps from which attempts continued: lines of later steps before the resume belong to a discarded model.
    """
    try:
        with _map_file(path) as data:
            recent = tuple(islice(_iter_backwards(data, _TRAINED), num_recent))
            newest = recent[0]["attempt"] if recent else 0
            begins = {number: step for number, step in (resumed or {}).items() if number <= newest}

            def counts(line: Line) -> bool:
                later = (step for number, step in begins.items() if number > line["attempt"])
                return bool(line["trainer/step"] <= min(later, default=math.inf))

            evaluated = next(filter(counts, _iter_backwards(data, b'"eval/held_out/loss"')), {})
            # The training steps that follow evenly spaced offsets.
            offsets = {data.find(_TRAINED, len(data) * i // num_points) for i in range(num_points)} - {-1}
            starts = sorted({data.rfind(b"\n", 0, offset) + 1 for offset in offsets})
            sampled = (line for start in starts for line in decode_lines(_read_line(data, start)))
            return MetricsTail(
                tuple(line for line in recent if line["attempt"] == recent[0]["attempt"]),
                tuple(line["train/loss"] for line in sampled if counts(line)),
                evaluated.get("eval/held_out/loss"),
                evaluated.get("trainer/step"),
            )
    except (FileNotFoundError, ValueError):
        return MetricsTail((), (), None, None)


def newest_trained_step(run: RunDir, status: Status) -> int:
    """Return the newest known step of a run with this status: the ranks log more often than they write status.json."""
    with suppress(OSError, ValueError), _map_file(run.metrics) as data:
        last = next(_iter_backwards(data, _TRAINED), None)
        if last is not None and last["attempt"] == status.attempt and last["time"] > status.updated_at:
            return int(last["trainer/step"])
    return status.step


def has_trained(run: RunDir, status: Status) -> bool:
    """Return whether a run has trained a step, according to its files; a checkpoint folder counts, whatever is in it."""
    with suppress(FileNotFoundError):
        if any(run.checkpoints.iterdir()):
            return True
    return newest_trained_step(run, status) > 0 or bool(read_tail(run.metrics).last)


def read_time_lines(path: str | Path, boundaries: Sequence[float]) -> list[Line]:
    """Return the lines of a run's metrics that `goodput.break_down` needs, in order: they give the same result as all lines.

    These are the lines of evaluations and saves, and the last training step before the end and before each of `boundaries`, the
    times (seconds since the epoch) at which ranks started and attempts began and ended.
    """
    try:
        with _map_file(path) as data:

            def read_time(offset: int) -> float:
                line = decode_lines(_read_line(data, data.rfind(b"\n", 0, offset) + 1))
                return float(line[0]["time"]) if line else -math.inf

            # Lines are in time order.
            ends = [*(bisect_right(range(len(data)), at, key=read_time) for at in boundaries), data.rfind(b"\n") + 1]
            offsets = {data.rfind(_TRAINED, 0, end) for end in ends}
            offsets |= {match.start() for pattern in _WAITS for match in re.finditer(pattern, data)}
            begins = sorted({data.rfind(b"\n", 0, offset) + 1 for offset in offsets - {-1}})
            return [line for begin in begins for line in decode_lines(_read_line(data, begin))]
    except (FileNotFoundError, ValueError):
        return []


@dataclass(frozen=True)
class Overfitting:
    """The held-out loss has risen since `step`, while the training loss fell. `gap` is their difference at the end, in nats.

    `epoch` is the epoch of `step`, None if unknown. Training losses are means over the steps up to an evaluation.
    """

    step: int
    epoch: float | None
    lowest: float
    last: float
    train_at_lowest: float
    train_at_last: float

    @property
    def gap(self) -> float:
        return self.last - self.train_at_last

    @property
    def summary(self) -> str:
        """The finding and its remedy in one sentence."""
        epoch = "" if self.epoch is None else f" (epoch {self.epoch:.1f})"
        rose = f"the held-out loss rose from {self.lowest:.4f} to {self.last:.4f}"
        fell = f"the training loss fell from {self.train_at_lowest:.4f} to {self.train_at_last:.4f}"
        remedy = "train fewer epochs, or set eval.stop_after and checkpoint.keep_best=1"
        return f"overfitting since step {self.step:,}{epoch}: {rose}, while {fell} (gap {self.gap:.4f}); {remedy}"


def find_overfitting(steps: Iterable[Mapping[str, Any]]) -> Overfitting | None:
    """Return since when a run overfits, from its metrics lines (one per step), or None if it does not or too little is known.

    It overfits if the last held-out loss is more than 1% above the lowest one, and the training loss has fallen since then.
    """
    evaluations: list[tuple[int, float | None, float, float]] = []
    losses: list[float] = []
    epoch = None
    for line in steps:
        epoch = line.get(_EPOCH, epoch)
        if _TRAIN_LOSS in line:
            losses.append(line[_TRAIN_LOSS])
        if _HELD_OUT_LOSS in line and losses:
            evaluations.append((line[STEP], epoch, line[_HELD_OUT_LOSS], math.fsum(losses) / len(losses)))
            losses = []
    if len(evaluations) < 2:
        return None
    step, epoch, lowest, train_at_lowest = min(evaluations, key=lambda one: one[2])
    _, _, last, train_at_last = evaluations[-1]
    if last <= lowest * (1 + _MIN_RISE_FRAC) or train_at_last >= train_at_lowest:
        return None
    return Overfitting(step, epoch, lowest, last, train_at_lowest, train_at_last)


def read_overfitting(run: RunDir) -> Overfitting | None:
    """Return since when a run overfits, from its metrics."""
    return find_overfitting(read_metrics(run.metrics, _LOSSES))


def read_general_loss(run: RunDir, step: int) -> GeneralLoss | None:
    """Return the loss on general text before training and at the last evaluation up to `step`, or None unless both exist."""
    losses = {at: loss for at, loss in _read_general_losses(run).items() if at <= step}
    if 0 not in losses or len(losses) < 2:
        return None
    newest = max(losses)
    return GeneralLoss(losses[0], losses[newest], None if newest == step else newest)


def read_loss_before(run: RunDir) -> float | None:
    """Return the loss on general text before training, or None if it was not evaluated then."""
    return _read_general_losses(run).get(0)


def _read_general_losses(run: RunDir) -> dict[int, float]:
    # `status` and `ls` read this module without the settings.
    from launcher.config.sections.evaluation import FORGETTING

    name = f"eval/{FORGETTING}/loss"
    lines = continued_lines(iter_lines(run.metrics, (name,)))
    return {line[STEP]: line[name] for line in lines if name in line}


@contextmanager
def _map_file(path: str | Path) -> Iterator[mmap.mmap]:
    """Map a file. Raises ValueError for an empty one."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _iter_backwards(data: mmap.mmap, pattern: bytes) -> Iterator[Line]:
    """Yield the lines that contain `pattern`, newest first; skip torn lines."""
    end = len(data)
    while (offset := data.rfind(pattern, 0, end)) >= 0:
        end = data.rfind(b"\n", 0, offset) + 1
        yield from decode_lines(_read_line(data, end))


def _read_line(data: mmap.mmap, start: int) -> bytes:
    end = data.find(b"\n", start)
    return data[start : end if end >= 0 else len(data)]
