"""Detects overfitting from the losses on training rows and held-out rows in metrics.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_metrics
from launcher.tracking.metrics import STEP

METRICS = ("train/loss", "eval/held_out/loss", "trainer/epoch")
_TRAIN, _HELD_OUT, _EPOCH = METRICS
# The held-out loss varies by about this share between evaluations of a model that has stopped learning.
_MIN_RISE_FRAC = 0.01


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
        if _TRAIN in line:
            losses.append(line[_TRAIN])
        if _HELD_OUT in line and losses:
            evaluations.append((line[STEP], epoch, line[_HELD_OUT], statistics.fmean(losses)))
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
    return find_overfitting(read_metrics(run.metrics, METRICS))
