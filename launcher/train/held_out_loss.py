"""Loss on held-out rows and evaluation sets during training: what is due, early stopping, and the alert of forgetting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.sections.evaluation import FORGETTING, HELD_OUT
from launcher.data.loader import RowBatches
from launcher.distributed import RankInfo, all_reduce_step, copy_to_device
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan, Topology
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking.progress import ProgressCounter, Say
from launcher.tracking.run_metrics import read_loss_before
from launcher.tracking.tracker import Composite
from launcher.tracking.verdicts import GeneralLoss
from launcher.train.model import CausalLMLoss
from launcher.train.monitoring.step_metrics import perplexity
from launcher.train.objectives import Objective


class RunEvaluations:
    """Evaluations of one rank, across resumes: which sets are due, the newest losses, and the state that a checkpoint stores.

    `is_missing` is true if a preemption skipped the evaluation of the checkpoint's step.
    """

    def __init__(self, plan: LaunchPlan, run_dir: RunDir | None, evaluator: Evaluator, tracker: Composite) -> None:
        """`run_dir` is None on all ranks except the one that logs."""
        self._plan, self._evaluator, self._tracker = plan, evaluator, tracker
        self._newest: Evaluation | None = None
        self._forgetting = ForgettingCheck(run_dir, plan)
        best_set = plan.config.checkpoint.best_set
        self.early_stopping = EarlyStopping(plan.config.eval.stop_after, best_set, plan.eval_rows_digest(best_set))
        self.is_missing = False

    def newest(self, step: int) -> Evaluation | None:
        """Return the losses of the newest evaluation, if it was made after `step` steps."""
        return self._newest if self._newest is not None and self._newest.step == step else None

    def best_set_loss(self, step: int) -> float | None:
        """Return the loss that the checkpoint of `step` is ranked by; None if it was not evaluated."""
        newest = self.newest(step)
        return None if newest is None else newest.loss_of(self.early_stopping.set_name)

    def compute(self, step: int, scheduled_step: int, stop: Callable[[], str | None]) -> Evaluation | None:
        """Compute the losses that are due at `scheduled_step` and have not been computed after `step` steps. Collective.

        Returns None if nothing is due, or if a rank has a reason to stop.
        """
        earlier = self.newest(step)
        due = self._plan.eval_sets_at(scheduled_step)
        return self._evaluator.evaluate(
            step, stop, tuple(name for name in due if earlier is None or earlier.loss_of(name) is None)
        )

    def record(self, evaluation: Evaluation, when: str) -> None:
        """Log the losses, with an alert if the model forgets; the texts use `when` to say when the losses were computed."""
        self._newest = evaluation.joined(self.newest(evaluation.step))
        self._tracker.log(evaluation.step, {**evaluation.metrics, "time/eval_s": evaluation.seconds})
        for of_set in evaluation.sets:
            title = "held-out loss" if of_set.name == HELD_OUT else f"loss on {of_set.name}"
            message = f"{title} {when}: {of_set.loss:.4f} ({of_set.num_tokens:,} trained tokens)"
            # Other sets may contain texts for which a sound model computes no finite loss.
            kind = "eval" if math.isfinite(of_set.loss) else "alert"
            self._tracker.event(kind, message, evaluation.step, loss=of_set.loss, when=when, set=of_set.name)
        if (problem := self._forgetting.find_rise(evaluation)) is not None:
            self._tracker.event("alert", problem, evaluation.step)

    def state(self, step: int) -> dict[str, Any]:
        """Return the state that the checkpoint of `step` stores, as JSON values."""
        return {"early_stopping": self.early_stopping.state(), "is_evaluated": self.newest(step) is not None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that a checkpoint stores."""
        self.early_stopping.restore(state.get("early_stopping"))
        self.is_missing = state.get("is_evaluated") is False


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


