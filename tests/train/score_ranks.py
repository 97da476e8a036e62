"""Functions for ranks that score a data cache under a ZeRO-3 engine, over gloo; tests/forked_ranks.py runs them."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import torch
from extension_ranks import join

from launcher.data.loader import MicroBatch, RowBatches
from launcher.data.split import Split
from launcher.evaluate.document_losses import ScoreStore, score_rows
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.train.engine import build_engine
from launcher.train.held_out_loss import EvalRows, Evaluator, Scorer
from launcher.train.objectives import SupervisedNll

CPU = torch.device("cpu")


def score(plan_path: str, facts: dict[str, Any], micro_batch_size: int, root: str, kill_after: int | None) -> None:
    """Score all rows of a cache. Rank 0 is killed after `kill_after` micro-batches."""
    rank_info, plan = join(), LaunchPlan.load(plan_path)
    engine, model = build_engine(plan, rank_info)
    batches = RowBatches(Split.open(DataFacts.model_validate(facts)), micro_batch_size, pad_id=0)
    load, count = batches.load, itertools.count()

    def load_or_die(number: int) -> MicroBatch:
        if rank_info.is_main and next(count) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(number)

    batches.load = load_or_die  # type: ignore[method-assign]
    scorer = Scorer(engine, model, SupervisedNll(), rank_info, CPU, plan.topology)
    score_rows(scorer, batches, ScoreStore("key", len(batches), Path(root)), lambda done, total: None)


def evaluate(plan_path: str, facts: dict[str, Any], micro_batch_size: int) -> dict[str, Any]:
    """Evaluate two sets, all rows (by source) and three rows. Return the metrics and the token counts."""
    rank_info, plan = join(), LaunchPlan.load(plan_path)
    engine, model = build_engine(plan, rank_info)
    split = Split.open(DataFacts.model_validate(facts))
    sets = [
        EvalRows("all", RowBatches(split, micro_batch_size, pad_id=0), ("first", "second")),
        EvalRows(
            "three", RowBatches(split, micro_batch_size, pad_id=0, rows=torch.tensor([4, 0, 2]).numpy()), ("first", "second")
        ),
    ]
    scorer = Scorer(engine, model, SupervisedNll(), rank_info, CPU, plan.topology)
    evaluator = Evaluator(scorer, sets, lambda phase, step: None)
    evaluation = evaluator.evaluate(3, lambda: None, {"all", "three"})
    assert evaluation is not None
    stopped = evaluator.evaluate(3, lambda: "cancelled" if rank_info.is_main else None, {"all"})
    assert stopped is None
    return {"metrics": evaluation.metrics, "num_tokens": [one.num_tokens for one in evaluation.sets]}
