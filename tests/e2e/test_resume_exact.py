"""A run that was stopped or killed, at any place and for any number of ranks, goes on as if it had been left alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, losses, processes_of, status
from killed_runs import MOMENTS, Killer, differences, draw_kills, restart_reasons, row_differences, steps_for
from ray_tools import rows_environment

Launch = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 40
SAVE_EVERY = 4
# Where the run on other numbers of ranks ends.
LAST_PART = 12
NUM_KILLS = 10

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


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
        f"train.save_every={SAVE_EVERY}",
        "train.keep_last=2",
    )
    return (*TINY, *own, *steps)


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, settings: tuple[str, ...], module_runs: Path) -> Path:
    run = module_runs / "undisturbed"
    asked = (f"run.root={module_runs}", "run.name=undisturbed", f"train.max_steps={STEPS}")
    done = launch(*settings, *asked, **rows_environment(rows_of(module_runs)))
    assert done.returncode == 0, done.stderr
    plan = json.loads((run / "plan.json").read_text())
    assert plan["data"]["num_rows"] == 40
    assert plan["batch"]["accumulation"] == 4
    assert len(set(losses(run).values())) == STEPS
    return run


def rows_of(runs: Path) -> Path:
    """The folder for the rows that the ranks of a run below `runs` are given."""
    return runs.parent / f"{runs.name}-rows"


def in_parts(launch: Launch, settings: tuple[str, ...], runs: Path, parts: list[tuple[int, int]]) -> Path:
    """A run that is continued to each step in turn, on as many ranks as stand beside it."""
    (first, ranks), *others = parts
    begin = (f"run.root={runs}", "run.name=parts", f"train.max_steps={first}", f"cluster.ranks_per_node={ranks}")
    done = launch(*settings, *begin)
    assert done.returncode == 0, done.stderr
    for step, ranks in others:
        done = launch("resume", str(runs / "parts"), f"train.max_steps={step}", f"cluster.ranks_per_node={ranks}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert status(runs / "parts")["step"] == LAST_PART
    return runs / "parts"


def test_ranks_killed_at_any_moment_change_nothing_to_the_last_bit(
    launch: Launch, start: Callable, settings: tuple[str, ...], runs: Path, undisturbed: Path
) -> None:
    """benchmarks/kills.py in small. The last kill finds no restart left: it ends the run, is named, and a resume goes on."""
    run, rows = runs / "killed", rows_of(runs)
    kills = draw_kills(seed=185, num_kills=NUM_KILLS, num_ranks=2, save_every=SAVE_EVERY)
    assert {kill.moment for kill in kills} == set(MOMENTS)
    assert steps_for(kills, SAVE_EVERY) <= STEPS
    asked = (f"run.root={runs}", "run.name=killed", f"train.max_steps={STEPS}", f"cluster.max_restarts={NUM_KILLS - 1}")
    with start(*settings, *asked, **rows_environment(rows)) as process:
        killer = Killer(run, lambda: process.poll() is not None)
        for kill in kills:
            killer.carry_out(kill)
        output, _ = process.communicate(timeout=90)
    reasons = restart_reasons(run)
    assert len(reasons) == NUM_KILLS - 1
    assert {reason.partition(": ")[2] for reason in reasons} == {"killed by SIGKILL"}
    last = kills[-1].rank
    assert process.returncode == 1
    assert f"rank {last} failed first: killed by SIGKILL" in output
    assert f"rank-{last:05d}.log" in output
    assert "resume" in output
    assert status(run)["state"] == "failed"
    assert json.loads((run / "attempts/001/exit.json").read_text())["first_failure"]["rank"] == last
    assert not processes_of(run)
    assert f"the attempt failed: rank {last}: killed by SIGKILL" in launch("status", str(run)).stdout

    done = launch("resume", str(run), **rows_environment(rows))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" in done.stdout
    assert status(run)["attempt"] == 2
    assert differences(run, undisturbed) == []
    assert row_differences(rows, rows_of(undisturbed.parent), num_ranks=2, num_steps=STEPS) == []


def test_on_other_numbers_of_ranks_the_losses_differ_by_rounding_alone(
    launch: Launch, settings: tuple[str, ...], runs: Path, undisturbed: Path
) -> None:
    run = in_parts(launch, settings, runs, [(3, 4), (6, 2), (8, 1), (10, 2), (LAST_PART, 4)])
    expected = {step: loss for step, loss in losses(undisturbed).items() if step <= LAST_PART}
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    # Rows that repeat or go missing would show in every later step: neighbouring ones are much farther apart, but for a chance.
    apart = [abs(expected[step + 1] / expected[step] - 1) > 1e-4 for step in range(1, LAST_PART)]
    assert sum(apart) >= len(apart) - 2
