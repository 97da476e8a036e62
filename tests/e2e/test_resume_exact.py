"""A stopped, killed or damaged run resumes as if undisturbed, at any step and on any number of ranks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from causes import assert_run_named_first
from e2e_tools import (
    TINY,
    alerts,
    assembled,
    committed,
    flip,
    held,
    last_step,
    losses,
    metrics,
    processes_of,
    rows_environment,
    status,
    truncate,
)
from forked import Launch, require_exit
from hand_made import end_of
from killed_runs import MOMENTS, Killer, differences, draw_kills, restart_reasons, row_differences, steps_for
from pace import wait_for

from launcher.runs.run_records import RUNNING_STATES

STEPS = 44
SAVE_EVERY = 4
# max_steps of the interrupted run at first; the resume raises it to STEPS.
ASKED_AT_FIRST = 42
# (max_steps, number of ranks) for each part of the run that changes its number of ranks.
PARTS = [(SAVE_EVERY, 4), (2 * SAVE_EVERY, 1), (9, 2)]
NUM_KILLS = 5

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """20 rows in batches of 4: an epoch ends after every fifth step. In fp32 the order of sums changes results very little.

    With so large an eps, an update is proportional to the gradient where that is small, so rounding errors stay small.
    """
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ["north", "south", "east", "west", "spring", "summer", "autumn", "winter"]
    rows = [{"text": " ".join(words[(row * step + step) % 8] for step in range(1, 40 + row % 5))} for row in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("data=jsonl", f"data.path={data}", "data.packing=false", "data.eval_fraction=0.0", "export.enabled=false")
    steps = (
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "optim.eps=1e-4",
        "optim.lr=1e-3",
        "model.dtype=fp32",
        f"checkpoint.save_every={SAVE_EVERY}",
        "checkpoint.keep_last=3",
    )
    return (*TINY, *own, *steps)


@pytest.fixture(scope="module")
def undisturbed(train_here: Launch, settings: tuple[str, ...], module_runs: Path) -> Path:
    run = module_runs / "undisturbed"
    overrides = (
        f"run.root={module_runs}",
        "run.name=undisturbed",
        f"train.max_steps={STEPS}",
        f"checkpoint.keep_every={SAVE_EVERY}",
    )
    done = train_here(*settings, *overrides, **rows_environment(rows_of(module_runs)))
    require_exit(done)
    plan = json.loads((run / "plan.json").read_text())
    assert plan["data"]["num_rows"] == 20
    assert plan["batch"]["accumulation"] == 2
    assert len(set(losses(run).values())) == STEPS
    return run


@pytest.fixture(scope="module")
def parts(train_here: Launch, settings: tuple[str, ...], module_runs: Path) -> Path:
    """A run that is resumed up to each step of PARTS, on the number of ranks given there; all checkpoints are kept.

    One global batch of 4 is 4 ranks x 1, then 1 rank x 4 accumulated, with activation checkpointing, then 2 ranks x 2. Each
    part starts with a trial of the batch that needs the most memory, which must not change the results.
    """
    (first, ranks), *others = PARTS
    overrides = (f"run.root={module_runs}", "run.name=parts", f"train.max_steps={first}", f"cluster.ranks_per_node={ranks}")
    done = train_here(*settings, *overrides, "checkpoint.keep_last=9", "train.largest_batch_first=true")
    require_exit(done)
    for step, ranks in others:
        part = (f"train.max_steps={step}", f"cluster.ranks_per_node={ranks}", f"model.activation_checkpointing={ranks == 1}")
        done = train_here("resume", str(module_runs / "parts"), *part)
        require_exit(done)
    assert status(module_runs / "parts")["step"] == PARTS[-1][0]
    events = (module_runs / "parts" / "events.jsonl").read_text()
    assert events.count("the largest batch, ") == len(PARTS)
    return module_runs / "parts"


def rows_of(runs: Path) -> Path:
    """The folder for the rows that the ranks of a run in `runs` receive."""
    return runs.parent / f"{runs.name}-rows"


def assert_stopped(run: Path) -> int:
    """Check that the run was stopped and saved; returns the step."""
    step = status(run)["step"]
    assert status(run)["state"] == "cancelled"
    assert step == last_step(run) < STEPS
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
    assert not processes_of(run)
    return step


def assert_passed_over(run: Path, damaged: dict[Path, str], output: str, shown: str) -> None:
    """Check that the newest attempt reported these damaged checkpoints, each with its problem, and began at the one before."""
    attempt = status(run)["attempt"]
    before = json.loads((run / f"attempts/{attempt:03d}/attempt.json").read_text())["resume_step"]
    for checkpoint, problem in damaged.items():
        step = int(checkpoint.name.removeprefix("step-"))
        (alert,) = [text for text in alerts(run) if text.startswith(f"the checkpoint of step {step} is damaged")]
        assert "(rank-00001.safetensors: " in alert
        assert problem in alert
        assert f"set aside as damaged-{checkpoint.name}, and training continues from step {before}" in alert
        assert alert in output
        assert alert in shown
        assert step - len(damaged) * SAVE_EVERY <= before < step
        assert f"damaged-{checkpoint.name}" in committed(run)
    trained = [line["trainer/step"] for line in metrics(run) if line["attempt"] == attempt and "train/loss" in line]
    assert trained == list(range(before + 1, last_step(run) + 1))


def test_a_killed_stopped_and_damaged_run_resumes_bit_for_bit(
    train_here: Launch, launch_here: Launch, start_here: Callable, settings: tuple[str, ...], runs: Path, undisturbed: Path
) -> None:
    """Three attempts of one run; the comparison with the undisturbed run comes once, at the end."""
    run, rows = runs / "disturbed", rows_of(runs)
    env = rows_environment(rows)
    overrides = (*settings, f"run.root={runs}", "run.name=disturbed")

    # 1. A small version of benchmarks/kills.py. The last kill finds no restart left: the run ends, names it, and can be resumed.
    kills = draw_kills(seed=340, num_kills=NUM_KILLS, num_ranks=2, save_every=SAVE_EVERY)
    assert {kill.moment for kill in kills[:-1]} == set(MOMENTS)
    # The next part needs three checkpoints, and the newest may not be complete yet.
    kills[-1] = replace(kills[-1], rank=1, signal=signal.SIGSEGV, moment="training", steps=3 * SAVE_EVERY + 2)
    assert steps_for(kills, SAVE_EVERY) <= 40
    with start_here(*overrides, f"train.max_steps={ASKED_AT_FIRST}", f"cluster.max_restarts={NUM_KILLS - 1}", **env) as process:
        killer = Killer(run, lambda: process.poll() is not None)
        for kill in kills:
            killer.carry_out(kill)
        output, _ = process.communicate(timeout=90)
    reasons = [reason.partition(": ")[2] for reason in restart_reasons(run)]
    assert reasons == ["killed by SIGKILL"] * (NUM_KILLS - 1)
    assert process.returncode == 1
    assert "rank 1 failed first: killed by SIGSEGV" in output
    assert "rank-00001.log" in output
    assert "resume" in output
    assert end_of(run)["first_failure"]["rank"] == 1
    assert not processes_of(run)
    assert_run_named_first(launch_here, run, "segv")

    # 2. The two newest checkpoints are damaged; the run is stopped by SIGTERM.
    *_, older, newer = (run / "checkpoints" / name for name in committed(run) if name.startswith("step-"))
    flip(older)
    truncate(newer)
    with start_here("resume", str(run), f"train.max_steps={STEPS}", **env) as process:
        with held(run, last_step(run) + 3):
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    assert "continuing" in output
    assert "cancelled" in output
    stopped_at = assert_stopped(run)
    damaged = {older: "its digest differs", newer: "has the wrong size (4,096 bytes"}
    assert_passed_over(run, damaged, output, launch_here("status", str(run)).stdout)

    # 3. The run is detached; a second command is refused and names the running attempt; then the run completes.
    done = train_here("resume", str(run), "--detach", **env)
    require_exit(done)
    assert "continuing" in done.stdout
    with held(run, stopped_at + 2):
        shown = json.loads(launch_here("status", "disturbed", "--root", str(runs), "--json").stdout)
        assert shown["state"] in RUNNING_STATES
        assert status(run)["attempt"] == 3
        assert status(run)["max_steps"] == STEPS, "what a resume changed stays changed"
        agent = status(run)["job"]["pid"]
        for second in (overrides, ("resume", str(run))):
            refused = launch_here(*second)
            require_exit(refused, 2)
            assert f"attempt 3, process {agent} on {os.uname().nodename}, of user {run.owner()}, since 2" in refused.stderr
            assert f"python -m launcher logs {run} -f" in refused.stderr
            assert f"python -m launcher cancel {run}" in refused.stderr
        assert status(run)["state"] == "running"
    wait_for("the run to complete", lambda: status(run)["state"] == "completed")
    wait_for("its processes to end", lambda: not processes_of(run), deadline_s=30)
    refused = launch_here("cancel", "disturbed", "--root", str(runs))
    assert refused.returncode == 2
    assert "not running" in refused.stderr
    # Nothing runs now, so the existing directory is the reason for the refusal.
    refused = launch_here(*overrides)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr
    assert (status(run)["attempt"], status(run)["step"]) == (3, STEPS)
    assert launch_here("checkpoints", str(run), "--verify").returncode == 0
    assert differences(run, undisturbed) == []
    assert row_differences(rows, rows_of(undisturbed.parent), num_ranks=2, num_steps=STEPS) == []


def test_losses_on_other_numbers_of_ranks_differ_only_by_rounding(parts: Path, undisturbed: Path) -> None:
    last = PARTS[-1][0]
    expected = {step: loss for step, loss in losses(undisturbed).items() if step <= last}
    assert losses(parts) == pytest.approx(expected, rel=1e-5)
    # Repeated or missing rows would show in each later step: losses of neighboring steps differ far more, apart from rare
    # coincidences.
    apart = [abs(expected[step + 1] / expected[step] - 1) > 1e-4 for step in range(1, last)]
    assert sum(apart) >= len(apart) - 2


def test_loss_and_parameters_do_not_depend_on_ranks_and_accumulation(undisturbed: Path, parts: Path) -> None:
    for step, _ in PARTS[:2]:
        checkpoint = f"checkpoints/step-{step:08d}"
        reference, tensors = assembled(undisturbed / checkpoint), assembled(parts / checkpoint)
        assert any(tensor.abs().max() > 0 for name, tensor in reference.items() if name.endswith("|exp_avg"))
        assert tensors.keys() == reference.keys()
        for key, tensor in reference.items():
            # exp_avg is a running sum of gradients, so comparing it compares the gradients.
            torch.testing.assert_close(
                tensors[key], tensor, rtol=1e-4, atol=1e-7, msg=lambda text, key=key, step=step: f"step {step} {key}: {text}"
            )
    for step in range(1, 2 * SAVE_EVERY + 1):
        assert losses(parts)[step] == pytest.approx(losses(undisturbed)[step], rel=1e-6)
