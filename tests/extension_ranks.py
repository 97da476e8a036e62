"""Gloo ranks for the tests that extend the launcher; tests/forked_ranks.py runs them."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launcher.checkpoint import shards, store
from launcher.checkpoint.saver import Saved, Saver
from launcher.config.sections.train import DeepSpeedSection, OptimSection
from launcher.data.loader import IGNORED, MicroBatch, RowBatches, StepBatch
from launcher.distributed import RankInfo
from launcher.errors import CheckpointError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.optimizers import OPTIMIZERS, Optimizer
from launcher.plan.run_dir import RunDir
from launcher.tracking.tracker import Composite
from launcher.train.engine import build_engine
from launcher.train.held_out_loss import EvalRows, Evaluator, Scorer
from launcher.train.loop import TrainingLoop, noop
from launcher.train.monitoring.step_metrics import StepTimer

NUM_ROWS, ROW_TOKENS = 2, 16
MOMENTUM_SGD = Optimizer(
    states=("momentum_buffer",),
    builder="extension_ranks:build_momentum_sgd",
    classes=("torch.optim.sgd.SGD",),
    counts_steps=False,
    can_offload=False,
    is_known_to_deepspeed=False,
)


def build_momentum_sgd(groups: list[dict[str, Any]], optim: OptimSection, deepspeed: DeepSpeedSection) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=optim.lr, momentum=0.9)


def join() -> RankInfo:
    """Join the other ranks."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{os.environ['RENDEZVOUS']}"
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=meeting,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
        verbose=False,
    )
    return RankInfo(rank, rank, world_size, attempt=1)


def train_with_momentum_sgd(plan_path: str, resume_step: int, save_step: int, last_step: int) -> dict[str, Any]:
    """Train to `last_step` with the plan for this world size, from a checkpoint unless `resume_step` is 0.

    Saves at `save_step`, unless that is 0. Returns the loss of each step over all ranks, the names of the stored tensors, and the
    error when they are loaded for another optimizer.
    """
    OPTIMIZERS["sgd"] = MOMENTUM_SGD
    rank_info, plan = join(), LaunchPlan.load(plan_path)
    engine, model = build_engine(plan, rank_info)
    parameters, root = model.parameters_by_name(), Path(plan.run_dir) / "checkpoints"
    if resume_step:
        shards.load(engine, parameters, store.get_at_step(root, resume_step).path)
    losses = []
    for step in range(resume_step + 1, last_step + 1):
        losses.append(_train_step(engine, rank_info, plan.batch.micro_batch_size, step))
        if step == save_step:
            _save(engine, parameters, root, step)
    dist.barrier()
    return {"losses": losses, "tensors": _tensor_names(root), "refusal": _load_as_another_optimizer(engine, parameters, root)}


def _train_step(engine: Any, rank_info: RankInfo, micro_batch_size: int, step: int) -> float:
    """Train one step; odd and even steps each have fixed rows. Returns the mean loss per token over all ranks."""
    rows = torch.randint(0, 1000, (NUM_ROWS, ROW_TOKENS), generator=torch.Generator().manual_seed(step % 2))
    mine = rows[rank_info.rank * micro_batch_size : (rank_info.rank + 1) * micro_batch_size]
    positions = torch.arange(ROW_TOKENS).expand_as(mine)
    loss = engine(mine, positions, mine.roll(-1, dims=1), rank_info.world_size / rows.numel())
    engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    total = loss.detach() / rank_info.world_size
    dist.all_reduce(total)
    return float(total)


def _save(engine: Any, parameters: Any, root: Path, step: int) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    saver = Saver(
        engine, parameters, root, plan_digest="", attempt=1, prune=lambda committed: None, background=False, deadline_s=60
    )
    saver.save(step, {}, wait=True)
    outcome = saver.wait()
    assert isinstance(outcome, Saved), outcome


