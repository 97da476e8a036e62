"""The training loop: this is the file to open first.

Every rank runs `train` with the same plan. The rows of a step depend only on (seed, step). The loss of a step is the sum over all
micro-batches divided by the atoms (trained tokens) of the whole global batch, so neither the number of ranks nor the split into
micro-batches changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint import shards, store, zero3
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.loader import StepBatch
from launcher.distributed import RankInfo, StepReduction, all_reduce_step
from launcher.errors import CheckpointError, DivergedError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.plan.steps import compute_learning_rate
from launcher.runs import run_store
from launcher.tracking.jsonl import SUPERSEDED
from launcher.tracking.progress import as_events, ignore_progress
from launcher.tracking.tracker import Composite, start_trackers
from launcher.train.checkpointer import compute_reference_logits
from launcher.train.engine import join_process_group, leave_process_group
from launcher.train.finish import OnExported, Outcome, Stop, finish, has_time_to_save, write_weights
from launcher.train.held_out_loss import RunEvaluations
from launcher.train.isolation import require_isolation
from launcher.train.monitoring.anomalies import SkippedSteps
from launcher.train.monitoring.largest_batch import run_largest_batch
from launcher.train.optim import set_learning_rate
from launcher.train.resume import load_newest_intact
from launcher.train.setup import Components, RunContext, build_components, report_ranks

# Seconds that a failing rank waits for an in-flight save.
_DRAIN_S = 10.0


def noop(*_: Any) -> None:
    """Do nothing: the default callback."""


def train(
    plan: LaunchPlan,
    rank_info: RankInfo,
    stop: Stop,
    beat: Callable[[str, int], None] = noop,
    on_early_stop: Callable[[Outcome], None] = noop,
    on_exported: OnExported = noop,
) -> Outcome:
    """Train from the newest committed checkpoint, or from the initial weights, to the end of the plan. Collective.

    Ranks call `stop` after each step; if any of them has one of STOP_REASONS, all save and return. `beat` receives the phase and
    the number of completed steps whenever training makes progress. Rank 0 calls `on_early_stop` once the save of a run that
    stops early is committed, because closing a tracker may take longer than a preempted machine has left. It calls
    `on_exported` once the Hugging Face folder of a completed run exists.

    Raises:
        DivergedError: if the loss is not finite, or too many gradients are not; committed checkpoints stay.
        RunError, CheckpointError, ExportError: if the run cannot start, be saved, or be exported.
        Superseded: if another attempt has taken over the run.
    """
    run_dir = RunDir(Path(plan.run_dir))
    device = join_process_group(plan, rank_info)
    beat("joined", 0)
    tracker = start_trackers(plan, run_dir.root, rank_info.attempt, stop.cancel) if rank_info.is_main else Composite([])
    run = RunContext(plan, rank_info, run_dir, device, tracker)
    state, loop = "failed", None
    try:
        report_ranks(run)
        loop = TrainingLoop(run, build_components(run, beat), stop)
        loop.restore()
        loop.check_model()
        beat("loaded", loop.step)
        outcome = loop.run_to_end()
        loop.parts.monitor.stop()
        beat("finishing", outcome.step)
        # None if the run stops early.
        final = outcome.checkpoint if outcome.state == "completed" else None
        if rank_info.is_main and final is None:
            on_early_stop(outcome)
        if final is not None:
            # The export needs the engine's memory, so no reference to the engine may remain.
            loop.release_memory()
            loop = None
            write_weights(plan, rank_info, final, device, tracker)
        leave_process_group()
        loop = None
        if rank_info.is_main and final is not None:
            finish(plan, final, tracker, on_exported)
        state = outcome.state
        return outcome
    except Superseded:
        state = SUPERSEDED
        raise
    finally:
        if loop is not None:
            loop.parts.monitor.stop()
            loop.parts.checkpointer.drain(_DRAIN_S)
        tracker.finish(state)


class TrainingLoop:
    """Steps, evaluations and saves of one rank. `step` is the number of completed optimizer steps."""

    def __init__(self, run: RunContext, parts: Components, stop: Stop) -> None:
        self.run, self.parts, self.stop = run, parts, stop
        self.step = 0
        self.skipped_steps = SkippedSteps(run.plan.config.model.dtype, run.plan.run_dir)
        self.is_save_due = False
        self.reached_limit = ""
        run_dir = run.run_dir if run.rank_info.is_main else None
        self.evaluations = RunEvaluations(run.plan, run_dir, parts.evaluator, run.tracker)

    def restore(self) -> None:
        """Load the checkpoint that all ranks agreed on; without one, keep the initial weights. Collective.

        Raises:
            CheckpointError: if the run has neither a checkpoint nor initial weights.
        """
        run, parts, tracker = self.run, self.parts, self.run.tracker
        if (agreed := parts.start.checkpoint) is None:
            if run.plan.config.model.init == "pretrained" and not run.plan.model.has_weights:
                remedy = "restore a checkpoint into this directory, or start a new run"
                message = "the run has neither a checkpoint nor initial weights"
                raise CheckpointError(message, where=str(run.run_dir.root), remedy=remedy)
            return
        parameters, buffers = parts.model.parameters_by_name(), parts.model.buffers_by_name()
        make_progress = as_events(tracker.event) if run.rank_info.is_main else ignore_progress
        checkpoint, state = load_newest_intact(
            run.run_dir,
            run.rank_info,
            agreed,
            lambda path: shards.load(parts.engine, parameters, path, named_buffers=buffers, make_progress=make_progress),
            lambda message: tracker.event("alert", message),
        )
        self.step = parts.checkpointer.saved_step = checkpoint.step
        parts.meter.restore(int(state["tokens"]), int(state["skipped_steps"]))
        self.evaluations.restore(state)
        tracker.event("info", f"continuing from {checkpoint.path}", self.step)

    def check_model(self) -> None:
        """Refuse a model in which packed documents affect each other; run the largest batch if it is due. Collective."""
        run, parts = self.run, self.parts
        if message := require_isolation(run.plan, parts.engine, parts.model, run.device):
            run.tracker.event("info", message, self.step)
        run_largest_batch(run, parts.engine, parts.objective, parts.batches.split)

    def run_to_end(self) -> Outcome:
        """Train to the last step, or until any rank has a reason to stop, and save. Collective."""
        self.parts.status.write_state("running", self.step)
        self.parts.monitor.start_training(self.step)
        if self.step == 0 and self.run.plan.config.eval.at_start:
            self.evaluate("before training")
        elif self.evaluations.is_missing and not self.is_last_step():
            # A preemption skipped this evaluation.
            self.evaluate_if_due()
        if self.is_cancelled_before_training():
            saved_step = self.parts.checkpointer.saved_step
            return Outcome.untrained(self.step, None if saved_step is None else self._checkpoint_path(saved_step))
        stop_reason = None
        early_stopping = self.evaluations.early_stopping
        while not self.is_last_step() and stop_reason is None and not early_stopping.is_due:
            stop_reason = self.train_step()
            # The last evaluation and save of the run follow below, also when it ends early.
            if stop_reason is None and not self.is_last_step():
                self.evaluate_if_due()
                if not early_stopping.is_due:
                    self.save_if_due()
        if stop_reason is not None and not self.is_last_step():
            return self.stop_early(stop_reason)
        return self.complete()

    def is_cancelled_before_training(self) -> bool:
        """Return whether a person asked any rank to stop. From here on, ranks stop only at the end of a step. Collective."""
        reduction = all_reduce_step(torch.zeros((), device=self.run.device), self.stop(), [], self.run.device)
        self.stop.begin_training()
        return reduction.stop_reason == "cancelled"

    def train_step(self) -> str | None:
        """Run one optimizer step and return the reason to stop, None if no rank has one. Collective."""
        parts, timer = self.parts, self.parts.timer
        timer.begin()
        with timer.part("data", on_host=True):
            batch = parts.batches.step(self.step)
        lr = compute_learning_rate(self.run.plan.config.optim, self.step, parts.max_steps)
        set_learning_rate(parts.engine.optimizer, lr)
        if parts.proof is not None:
            parts.proof.begin(batch, self.step)
        local_loss = self.forward_backward_step(batch)
        # An in-flight save still reads the states, which change from here on.
        parts.checkpointer.wait_for_staging()
        if parts.proof is not None:
            parts.proof.check_gradients()
        with timer.part("optim"):
            parts.engine.step()
        if parts.proof is not None:
            parts.proof.check_update(self.run.tracker)
            parts.proof = None
        reduction = all_reduce_step(local_loss, self.local_stop_reason(), parts.monitor.pack_local(), self.run.device)
        times = timer.read()
        parts.monitor.record_step(times, parts.batches.load_s)
        self.step += 1
        parts.beat("training", self.step)
        self.require_finite_loss(reduction.loss)
        self.count_skipped_step()
        parts.checkpointer.poll(self.step)
        parts.monitor.save_s = parts.checkpointer.stall_s
        if self.run.rank_info.is_main:
            self.report_step(batch, reduction, lr, times)
        return reduction.stop_reason

    def forward_backward_step(self, batch: StepBatch) -> torch.Tensor:
        """Accumulate the gradients of this rank's micro-batches; the optimizer step reduces the last one.

        Returns this rank's share of the loss, fp32. The sum over ranks is the mean per atom of the global batch.
        """
        parts, topology = self.parts, self.run.plan.topology
        # DeepSpeed averages gradients over all ranks, but the loss is a sum over data ranks; ranks with the same rows have the
        # same gradient. A batch may have no atoms: no trained token.
        scale = topology.data_ranks / (parts.objective.count_atoms(batch) or 1)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.run.device)
        for i, micro in enumerate(batch.micro):
            parts.beat("training", self.step)
            with parts.timer.part("fwd_bwd"):
                loss = parts.objective.sum_loss(parts.engine, micro, self.run.device, scale)
                parts.engine.backward(loss, scale_wrt_gas=False)
                loss_sum += loss.detach()
            if i == 0 and parts.proof is not None:
                parts.proof.check_first_pass(loss)
            if i < len(batch.micro) - 1:
                parts.engine.step()
        return loss_sum / topology.world_size

    def require_finite_loss(self, loss: float, name: str = "loss") -> None:
        if not math.isfinite(loss):
            raise self.make_divergence_error(f"the {name} is {loss}")

    def count_skipped_step(self) -> None:
        """Count and report a step that DeepSpeed skipped because its gradients are not finite.

        Raises:
            DivergedError: if too many steps in a row were skipped.
        """
        parts = self.parts
        if parts.engine.was_step_applied():
            self.skipped_steps.num_in_a_row = 0
            return
        parts.meter.skipped_steps += 1
        if alert := self.skipped_steps.count(self.step, parts.meter.skipped_steps):
            self.run.tracker.event("alert", alert, self.step)

    def report_step(self, batch: StepBatch, reduction: StepReduction, lr: float, times: dict[str, float]) -> None:
        """Log the metrics of the step just completed, on rank 0."""
        parts, run = self.parts, self.run
        grad_norm = float(parts.engine.get_global_grad_norm() or 0.0)
        metrics = parts.meter.step(self.step, batch, reduction.loss, grad_norm, lr, times)
        parts.monitor.update_ranks(reduction.stats)
        run_store.fence(run.run_dir, run.rank_info.attempt)
        run.tracker.log(self.step, metrics | parts.monitor.metrics(parts.meter.tokens))
        parts.status.update_step(self.step)
        parts.monitor.alert(self.step, reduction.loss, parts.meter.overall_tokens_per_sec)

    def is_last_step(self) -> bool:
        """True if the plan's last step is completed."""
        return self.step >= self.parts.max_steps

    def local_stop_reason(self) -> str | None:
        """Return this rank's reason to stop. Only rank 0 knows whether a limit of the run is reached."""
        self.reached_limit = self.parts.monitor.reached_limit()
        return "limit" if self.reached_limit else self.stop()

    def evaluate_if_due(self) -> None:
        if self.run.plan.eval_sets_at(self.step):
            self.evaluate(f"at step {self.step}")

    def evaluate(self, when: str, is_last: bool = False) -> None:
        """Compute and log the loss of the evaluation sets; skip it if a rank has a reason to stop. Collective.

        A limit of the run does not stop the last evaluation, which is cheap and shows what the run has achieved.
        """
        parts, evaluations = self.parts, self.evaluations
        scheduled_step = parts.max_steps if is_last else self.step
        evaluation = evaluations.compute(self.step, scheduled_step, self.stop if is_last else self.local_stop_reason)
        parts.monitor.eval_s = parts.evaluator.total_s
        if evaluation is None:
            return
        self.require_finite_loss(evaluation.loss_of(HELD_OUT) or 0.0, "held-out loss")
        evaluations.record(evaluation, when)
        best_loss = evaluation.loss_of(evaluations.early_stopping.set_name)
        if best_loss is None:
            return
        is_saved = parts.checkpointer.saved_step == self.step
        if is_saved:
            parts.checkpointer.record_evaluation(self._checkpoint_path(self.step), best_loss)
        if not is_last and evaluations.early_stopping.record(self.step, best_loss):
            # Early stopping returns to the best weights, so they are saved.
            keeps_best = evaluations.early_stopping.patience > 0 and self.run.plan.config.checkpoint.keep_best > 0
            self.is_save_due |= keeps_best and self.step > 0 and not is_saved

    def save_if_due(self) -> None:
        """Begin a background save every `checkpoint.save_every` steps; after a skipped step, wait for the next applied one.

        A skipped step leaves the weights unchanged, so its checkpoint would only displace the previous one.
        """
        save_every = self.run.plan.config.checkpoint.save_every
        if save_every and self.step % save_every == 0:
            self.is_save_due = True
        if self.is_save_due and not self.skipped_steps.num_in_a_row:
            self.is_save_due = False
            self.save()

    def save(self) -> None:
        """Begin a save of the current step in the background. Collective."""
        self.parts.checkpointer.save(self.step, self._build_state(), self.evaluations.best_set_loss(self.step))
        self._record_save_time()

    def save_and_wait(self, is_run_complete: bool = False) -> Path:
        """Save the current step with its reference logits, unless it is saved already; return the checkpoint. Collective."""
        parts = self.parts
        parts.checkpointer.wait(self.step)
        if parts.checkpointer.saved_step != self.step:
            logits = compute_reference_logits(parts.engine, parts.model, parts.batches.split, self.run.device)
            if not torch.isfinite(logits["logits"]).all():
                raise self.make_divergence_error("the logits are not finite")
            parts.status.write_state("saving", self.step)
            best_loss = self.evaluations.best_set_loss(self.step)
            parts.checkpointer.save_and_wait(self.step, self._build_state(), best_loss, logits, is_run_complete)
        parts.status.write_state("running", self.step)
        self._record_save_time()
        return self._checkpoint_path(self.step)

    def complete(self) -> Outcome:
        """Evaluate and save after the last step. Collective."""
        self.evaluate("after training", is_last=True)
        checkpoint = self.save_and_wait(is_run_complete=True)
        last_eval = self.evaluations.newest(self.step)
        self.run.tracker.summary({"last_step": self.step, **(last_eval.metrics if last_eval else {})})
        if self.is_last_step():
            return Outcome("completed", "completed", self.step, format_count(self.step, "step"), checkpoint)
        early_stopping = self.evaluations.early_stopping
        best = self._checkpoint_path(early_stopping.best_step)
        return Outcome.early_stopped(self.run.rank_info, self.step, early_stopping, best, checkpoint)

    def stop_early(self, reason: str) -> Outcome:
        """Save if there is time, and report why training stopped. Collective."""
        checkpointer = self.parts.checkpointer
        checkpointer.wait(self.step)
        has_time = has_time_to_save(self.run.plan.config.cluster, reason, self.stop.at, checkpointer.save_s, self.run.device)
        if has_time:
            self.save_and_wait()
        kept_step = self.step if has_time or checkpointer.saved_step is None else checkpointer.saved_step
        checkpoint, max_steps = self._checkpoint_path(kept_step), self.parts.max_steps
        outcome = Outcome.interrupted(
            reason, self.reached_limit, self.step, max_steps, kept_step, checkpointer.save_s, checkpoint
        )
        if reason != "cancelled":
            self.run.tracker.event("alert", outcome.message, self.step)
        return outcome

    def make_divergence_error(self, problem: str) -> DivergedError:
        """Wait for an in-flight save, and return the error. All ranks call this together. Collective."""
        self.parts.checkpointer.wait(self.step)
        saved = self.parts.checkpointer.saved_step
        kept = f"the checkpoint of step {saved} is kept" if saved is not None else "no checkpoint was saved yet"
        return DivergedError(
            f"{problem} at step {self.step}; training stopped and {kept}",
            where=f"step {self.step}",
            remedy="lower optim.lr, lengthen optim.warmup_steps, or look for broken rows with: python -m launcher data, with the "
            "settings of the run",
        )

    def release_memory(self) -> None:
        """Free the engine and the memory of background saves; the loop is unusable afterwards."""
        self.parts.checkpointer.close()
        zero3.release_engine(self.parts.engine)

    def _build_state(self) -> dict[str, Any]:
        counts = {"tokens": self.parts.meter.tokens, "skipped_steps": self.parts.meter.skipped_steps}
        return {**counts, **self.evaluations.state(self.step)}

    def _record_save_time(self) -> None:
        self.parts.monitor.save_s = self.parts.checkpointer.stall_s
        self.parts.beat("training", self.step)

    def _checkpoint_path(self, step: int) -> Path:
        return self.run.run_dir.checkpoints / store.step_name(step)
