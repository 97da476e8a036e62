"""A run that was stopped, at any place and for any number of ranks, goes on as if it had been left alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, losses, metrics, status

Launch = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 12

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """40 rows in batches of 8: an epoch ends after every fifth step. In fp32 the order of sums costs next to nothing."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ["north", "south", "east", "west", "spring", "summer", "autumn", "winter"]
    rows = [{"text": " ".join(words[(row * step + step) % 8] for step in range(1, 40 + row % 5))} for row in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("data=jsonl", f"data.path={data}", "data.packing=false", "data.eval_fraction=0.0", "train.export=false")
    steps = (
        "train.global_batch_size=8",
        "train.micro_batch_size=1",
        "optim.schedule=constant",
        "optim.lr=1e-3",
        "model.dtype=fp32",
    )
    return (*TINY, *own, *steps)


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, settings: tuple[str, ...], module_runs: Path) -> Path:
    run = module_runs / "undisturbed"
    done = launch(*settings, f"run.root={module_runs}", "run.name=undisturbed", f"train.max_steps={STEPS}")
    assert done.returncode == 0, done.stderr
    plan = json.loads((run / "plan.json").read_text())
    assert plan["data"]["num_rows"] == 40
    assert plan["batch"]["accumulation"] == 4
    assert len(set(losses(run).values())) == STEPS
    return run


def in_parts(launch: Launch, settings: tuple[str, ...], runs: Path, parts: list[tuple[int, int]]) -> Path:
    """A run that is continued to each step in turn, on as many ranks as stand beside it."""
    (first, ranks), *others = parts
    begin = (f"run.root={runs}", "run.name=parts", f"train.max_steps={first}", f"cluster.ranks_per_node={ranks}")
    done = launch(*settings, *begin)
    assert done.returncode == 0, done.stderr
    for step, ranks in others:
        done = launch("resume", str(runs / "parts"), f"train.max_steps={step}", f"cluster.ranks_per_node={ranks}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert status(runs / "parts")["step"] == STEPS
    return runs / "parts"


def test_on_the_same_ranks_every_loss_and_rate_is_the_same_to_the_last_bit(
    launch: Launch, settings: tuple[str, ...], runs: Path, undisturbed: Path
) -> None:
    """Stopped in the middle of an epoch, and just where one ends."""
    run = in_parts(launch, settings, runs, [(3, 2), (10, 2), (STEPS, 2)])
    for name in ("train/loss", "train/lr", "train/grad_norm", "trainer/epoch", "trainer/tokens"):
        ours, theirs = ({m["trainer/step"]: m[name] for m in metrics(r) if name in m} for r in (run, undisturbed))
        assert ours == theirs, name


def test_on_other_numbers_of_ranks_the_losses_differ_by_rounding_alone(
    launch: Launch, settings: tuple[str, ...], runs: Path, undisturbed: Path
) -> None:
    run = in_parts(launch, settings, runs, [(3, 4), (6, 2), (8, 1), (10, 2), (STEPS, 4)])
    expected = losses(undisturbed)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    # Rows that repeat or go missing would show in every later step: neighbouring ones are much farther apart, but for a chance.
    apart = [abs(expected[step + 1] / expected[step] - 1) > 1e-4 for step in range(1, STEPS)]
    assert sum(apart) >= len(apart) - 2