def _load_as_another_optimizer(engine: Any, parameters: Any, root: Path) -> str:
    """The error when the newest checkpoint is loaded into an optimizer whose states have other names."""
    OPTIMIZERS["sgd"] = replace(MOMENTUM_SGD, states=("velocity",))
    try:
        shards.load(engine, parameters, store.get_latest(root).path)
    except CheckpointError as error:
        return f"{error.problems[0].message}: {error.problems[0].value}"
    return ""


def _tensor_names(root: Path) -> list[str]:
    """The tensor names in the newest checkpoint's first shard, without the parameter names."""
    names = load_file(store.get_latest(root).path / store.shard_name(0))
    return sorted({name.partition("|")[2] for name in names if not name.startswith("rng")})


class LabelSmoothed:
    """Negative log-likelihood with a tenth of the probability spread over the vocabulary; an atom is a trained token."""

    def count_atoms(self, batch: StepBatch) -> float:
        return batch.num_labels

    def sum_loss(self, engine: Any, micro: MicroBatch, device: torch.device, scale: float) -> torch.Tensor:
        return self._losses(engine, micro, device).sum() * scale

    @torch.no_grad()
    def atom_losses(self, engine: Any, micro: MicroBatch, device: torch.device) -> torch.Tensor:
        return self._losses(engine, micro, device)

    def _losses(self, engine: Any, micro: MicroBatch, device: torch.device) -> torch.Tensor:
        logits = engine(micro.input_ids.to(device), micro.position_ids.to(device)).float()
        labels = micro.labels.to(device).flatten()
        is_trained = labels != IGNORED
        logits = logits.flatten(0, 1)[is_trained]
        return torch.nn.functional.cross_entropy(logits, labels[is_trained], label_smoothing=0.1, reduction="none")


def train_with_label_smoothing(plan_path: str) -> dict[str, Any]:
    """Train four steps on the same two rows and evaluate on them. Returns the loss of each step and the held-out loss."""
    rank_info, plan = join(), LaunchPlan.load(plan_path)
    engine, model = build_engine(plan, rank_info)
    device, objective, batch = torch.device("cpu"), LabelSmoothed(), _step_batch()
    scorer = Scorer(engine, model, objective, rank_info, device, plan.topology)
    evaluator = Evaluator(scorer, [EvalRows("rows", _TwoRows(batch))], noop)
    parts = SimpleNamespace(
        engine=engine, objective=objective, timer=StepTimer(device), beat=noop, evaluator=evaluator, proof=None
    )
    run_dir = RunDir(Path(plan.run_dir))
    run = SimpleNamespace(plan=plan, rank_info=rank_info, device=device, run_dir=run_dir, tracker=Composite([]))
    loop = TrainingLoop(run, parts, noop)
    losses = []
    for _ in range(4):
        losses.append(float(loop.forward_backward_step(batch)))
        engine.step()
    (evaluated,) = evaluator.evaluate(4, noop, {"rows"}).sets
    return {"losses": losses, "held_out": evaluated.loss, "num_atoms": evaluated.num_tokens}


class _TwoRows(RowBatches):
    """The micro-batches of `_step_batch`, without a data cache."""

    def __init__(self, batch: StepBatch) -> None:
        self._micro = batch.micro

    def __len__(self) -> int:
        return len(self._micro)

    def load(self, number: int) -> MicroBatch:
        return self._micro[number]

    def label_sources(self, number: int) -> np.ndarray:
        return np.zeros(ROW_TOKENS - 1, np.int64)


def _step_batch() -> StepBatch:
    """Two micro-batches of one row each; the last token of a row has no label."""
    rows = torch.randint(0, 1000, (NUM_ROWS, ROW_TOKENS), generator=torch.Generator().manual_seed(0))
    labels = rows.roll(-1, dims=1)
    labels[:, -1] = IGNORED
    positions = torch.arange(ROW_TOKENS)[None]
    micro = [MicroBatch(rows[i, None], positions, labels[i, None], (i,)) for i in range(NUM_ROWS)]
    num_tokens = rows.numel()
    documents = {"num_trained": np.full(NUM_ROWS, ROW_TOKENS - 1)}
    return StepBatch(micro, num_tokens, num_tokens, documents, (ROW_TOKENS,) * NUM_ROWS, (0, 1))