@dataclass(frozen=True)
class EvalRows:
    """The rows of one set, and the names of the data sources that they come from."""

    name: str
    batches: RowBatches
    sources: tuple[str, ...] = ()


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
        topology, device, batches = self._scorer.topology, self._scorer.device, rows.batches
        num_rounds = -(-len(batches) // topology.data_ranks)
        first = topology.data_rank(self._scorer.rank_info.rank)
        numbers = range(first, num_rounds * topology.data_ranks, topology.data_ranks)
        # Sums and token counts by source; in fp64, so their order affects no digit that is shown.
        totals = torch.zeros(2, max(1, len(rows.sources)), dtype=torch.float64, device=device)
        activity = f"evaluating micro-batches of {rows.name.replace('_', '-')}"
        counter = ProgressCounter(activity, len(numbers), self._say, show="{:,}".format)
        for number, losses in zip(numbers, self._scorer.score(batches, numbers, local_stop_reason), strict=False):
            if losses is None:
                return None
            counter.advance(1)
            source = copy_to_device(torch.from_numpy(batches.label_sources(number)), device)
            totals[0].index_add_(0, source, losses.double())
            totals[1].index_add_(0, source, torch.ones_like(losses, dtype=torch.float64))
        dist.all_reduce(totals)
        # Ranks with the same rows have each added them.
        sums, counts = (totals / topology.sequence_ranks).tolist()
        by_source = zip(rows.sources, sums, counts, strict=False)
        source_losses = {name: total / count for name, total, count in by_source if count}
        return SetLoss(rows.name, sum(sums) / max(1.0, sum(counts)), int(sum(counts)), source_losses)


class Scorer:
    """Computes the losses of single tokens with this rank's engine. All ranks use it together."""

    def __init__(
        self,
        engine: Any,
        model: CausalLMLoss,
        objective: Objective,
        rank_info: RankInfo,
        device: torch.device,
        topology: Topology,
    ) -> None:
        self._engine, self._model, self._objective = engine, model, objective
        self.rank_info, self.device, self.topology = rank_info, device, topology

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Put the model into evaluation mode within the block."""
        self._model.eval()
        try:
            yield
        finally:
            self._model.train()

    def score(
        self, batches: RowBatches, numbers: Iterable[int], local_stop_reason: Callable[[], str | None]
    ) -> Iterator[torch.Tensor | None]:
        """Yield the loss of each trained token of the micro-batches `numbers`, fp32 [num_labels] on the device. Collective.

        Every rank passes equally many numbers; numbers after the last micro-batch are padding. This calls `local_stop_reason`
        before each micro-batch; if any rank has a reason to stop, it yields None and ends.
        """
        nothing = torch.zeros((), device=self.device)
        for number in numbers:
            # Load it while a GPU still computes the previous one, which the all-reduce waits for.
            micro = batches.load(number)
            if self.device.type == "cuda":
                micro = micro.pin_memory()
            if all_reduce_step(nothing, local_stop_reason(), [], self.device).stop_reason:
                yield None
                return
            yield self._objective.atom_losses(self._engine, micro, self.device)


class EarlyStopping:
    """Stops training when the loss of a set no longer falls: counts evaluations in a row that are not below the lowest one.

    `patience` is eval.stop_after: that many of them end training; with 0, none do. `set_name` and `rows_digest` identify the
    evaluated rows: counts that a checkpoint holds for other rows are ignored.
    """

    def __init__(self, patience: int, set_name: str, rows_digest: str) -> None:
        self.patience, self.set_name, self.rows_digest = patience, set_name, rows_digest
        self.best_loss = math.inf
        self.best_step = 0
        self.num_without_improvement = 0

    @property
    def is_due(self) -> bool:
        """True if training should end."""
        return 0 < self.patience <= self.num_without_improvement

    @property
    def message(self) -> str:
        """Why training ended."""
        return (
            f"eval.stop_after: the loss on {self.set_name} has not fallen below {self.best_loss:.4f} (step {self.best_step}) in "
            f"{format_count(self.num_without_improvement, 'evaluation')}"
        )

    def record(self, step: int, loss: float) -> bool:
        """Record the loss of an evaluation at `step`; return whether it is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.num_without_improvement = loss, step, 0
            return True
        self.num_without_improvement += 1
        return False

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, as JSON values."""
        return {
            "set": self.set_name,
            "rows": self.rows_digest,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "num_without_improvement": self.num_without_improvement,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state from a checkpoint, unless it is for other rows; None if the checkpoint has no state."""
        if state is None or (state["set"], state["rows"]) != (self.set_name, self.rows_digest):
            return
        self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
        self.best_step, self.num_without_improvement = int(state["best_step"]), int(state["num_without_improvement"])


class ForgettingCheck:
    """Alerts if the loss on general text rises: compares each loss of the set eval.forgetting with that before training.

    Without a run directory, it does nothing.
    """

    def __init__(self, run: RunDir | None, plan: LaunchPlan) -> None:
        self._run = run
        self._rows = plan.eval_rows_digest(FORGETTING)
        self._before: float | None = None

    def find_rise(self, evaluation: Evaluation) -> str | None:
        """Return an alert if the loss is above the accepted one; None if it is not, or was not evaluated."""
        loss = evaluation.loss_of(FORGETTING)
        if loss is None or self._run is None:
            return None
        if evaluation.step == 0:
            self._before = loss
        elif self._before is None:
            plans: list[LaunchPlan] = []
            with suppress(LauncherError):
                plans = run_store.load_plans_until(self._run, 0)
            # Comparable if the set has the rows of the run's first attempt.
            if not plans or plans[0].eval_rows_digest(FORGETTING) == self._rows:
                self._before = read_loss_before(self._run)
        if self._before is None or not GeneralLoss(self._before, loss).is_forgetting:
            return None
        rise = f"{loss:.4f}, {loss / self._before - 1:.0%} above its value before training ({self._before:.4f})"
        remedy = "lower optim.lr, train fewer steps, or add general rows to data.sources"
        return f"the model is forgetting: the loss on general text is {rise}; {remedy}"
