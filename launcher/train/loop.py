"""The training loop: this is the file to open first.

Every rank runs `train` with the same plan. Each step takes its rows from (seed, step) alone, adds up the summed
loss over its micro-batches divided by the trained tokens of the whole global batch, and steps the optimizer;
so neither the number of ranks nor the split into micro-batches changes the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher import run_store
from launcher.checkpoint import shards, store, zero3
from launcher.checkpoint.manifest import Checkpoint
from launcher.checkpoint.saver import Saver
from launcher.data.cache import Split
from launcher.data.loader import MicroBatch, PrefetchLoader, TrainBatches, eval_batches
from launcher.distributed import RankInfo, all_reduce_step, run_on_all_ranks
from launcher.errors import CheckpointError, DivergedError, RunError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.goodput import JOINED, PHASE
from launcher.tracking.jsonl import SUPERSEDED
from launcher.tracking.tracker import Composite, start_trackers
from launcher.train.checkpointer import Checkpoints, reference_logits
from launcher.train.engine import build_engine, join, leave
from launcher.train.finish import finish, write_weights
from launcher.train.metrics import Meter, StepTimer, perplexity
from launcher.train.model import CausalLMLoss, attention_words
from launcher.train.monitoring import bandwidth
from launcher.train.monitoring.monitor import Monitor
from launcher.train.monitoring.status_file import StatusFile
from launcher.train.optim import learning_rate, set_learning_rate
from launcher.train.peak_flops import peak_tflops
from launcher.train.previous_failure import failure_before
from launcher.train.resume import agree_on_start, load_whole
from launcher.train.stop import Outcome, Stop, save_fits

# Steps in a row whose gradients are not finite. fp16 finds its loss scale that way; elsewhere it means trouble.
_MOST_SKIPPED_STEPS = {"fp16": 20, "bf16": 3, "fp32": 3}
# What a rank that has failed gives a checkpoint in the making, while the others wait for it to be gone.
_DRAIN_S = 10.0


def _no_beat(phase: str, step: int) -> None:
    """Nobody watches."""


def _no_word(outcome: Outcome) -> None:
    """Nobody asks before the end."""


def train(
    plan: LaunchPlan,
    rank_info: RankInfo,
    stop: Stop,
    beat: Callable[[str, int], None] = _no_beat,
    stopped: Callable[[Outcome], None] = _no_word,
) -> Outcome:
    """Train from the newest committed checkpoint, or from the initial weights, to the end of the plan.

    `stop` is asked after each step; when any rank names one of STOP_REASONS, all save and return.
    `beat` is told the phase and the number of completed steps wherever there is progress. `stopped` is called on rank 0 where
    training stops before its end, as soon as that is saved: a tracker may take longer than a machine that goes away has left.

    Raises:
        RunError: where the loss is not finite; the last committed checkpoint stays.
    """
    run = RunDir(Path(plan.run_dir))
    device = join(plan, rank_info)
    beat("joined", 0)
    tracker = start_trackers(plan, run.root, rank_info.attempt, stop.cancel) if rank_info.is_main else Composite([])
    state, session = "failed", None
    try:
        joined: dict[str, Any] = {PHASE: JOINED, "ranks": rank_info.world_size}
        tracker.event("info", f"{rank_info.world_size} ranks have joined", 0, **joined)
        if rank_info.is_main and (failed := failure_before(run, rank_info.attempt)):
            tracker.event("alert", failed.words, recorded=failed.recorded)
        if rank_info.world_size > 1:
            speed = bandwidth.measure(device)
            slow = bandwidth.doubt(plan.topology, speed)
            words = f"all-reduce over {rank_info.world_size} ranks: {speed:.2f} GB/s{slow}"
            tracker.event("alert" if slow else "info", words, 0, gb_per_s=speed)
        session = _Session.start(plan, rank_info, run, device, tracker, beat)
        beat("loaded", session.step)
        outcome = session.run(stop)
        session.monitor.stop()
        beat("finishing", outcome.step)
        completed = outcome.state == "completed"
        if rank_info.is_main and not completed:
            stopped(outcome)
        if completed:
            # The engine's memory goes before anything is exported.
            session.checkpoints.close()
            zero3.release(session.engine)
            session = None
            write_weights(plan, rank_info, outcome.checkpoint, device)
        leave()
        session = None
        if rank_info.is_main and completed:
            finish(plan, outcome.checkpoint, tracker)
        state = outcome.state
        return outcome
    except Superseded:
        state = SUPERSEDED
        raise
    finally:
        if session is not None:
            session.monitor.stop()
            session.checkpoints.drain(_DRAIN_S)
        tracker.finish(state)


@dataclass
class _Session:
    plan: LaunchPlan
    rank_info: RankInfo
    run_dir: RunDir
    device: torch.device
    tracker: Composite
    engine: Any
    model: CausalLMLoss
    checkpoints: Checkpoints
    batches: PrefetchLoader
    held_out: list[MicroBatch]
    meter: Meter
    timer: StepTimer
    monitor: Monitor
    status: StatusFile
    max_steps: int
    step: int = 0
    skipped_in_a_row: int = 0
    is_save_due: bool = False
    limit: str = ""
    last_eval: dict[str, float] = field(default_factory=dict)
    eval_step: int | None = None

    @classmethod
    def start(
        cls,
        plan: LaunchPlan,
        rank_info: RankInfo,
        run: RunDir,
        device: torch.device,
        tracker: Composite,
        beat: Callable[[str, int], None],
    ) -> _Session:
        data, max_steps = plan.data, plan.batch.max_steps
        if data is None or max_steps is None:
            raise RunError("the plan has no data", where=str(run.plan), remedy="build it with: python -m launcher data")
        # While the other ranks wait for the fence, so that they do not use the CPU that is measured.
        peak = peak_tflops(plan.config, device) if rank_info.is_main else None
        fence = partial(run_store.fence, run, rank_info.attempt, refresh=True)
        run_on_all_ranks(device, "this attempt may not train", fence if rank_info.is_main else lambda: None)
        engine, model = build_engine(plan, rank_info)
        if device.type == "cuda":
            tracker.event("info", attention_words(plan.config.model, model.hf.config, plan.config.data.packing), 0)
        # What cannot be saved is refused now, not at the first checkpoint.
        saver = Saver(
            engine,
            model.parameters_by_name(),
            run.checkpoints,
            plan_digest=plan.digest(),
            attempt=rank_info.attempt,
            prune=lambda committed: store.prune(run.checkpoints, store.Retention.of(plan.config.checkpoint), keep=[committed]),
            background=plan.saving.background,
            deadline_s=plan.config.cluster.timeout_minutes * 60,
            fence=fence,
        )
        # Padding is never looked at nor trained; any id in the vocabulary serves.
        grouped = plan.config.data.group_by_length and not plan.config.data.packing
        order = (plan.config.run.seed, rank_info.rank, rank_info.world_size)
        batches = PrefetchLoader(TrainBatches(Split.open(data), plan.batch, *order, pad_id=0, group_by_length=grouped), device)
        held_out: list[MicroBatch] = []
        if data.num_eval_rows:
            split = Split.open(data, held_out=True)
            held_out = eval_batches(split, plan.batch.micro_batch_size, rank_info.rank, rank_info.world_size, pad_id=0)
        begin = agree_on_start(run, rank_info, device)
        meter, timer = Meter(plan, max_steps, rank_info.attempt, begin.restarts, peak), StepTimer(device)
        on_cpus = device.type == "cpu" or plan.config.deepspeed.offload_optimizer != "none"
        monitor = Monitor(plan, rank_info, device, model, engine.basic_optimizer if on_cpus else None, tracker, beat)
        checkpoints = Checkpoints(saver, tracker, rank_info.is_main, monitor.beat)
        status = StatusFile(run, rank_info.attempt, partial(tracker.event, "alert"), rank_info.is_main)
        parts = (engine, model, checkpoints, batches, held_out, meter, timer, monitor, status, max_steps)
        session = cls(plan, rank_info, run, device, tracker, *parts)
        if begin.checkpoint is not None:
            session._restore(begin.checkpoint)
        elif plan.config.model.init == "pretrained" and not plan.model.has_weights:
            raise CheckpointError("no checkpoint is left, and the run came here without initial weights", where=str(run.root))
        return session

    def run(self, stop: Stop) -> Outcome:
        save_every = self.plan.config.checkpoint.save_every
        self.status.state("running", self.step)
        self.monitor.loaded(self.step)
        if self.step == 0 and self.plan.config.eval.at_start:
            self._evaluate("before training", stop)
        stopped = None
        while self.step < self.max_steps and stopped is None:
            stopped = self._train_step(stop)
            # What is due at the end, or before stopping, follows below in any case.
            if stopped is None and self.step < self.max_steps:
                if self.plan.evaluates_at(self.step):
                    self._evaluate(f"at step {self.step}", stop)
                if save_every and self.step % save_every == 0:
                    self.is_save_due = True
                # After a skipped step there is nothing to add to the checkpoint before, and good ones would be pruned.
                if self.is_save_due and not self.skipped_in_a_row:
                    self.is_save_due = False
                    self._save()
        if stopped is not None and self.step < self.max_steps:
            self.checkpoints.wait(self.step)
            fits = save_fits(self.plan.config.cluster, stopped, stop.at, self.checkpoints.save_s, self.device)
            if fits:
                self._save(wait=True)
            outcome = self._stopped(stopped, fits)
            if stopped != "cancelled":
                self.tracker.event("alert", outcome.message, self.step)
            return outcome
        self._evaluate("after training", stop, is_last=True)
        checkpoint = self._save(wait=True)
        self.tracker.summary({"last_step": self.step, **(self.last_eval if self.eval_step == self.step else {})})
        return Outcome("completed", "completed", self.step, f"{self.step} steps", checkpoint)

    def _train_step(self, stop: Stop) -> str | None:
        """One optimizer step; returns why to stop, where any rank has a reason."""
        timer = self.timer
        timer.begin()
        with timer.part("data", on_host=True):
            batch = self.batches.step(self.step)
        # DeepSpeed averages over ranks; the loss is a sum over all of them. A batch may hold no label where such rows are kept.
        factor = self.rank_info.world_size / max(1, batch.num_labels)
        summed = torch.zeros((), dtype=torch.float32, device=self.device)
        lr = learning_rate(self.plan.config.optim, self.step, self.max_steps)
        set_learning_rate(self.engine.optimizer, lr)
        for i, micro in enumerate(batch.micro):
            self.monitor.beat("training", self.step)
            with timer.part("fwd_bwd"):
                loss_part = self._loss(micro, factor)
                self.engine.backward(loss_part, scale_wrt_gas=False)
                summed += loss_part.detach()
            if i < len(batch.micro) - 1:
                self.engine.step()
        # The states change from here on.
        self.checkpoints.wait_for_staging()
        with timer.part("optim"):
            self.engine.step()
        mean = summed / self.rank_info.world_size
        loss, stopped, told = all_reduce_step(mean, self._own_reason(stop), self.monitor.own(), self.device)
        times = timer.read()
        self.monitor.measured(times)
        self.step += 1
        self.monitor.beat("training", self.step)
        self._require_finite(loss)
        self._count_skipped()
        self.checkpoints.poll(self.step)
        self.monitor.save_s = self.checkpoints.stall_s
        if self.rank_info.is_main:
            metrics = self.meter.step(self.step, batch, loss, float(self.engine.get_global_grad_norm() or 0.0), lr, times)
            self.monitor.heard(told)
            if self.step % self.plan.config.train.log_every == 0 or self.step == self.max_steps:
                run_store.fence(self.run_dir, self.rank_info.attempt)
                self.tracker.log(self.step, metrics | self.monitor.metrics(self.meter.tokens))
            self.status.training(self.step)
            self.monitor.alert(self.step, loss, self.meter.overall_tokens_per_sec)
        return stopped

    def _loss(self, micro: MicroBatch, factor: float) -> torch.Tensor:
        inputs = (tensor.to(self.device, non_blocking=True) for tensor in (micro.input_ids, micro.position_ids))
        return self.engine(*inputs, micro.labels, factor, micro.cu_seqlens)

    def _own_reason(self, stop: Stop) -> str | None:
        # The first rank alone knows what the run has spent.
        self.limit = self.monitor.limit()
        return "limit" if self.limit else stop()

    def _count_skipped(self) -> None:
        """DeepSpeed leaves out a step whose gradients are not finite; a run of them goes nowhere."""
        if self.engine.was_step_applied():
            self.skipped_in_a_row = 0
            return
        self.meter.skipped_steps += 1
        self.skipped_in_a_row += 1
        dtype = self.plan.config.model.dtype
        # fp16 looks for its loss scale in this way all the time.
        if dtype != "fp16":
            words = f"gradients that are not finite: the step was left out, {self.meter.skipped_steps} have been so far"
            self.tracker.event("alert", f"{words}; look for a GPU with faults, or lower optim.lr", self.step)
        if self.skipped_in_a_row > _MOST_SKIPPED_STEPS[dtype]:
            raise DivergedError(
                f"the gradients of {self.skipped_in_a_row} steps in a row are not finite; training stopped",
                where=f"step {self.step}",
                remedy="lower optim.lr and go back to a good step: python -m launcher resume RUN --step N optim.lr=...",
            )

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss}")

    def _not_finite(self, what: str) -> DivergedError:
        """All ranks come here together, so a checkpoint in the making counts."""
        self.checkpoints.wait(self.step)
        saved = self.checkpoints.saved_step
        kept = f"the checkpoint of step {saved} is kept" if saved is not None else "no checkpoint was saved yet"
        return DivergedError(
            f"{what} at step {self.step}; training stopped and {kept}",
            where=f"step {self.step}",
            remedy="lower optim.lr, lengthen optim.warmup_steps, or look for broken rows with: python -m launcher data",
        )

    @torch.no_grad()
    def _evaluate(self, when: str, stop: Stop, is_last: bool = False) -> None:
        """Held-out loss over all ranks; the mean over trained tokens, as in training. Given up where a rank is to stop.

        What the run may spend ends any but the last, which costs little beside what it tells.
        """
        if not self.held_out:
            return
        began = time.perf_counter()
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in self.held_out:
            self.monitor.beat("evaluating", self.step)
            if all_reduce_step(torch.zeros(()), stop() if is_last else self._own_reason(stop), [], self.device).stop_reason:
                self.model.train()
                self.monitor.eval_s += time.perf_counter() - began
                return
            totals[0] += self._loss(micro, factor=1.0)
            totals[1] += int((micro.labels >= 0).sum())
        self.model.train()
        dist.all_reduce(totals)
        nll, labels = totals.tolist()
        loss = nll / max(labels, 1)
        self._require_finite(loss)
        self.last_eval, self.eval_step = {"eval/held_out/loss": loss, "eval/held_out/ppl": perplexity(loss)}, self.step
        metrics = {**self.last_eval, "time/eval_s": time.perf_counter() - began}
        self.monitor.eval_s += metrics["time/eval_s"]
        self.tracker.log(self.step, metrics)
        self.tracker.event(
            "eval", f"held-out loss {when}: {loss:.4f} ({int(labels):,} trained tokens)", self.step, loss=loss, when=when
        )

    def _save(self, wait: bool = False) -> Path:
        """Save the current step in the background; with `wait`, to its commit, unless it is there already."""
        self.checkpoints.wait(self.step)
        state = {"tokens": self.meter.tokens, "skipped_steps": self.meter.skipped_steps}
        eval_loss = self.last_eval["eval/held_out/loss"] if self.eval_step == self.step else None
        if not wait:
            self.checkpoints.save(self.step, state, eval_loss)
        elif self.checkpoints.saved_step != self.step:
            logits = reference_logits(self.engine, self.model, self.batches.split, self.device)
            if not torch.isfinite(logits["logits"]).all():
                raise self._not_finite("the logits are not finite")
            self.status.state("saving", self.step)
            self.checkpoints.save_and_wait(self.step, state, eval_loss, logits)
        if wait:
            self.status.state("running", self.step)
        self.monitor.save_s = self.checkpoints.stall_s
        self.monitor.beat("training", self.step)
        return self.run_dir.checkpoints / store.step_name(self.step)

    def _restore(self, named: Checkpoint) -> None:
        parameters = self.model.parameters_by_name()
        checkpoint, state = load_whole(
            self.run_dir,
            self.rank_info,
            named,
            lambda path: shards.load(self.engine, parameters, path),
            lambda words: self.tracker.event("alert", words),
        )
        self.step = self.checkpoints.saved_step = checkpoint.step
        self.meter.restore(int(state["tokens"]), int(state["skipped_steps"]))
        self.tracker.event("info", f"continuing from {checkpoint.path}", self.step)

    def _stopped(self, reason: str, saved: bool) -> Outcome:
        state = "cancelled" if reason == "cancelled" else "preempted"
        why = {"cancelled": "stopped on request", "preempted": "the machine was asked to stop", "limit": self.limit}[reason]
        kept, save_s = self.checkpoints.saved_step, self.checkpoints.save_s
        step = self.step if saved or kept is None else kept
        done = f"saved at step {step} of {self.max_steps}"
        if not saved:
            done = f"no time was left at step {self.step} to save, which takes {save_s:.0f} s; step {step} is kept"
        return Outcome(state, reason, step, f"{why}; {done}", self.run_dir.checkpoints / store.step_name(step))
