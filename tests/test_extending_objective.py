"""A training objective is a class and an entry in OBJECTIVES; here a real rank trains and evaluates with one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_ranks import RankServer
from plan_fixtures import config_of, facts_for

from launcher.config.schema import RunConfig
from launcher.plan.planner import plan

__all__ = ["config_of"]


@pytest.mark.rest
def test_a_registered_objective_is_trained_and_evaluated(
    config_of: Callable[..., RunConfig], rank_server: RankServer, tmp_path: Path
) -> None:
    settings = ("optim.lr=0.01", "model.dtype=fp32", "run.name=own", "train.global_batch_size=2", "train.micro_batch_size=1")
    config = config_of("model=tiny", *settings, "cluster.ranks_per_node=1")
    path = tmp_path / "plan.json"
    path.write_text(plan(config, facts_for(config, working_dir=str(tmp_path), vocab_size=1000)).to_json())
    (result,) = rank_server.values("extension_ranks:train_with_label_smoothing", [[str(path)]], tmp_path / "ranks")
    # Random weights predict a nearly uniform distribution, whose loss is log(vocabulary) with any smoothing.
    assert result["losses"][0] == pytest.approx(math.log(1000), rel=0.02)
    assert result["losses"][0] > result["losses"][-1]
    # The held-out loss is the mean over the same trained tokens, after the last step.
    assert result["held_out"] < result["losses"][-1]
    assert result["num_atoms"] == 2 * 15
