"""Timers on two real ranks of a ZeRO-3 engine identify the rank that computes slowly, not the one that waits."""

from __future__ import annotations

import pytest
import torch
from forked_ranks import RankServer
from torch import nn

from launcher.train.monitoring.rank_timing import LayerTimer, representative_layer


@pytest.fixture(scope="module")
def ranks(rank_server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return rank_server.values("train_ranks:probe_engine", [[], []], tmp_path_factory.mktemp("probe"))


@pytest.mark.rest
def test_only_the_slow_rank_has_a_long_layer_time(ranks: list[dict]) -> None:
    first, second = ranks
    assert all(rank["slow"]["step_s"] > 0.3 for rank in ranks), "both take as long for the step"
    # The 0.3 s are divided by 32 tokens.
    assert second["slow"]["per_token_s"] > 0.3 / 32
    assert first["slow"]["per_token_s"] < 0.1 / 32


def test_recomputation_is_timed(ranks: list[dict]) -> None:
    first, second = ranks
    assert (second["slow"]["calls"], second["recomputed"]["calls"]) == (1, 2)
    assert 0.3 / 32 < second["recomputed"]["per_token_s"] < 0.5 / 32
    assert first["recomputed"]["per_token_s"] < 0.1 / 32


def test_no_collective_is_timed(ranks: list[dict]) -> None:
    assert all(rank["elsewhere"]["step_s"] > 0.2 for rank in ranks)
    assert all(rank["elsewhere"]["per_token_s"] < 0.1 / 32 for rank in ranks), "nobody waits in the layer"
    assert all(rank["evaluated"] != rank["evaluated"] for rank in ranks), "evaluation is not training"


def test_only_the_rank_with_the_slow_optimizer_has_a_long_optimizer_time(ranks: list[dict]) -> None:
    first, second = ranks
    assert all(rank["optimizer"]["step_s"] > 0.3 for rank in ranks)
    assert second["optimizer"]["optim_s"] > 0.3
    assert 0 < first["optimizer"]["optim_s"] < 0.1
    assert all(0 < rank["elsewhere"]["optim_s"] < 0.1 for rank in ranks)


def test_a_layer_that_is_called_by_keyword_is_timed() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    timer = LayerTimer(model, torch.device("cpu"))
    layer(input=torch.zeros(2, 3, 4))
    assert timer.read() > 0


def test_the_timed_layer_is_the_largest_of_the_middle_block() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8 + i)) for i in range(3))
    model = nn.ModuleDict({"blocks": blocks, "few": nn.ModuleList([nn.Linear(99, 99)])})
    assert representative_layer(model) is blocks[1][1]
    assert representative_layer(nn.Linear(4, 4)) is None
