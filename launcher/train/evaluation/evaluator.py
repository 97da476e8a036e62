"""Loss on held-out rows and evaluation sets during training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.loader import RowBatches
from launcher.distributed import copy_to_device
from launcher.tracking.progress import CountProgress, Say
from launcher.tracking.tracker import Composite
from launcher.train.evaluation.score import Scorer
from launcher.train.monitoring.step_metrics import perplexity


@dataclass(frozen=True)
class EvalRows:
    """The rows of one set, and the names of the data sources that they come from."""

    name: str
    batches: RowBatches
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetLoss:
    """Mean loss over the trained tokens of one set, and of each of its sources that has trained tokens."""

    name: str
    loss: float
    num_tokens: int
    source_losses: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name; those of sources only if the set has several."""
        by_source = self.source_losses if len(self.source_losses) > 1 else {}
        return {
            f"eval/{self.name}/loss": self.loss,
            f"eval/{self.name}/ppl": perplexity(self.loss),
            **{f"eval/{self.name}/source/{source}/loss": loss for source, loss in by_source.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """The losses after `step` steps, in the order of the sets, and the seconds that they took."""

    step: int
    sets: tuple[SetLoss, ...]
    seconds: float

    def joined(self, earlier: Evaluation | None) -> Evaluation:
        """Return this evaluation together with the sets of an earlier one of the same step."""
        return self if earlier is None else Evaluation(self.step, (*earlier.sets, *self.sets), earlier.seconds + self.seconds)

    def loss_of(self, name: str) -> float | None:
        """Return the loss of the set `name`; None if it was not evaluated."""
        return next((of_set.loss for of_set in self.sets if of_set.name == name), None)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of all sets by name, without the time."""
        return {name: value for of_set in self.sets for name, value in of_set.metrics.items()}


def log_evaluation(
    evaluation: Evaluation, when: str, tracker: Composite, find_problem: Callable[[Evaluation], str | None] = lambda _: None
) -> None:
    """Log the metrics of all sets, an event for each, and an alert with the result of `find_problem`.

    The event texts use `when` to say when the sets were evaluated.
    """
    tracker.log(evaluation.step, {**evaluation.metrics, "time/eval_s": evaluation.seconds})
    for of_set in evaluation.sets:
        title = "held-out loss" if of_set.name == HELD_OUT else f"loss on {of_set.name}"
        message = f"{title} {when}: {of_set.loss:.4f} ({of_set.num_tokens:,} trained tokens)"
        # Other sets may contain texts for which a sound model computes no finite loss.
        kind = "eval" if math.isfinite(of_set.loss) else "alert"
        tracker.event(kind, message, evaluation.step, loss=of_set.loss, when=when, set=of_set.name)
    if (problem := find_problem(evaluation)) is not None:
        tracker.event("alert", problem, evaluation.step)


class Evaluator:
    """Computes the loss of sets of rows with the training engine. `total_s` is the total seconds of all evaluations so far."""

    def __init__(
        self, scorer: Scorer, sets: Sequence[EvalRows], beat: Callable[[str, int], None], say: Say = lambda text: None
    ) -> None:
        """`beat` receives the phase and the number of completed steps before each micro-batch, `say` lines on the progress."""
        self._scorer, self._beat, self._say = scorer, beat, say
        self._sets = [rows for rows in sets if len(rows.batches)]
        self.total_s = 0.0

    def evaluate(self, step: int, local_stop_reason: Callable[[], str | None], names: Collection[str]) -> Evaluation | None:
        """Compute the losses of the sets `names` over all ranks. Collective.

        Returns None if no set has rows, or if any rank has a reason to stop before the last micro-batch.
        """
        chosen = [rows for rows in self._sets if rows.name in names]
        if not chosen:
            return None
        start = time.perf_counter()

        def beat_and_ask() -> str | None:
            self._beat("evaluating", step)
            return local_stop_reason()

        with self._scorer.without_dropout():
            losses = [self._evaluate_set(rows, beat_and_ask) for rows in chosen]
        seconds = time.perf_counter() - start
        self.total_s += seconds
        complete = tuple(loss for loss in losses if loss is not None)
        return Evaluation(step, complete, seconds) if len(complete) == len(chosen) else None

    @torch.no_grad()
    def _evaluate_set(self, rows: EvalRows, local_stop_reason: Callable[[], str | None]) -> SetLoss | None:
        """Compute the loss of one set; None if the ranks stop."""
        rank_info, device, batches = self._scorer.rank_info, self._scorer.device, rows.batches
        num_rounds = -(-len(batches) // rank_info.world_size)
        numbers = range(rank_info.rank, num_rounds * rank_info.world_size, rank_info.world_size)
        # Sums and token counts by source; in fp64, so their order affects no digit that is shown.
        totals = torch.zeros(2, max(1, len(rows.sources)), dtype=torch.float64, device=device)
        counter = CountProgress(f"evaluating {rows.name.replace('_', '-')}", "micro-batches", self._say)
        for number, losses in zip(numbers, self._scorer.score(batches, numbers, local_stop_reason), strict=False):
            if losses is None:
                return None
            counter.show(numbers.index(number) + 1, len(numbers))
            source = copy_to_device(torch.from_numpy(batches.label_sources(number)), device)
            totals[0].index_add_(0, source, losses.double())
            totals[1].index_add_(0, source, torch.ones_like(losses, dtype=torch.float64))
        dist.all_reduce(totals)
        sums, counts = totals.tolist()
        by_source = zip(rows.sources, sums, counts, strict=False)
        source_losses = {name: total / count for name, total, count in by_source if count}
        return SetLoss(rows.name, sum(sums) / max(1.0, sum(counts)), int(sum(counts)), source_losses)
