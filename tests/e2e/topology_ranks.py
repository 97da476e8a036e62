"""Functions for ranks of which some share rows, over gloo; tests/forked_ranks.py runs them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from extension_ranks import join

from launcher.data.loader import RowBatches, StepBatch, TrainBatches
from launcher.data.split import Split
from launcher.distributed import RankInfo
from launcher.evaluate.document_losses import ScoreStore, score_rows
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import resize_plan
from launcher.train import loop
from launcher.train.engine import build_engine
from launcher.train.held_out_loss import Scorer
from launcher.train.loop import noop
from launcher.train.objectives import SupervisedNll


def load_plan(path: str, sequence_ranks: int) -> LaunchPlan:
    """A plan for the ranks of this process's group, of which `sequence_ranks` share rows."""
    planned, num_ranks = LaunchPlan.load(path), int(os.environ["WORLD_SIZE"])
    topology = planned.topology.model_copy(update={"sequence_ranks": sequence_ranks})
    return resize_plan(planned.model_copy(update={"topology": topology}), num_ranks, num_ranks)


def train(path: str, sequence_ranks: int, attempt: int) -> dict[str, Any]:
    """Train to the end of the plan; return the accumulation, and the rows that this rank was given by step."""
    plan, rows = load_plan(path, sequence_ranks), dict[int, list[tuple[int, ...]]]()
    make = TrainBatches.step

    def make_and_record(batches: TrainBatches, step: int) -> StepBatch:
        batch = make(batches, step)
        rows[step] = [micro.row_ids for micro in batch.micro]
        return batch

    TrainBatches.step = make_and_record  # type: ignore[method-assign]
    train_to_end(plan, attempt)
    return {"accumulation": plan.batch.accumulation, "rows": rows}


def train_to_end(plan: LaunchPlan, attempt: int) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    class NeverStop(SimpleNamespace):
        def __call__(self) -> None:
            return None

    loop.train(plan, RankInfo(rank, rank, world_size, attempt), NeverStop(at=None, cancel=noop, begin_training=noop))


def score(path: str, sequence_ranks: int, root: str) -> list[int]:
    """Score the training rows; return the shards that this rank wrote."""
    rank_info, plan = join(), load_plan(path, sequence_ranks)
    engine, model = build_engine(plan, rank_info)
    scorer = Scorer(engine, model, SupervisedNll(), rank_info, torch.device("cpu"), plan.topology)
    assert plan.data is not None
    batches, written = RowBatches(Split.open(plan.data), plan.batch.micro_batch_size, pad_id=0), []

    class Watched(ScoreStore):
        def commit(self, number: int, log_probs: Any) -> None:
            written.append(number)
            super().commit(number, log_probs)

    score_rows(scorer, batches, Watched("key", len(batches), Path(root)), noop)
    return written
