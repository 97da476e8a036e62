"""Ranks that share rows: four ranks in two pairs train, evaluate, save and score as two ranks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hand_made
import numpy as np
import pytest
import torch
from e2e_tools import TINY, assembled, json_lines, metrics
from forked import Launch
from forked_ranks import RankServer
from planned_ranks import PlannedRanks, build_plan

from launcher.evaluate.document_losses import ScoreStore
from launcher.plan.launch_plan import LaunchPlan

STEPS, SAVED_STEP = 6, 3
SETTINGS = (
    *TINY,
    "data=jsonl",
    "data.eval_fraction=0.2",
    "train.global_batch_size=6",
    "eval.every=2",
    "export.enabled=false",
    "model.dtype=fp32",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    # An update is proportional to the gradient where that is small, so rounding errors stay small.
    "optim.eps=1e-4",
    "optim.lr=1e-3",
)

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def planned(launch_here: Launch, tmp_path_factory: pytest.TempPathFactory) -> LaunchPlan:
    """A plan for two ranks; its data are built."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    texts = [" ".join(map(str, range(row, row + 9 + row % 5))) for row in range(90)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return build_plan(launch_here, *SETTINGS, f"data.path={data}")


@pytest.fixture
def ranks(rank_server: RankServer, tmp_path: Path) -> PlannedRanks:
    return PlannedRanks(rank_server, tmp_path)


def call(ranks: PlannedRanks, function: str, num_ranks: int, plan: LaunchPlan, *arguments: Any) -> list[Any]:
    """Call a function of topology_ranks.py on two ranks with different rows, or on four of which two each share rows."""
    return ranks.call(f"topology_ranks:{function}", num_ranks, plan, num_ranks // 2, *arguments)


def train(ranks: PlannedRanks, plan: LaunchPlan, name: str, *parts: tuple[int, int]) -> tuple[Path, list[list[Any]]]:
    """Train a run in parts, each to a step on a number of ranks; return the run, and what the ranks of each part return."""
    returned = []
    for attempt, (step, num_ranks) in enumerate(parts, 1):
        part = ranks.prepare(plan, name, step, attempt, parts[attempt - 2][0] if attempt > 1 else None)
        returned.append(call(ranks, "train", num_ranks, part, attempt))
    return ranks.folder / name, returned


@pytest.mark.parametrize("accumulation", [1, 3])
def test_pairs_of_ranks_train_as_single_ranks(ranks: PlannedRanks, planned: LaunchPlan, accumulation: int) -> None:
    """The run in pairs is resumed on two ranks that do not share rows."""
    plan = hand_made.changed(planned, f"train.micro_batch_size={3 // accumulation}")
    single, [of_single] = train(ranks, plan, "single", (STEPS, 2))
    paired, [of_pairs, of_resumed] = train(ranks, plan, "paired", (SAVED_STEP, 4), (STEPS, 2))
    assert {rank["accumulation"] for rank in (*of_single, *of_pairs, *of_resumed)} == {accumulation}
    for number in range(STEPS):
        first, second = (rank["rows"][str(number)] for rank in of_single)
        assert first != second
        if number < SAVED_STEP:
            assert [rank["rows"][str(number)] for rank in of_pairs] == [first, first, second, second]
        else:
            assert [rank["rows"][str(number)] for rank in of_resumed] == [first, second]

    def values(run: Path, name: str) -> dict[int, float]:
        return {line["trainer/step"]: line[name] for line in metrics(run) if name in line}

    for name in ("train/loss", "train/grad_norm", "eval/held_out/loss", "trainer/tokens"):
        expected, same = values(single, name), values(paired, name)
        print(name, max(abs(same[step] - value) for step, value in expected.items()))
        assert len(expected) >= 4
        assert {step: same[step] for step in expected} == pytest.approx(expected, rel=0, abs=1e-6), name
    evaluated = (
        {line["text"] for line in json_lines(run / "events.jsonl") if line["kind"] == "eval"} for run in (single, paired)
    )
    assert set.issubset(*evaluated), "the numbers of tokens are in the texts"
    tensors, same_tensors = (assembled(run / f"checkpoints/step-{STEPS:08d}") for run in (single, paired))
    for name, tensor in tensors.items():
        torch.testing.assert_close(same_tensors[name], tensor, rtol=1e-4, atol=1e-7)


def test_one_rank_of_a_pair_writes_scores(ranks: PlannedRanks, planned: LaunchPlan, tmp_path: Path) -> None:
    first, second = call(ranks, "score", 2, planned, str(tmp_path / "single"))
    assert first
    assert call(ranks, "score", 4, planned, str(tmp_path / "paired")) == [first, [], second, []]
    assert planned.data is not None
    num_batches = -(-planned.data.num_rows // planned.batch.micro_batch_size)
    scores, same = (ScoreStore("key", num_batches, tmp_path / name).read() for name in ("single", "paired"))
    assert len(scores) == planned.data.num_trained_tokens
    assert np.array_equal(scores, same)


def test_a_plan_with_pairs_is_refused(planned: LaunchPlan) -> None:
    pairs = planned.model_copy(update={"topology": planned.topology.model_copy(update={"sequence_ranks": 2})})
    with pytest.raises(ValueError, match=r"topology\.sequence_ranks: Input should be 1"):
        LaunchPlan.from_json(pairs.to_json())
