"""Functions for ranks that score a data cache under a ZeRO-3 engine, over gloo; tests/forked_ranks.py runs them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from extension_ranks import join

from launcher.data.cache.split import Split
from launcher.data.loader import RowBatches
from launcher.data.score_store import ScoreKey, ScoreStore
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.train.engine import build_engine
from launcher.train.evaluation import score as score_module
from launcher.train.evaluation.evaluator import EvalRows, Evaluator
from launcher.train.evaluation.score import Scorer, score_rows
from launcher.train.objectives import OBJECTIVES

CPU = torch.device("cpu")


def score(
    plan_path: str, facts: dict[str, Any], micro_batch_size: int, key: dict[str, Any], root: str, end: str, after: int
) -> bool:
    """Score all rows of a cache, in shards of at most four micro-batches. Return whether all are scored.

    `end` is "kill" or "stop" to kill or stop rank 0 after `after` micro-batches, or else empty.
    """
    rank_info, plan = join(), LaunchPlan.load(plan_path)
    score_module.MAX_SHARD_MICRO_BATCHES = 4
    engine, model = build_engine(plan, rank_info)
    batches = RowBatches(Split.open(DataFacts.model_validate(facts)), micro_batch_size, pad_id=0)
    count = 0

    def before_micro_batch() -> str | None:
        nonlocal count
        count += 1
        if rank_info.is_main and count > after:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return "preempted" if end == "stop" else None
        return None

    scorer = Scorer(engine, model, OBJECTIVES["supervised"], rank_info, CPU)
    return score_rows(scorer, batches, ScoreStore(ScoreKey(**key), Path(root)), before_micro_batch)


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
    evaluator = Evaluator(Scorer(engine, model, OBJECTIVES["supervised"], rank_info, CPU), sets, lambda phase, step: None)
    evaluation = evaluator.evaluate(3, lambda: None, {"all", "three"})
    assert evaluation is not None
    stopped = evaluator.evaluate(3, lambda: "cancelled" if rank_info.is_main else None, {"all"})
    assert stopped is None
    return {"metrics": evaluation.metrics, "num_tokens": [one.num_tokens for one in evaluation.sets]}
