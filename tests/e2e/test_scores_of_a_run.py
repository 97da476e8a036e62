"""Scoring a run's data from the command line reproduces the losses that training logged, and stores them for later commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_tools import TINY, losses, metrics
from forked import Launch, require_exit

from launcher.data.split import Split
from launcher.plan.launch_plan import LaunchPlan

pytestmark = pytest.mark.rest


STEPS = 5
# Tolerance: training and scoring use the same micro-batches, but add the losses in a different order.
SAME_LOSS = 1e-4


@pytest.fixture(scope="module")
def run(train_here: Launch, module_runs: Path) -> Path:
    settings = (
        f"train.max_steps={STEPS}",
        "checkpoint.save_every=1",
        "checkpoint.keep_last=2",
        "optim.lr=1e-2",
        "model.dtype=fp32",
    )
    done = train_here(*TINY, *settings, "export.enabled=false", f"run.root={module_runs}", "run.name=scored")
    require_exit(done)
    return module_runs / "scored"


def answer(launch_here: Launch, *arguments: str) -> dict[str, Any]:
    done = launch_here(*arguments, "--json")
    require_exit(done)
    return json.loads(done.stdout)


def test_the_held_out_loss_is_the_one_that_training_logged(launch_here: Launch, run: Path, tmp_path: Path) -> None:
    logged = [line["eval/held_out/loss"] for line in metrics(run) if "eval/held_out/loss" in line]
    report = answer(launch_here, "data", "--scored", str(run), "--split", "held_out")
    assert report["step"] == STEPS
    assert report["mean_loss"] == pytest.approx(logged[-1], abs=SAME_LOSS)
    assert abs(logged[0] - logged[-1]) > 100 * SAME_LOSS, "the weights of another step have another loss"
    ranked = report["lists"]["mislabeled"]
    explained = [1 - entry["loss"] / entry["loss_alone"] for entry in ranked]
    assert explained == sorted(explained)
    assert all(entry["where"] and entry["prompt"] and entry["answer"] for entry in ranked[:10])
    page, exclude = tmp_path / "page.html", tmp_path / "exclude.jsonl"
    again = launch_here("data", "--scored", str(run), "--split", "held_out", "--html", str(page), "--exclude", str(exclude))
    require_exit(again)
    assert "answers with their prompts:" not in again.stderr, "the scores are stored"
    assert ranked[0]["where"] in again.stdout
    assert ranked[0]["where"].rpartition(":")[2] in page.read_text()
    excluded = [json.loads(line)["content"] for line in exclude.read_text().splitlines()]
    assert excluded == [entry["content"] for entry in ranked if entry["likely"]]


def test_the_rows_of_a_step_have_the_loss_that_training_logged(launch_here: Launch, run: Path) -> None:
    report = answer(launch_here, "why", str(run), str(STEPS))
    assert report["scored_at"] == STEPS - 1
    documents = [document for row in report["rows"] for document in row["documents"]]
    trained = sum(document["trained_tokens"] for document in documents)
    loss = sum(document["loss"] * document["trained_tokens"] for document in documents if document["trained_tokens"]) / trained
    assert loss == pytest.approx(losses(run)[STEPS], abs=SAME_LOSS)
    plan = LaunchPlan.load(run / "plan.json")
    assert plan.data is not None
    split = Split.open(plan.data)
    assert trained == split.columns["num_trained"][split.docs_of(np.array([row["row"] for row in report["rows"]]))].sum()
    assert {line["step"] for line in report["steps"]} == {2, 3, 4, 5}
    # This model started from random weights, and no checkpoint before step 2 is kept.
    text = launch_here("why", str(run), "2")
    require_exit(text)
    assert "no losses of documents: there is no checkpoint before step 2" in text.stdout
    assert "checkpoint.keep_last keeps more" in text.stdout


def test_an_unknown_split_or_step_names_those_that_exist(launch_here: Launch, run: Path) -> None:
    for arguments, words in (
        (("data", "--scored", str(run), "--split", "held-out"), "choose one of: train, held_out"),
        (("data", "--scored", str(run), "--step", "0"), "random weights"),
        (("why", str(run), "9"), f"it has logged 1 to {STEPS}"),
    ):
        done = launch_here(*arguments)
        require_exit(done, 2)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
