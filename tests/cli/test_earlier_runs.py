"""What a plan takes from existing runs: their measured MFU, and names already in use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import hand_made
import pytest
from plan_fixtures import H100
from unusual_files import as_root, give

from launcher.cli.start_run import find_measured_mfu
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.jsonl import JsonlTracker

__all__ = ["as_root"]

PlanOf = Callable[..., LaunchPlan]
MODEL = ("model=qwen3_0_6b", "data=jsonl", "data.path=rows.jsonl", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=2")


def trained(plan_of: PlanOf, root: Path, name: str, mfu: float, peak: float = 989, num_steps: int = 9, *settings: str) -> RunDir:
    """Create a run with a slow first step, whose MFU then rises by 0.001 per step."""
    plan = plan_of(*MODEL, *settings, f"run.root={root}", f"run.name={name}", device=H100)
    run = hand_made.run(plan, Attempt(None), state="completed", step=num_steps, max_steps=num_steps)
    log = JsonlTracker(run, 1)
    for step in range(1, num_steps + 1):
        rate = mfu + step / 1000 if step > 1 else 0.01
        log.log(step, {"train/loss": 1.0, "perf/mfu": rate, "perf/tflops_per_gpu": rate * peak})
    return run


@pytest.mark.rest
def test_the_newest_run_of_the_same_model_and_gpu_is_the_measurement(plan_of: PlanOf, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    later = plan_of(*MODEL, f"run.root={root}", "run.name=later", device=H100)
    assert find_measured_mfu(later, "H100-80GB") is None
    for age, (name, mfu, *different) in enumerate(
        [
            ("recomputing", 0.9, 989, 9, "model.activation_checkpointing=true"),
            ("offloaded", 0.8, 989, 9, "deepspeed=zero3_offload"),
            ("on-a100", 0.7, 312),
            ("short", 0.6, 989, 5),
            ("newer", 0.3),
            ("older", 0.2),
        ]
    ):
        run = trained(plan_of, root, name, mfu, *different)
        os.utime(run.plan, (2e9 - age, 2e9 - age))
    (root / "newer" / "notes.txt").write_text("not read")
    damaged = trained(plan_of, root, "damaged", 0.9)
    damaged.plan.write_text("{")
    found = find_measured_mfu(later, "NVIDIA H100 80GB HBM3")
    assert found is not None
    assert (found.run_name, found.num_ranks, found.low, found.high) == ("newer", 2, pytest.approx(0.302), pytest.approx(0.309))
    # An H200 has the same peak FLOP/s as an H100; an A100 does not.
    assert find_measured_mfu(later, "H200") == found
    assert [found.run_name for found in [find_measured_mfu(later, "A100-80GB")] if found] == ["on-a100"]
    assert find_measured_mfu(later, "Abacus 3000") is None


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("as_root")
def test_a_run_of_another_user_is_no_measurement(plan_of: PlanOf, tmp_path: Path) -> None:
    """In a shared folder of runs, reading a pipe in place of metrics.jsonl would block every plan."""
    root = tmp_path / "runs"
    later = plan_of(*MODEL, f"run.root={root}", "run.name=later", device=H100)
    trained(plan_of, root, "own", 0.3)
    give(trained(plan_of, root, "forged", 0.9).root)
    piped = trained(plan_of, root, "piped", 0.9)
    piped.metrics.unlink()
    os.mkfifo(piped.metrics)
    give(piped.root)
    found = find_measured_mfu(later, "H100-80GB")
    assert found is not None
    assert found.run_name == "own"


@pytest.mark.rest
def test_plan_shows_the_measurement_and_that_the_name_is_taken(
    plan_of: PlanOf, launch_here: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    run = trained(plan_of, tmp_path / "runs", "first", 0.3)
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n')
    settings = [*MODEL[:1], "data=jsonl", f"data.path={tmp_path}/rows.jsonl", *MODEL[3:], f"run.root={tmp_path}/runs"]
    settings += ["train.max_steps=1000", "cluster.price_per_gpu_hour=3", "model.attention=sdpa"]
    environment = {"LAUNCHER_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = launch_here("plan", "--json", *settings, "run.name=first", **environment)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    estimate = values["estimate"]
    assert estimate["mfu"] == pytest.approx([0.302, 0.309])
    assert estimate["basis"].startswith("measured in run first on 2 ranks; assumes one document of")
    low, high = estimate["hours"]
    assert 0 < low < high
    assert estimate["usd"] == pytest.approx([6 * low, 6 * high])
    assert values["checkpoint_gib"] == pytest.approx(values["checkpoint_bytes"] / 2**30, abs=0.001)
    (warning,) = values["warnings"]
    assert f"python -m launcher status {run.root}" in warning
    text = launch_here("plan", *settings, "run.name=first", **environment).stdout
    assert f"warning    {warning}\n" in text
    assert "MFU 30% to 31%, measured in run first on 2 ranks" in text
    free = json.loads(launch_here("plan", "--json", *settings, "run.name=second", **environment).stdout)
    assert (free["warnings"], free["estimate"]["mfu"]) == ([], estimate["mfu"])
