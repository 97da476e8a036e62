"""The cost of a run in `status`, `ls` and `report`."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher import atomic_files, json_records, run_store
from launcher.cli.main import main
from launcher.cli.status import summarize
from launcher.plan.run_dir import RunDir

Launch = Callable[..., subprocess.CompletedProcess[str]]


def test_on_cpus_rank_hours_are_counted(launch_here: Launch, run: RunDir) -> None:
    plan = json_records.read_json(run.plan)
    atomic_files.write_json(run.plan, plan | {"topology": plan["topology"] | {"device": "cpu", "backend": "gloo"}})
    assert "cost        $3.40 so far (1.70 rank hours)" in launch_here("status", str(run.root)).stdout
    assert "$3.40" in launch_here("ls", "--root", str(run.root.parent)).stdout
    assert launch_here("report", str(run.root)).returncode == 0
    page = (run.root / "report.html").read_text()
    assert "rank hours" in page
    assert "GPU hours" not in page


def test_the_expected_cost_follows_from_the_pace(run: RunDir) -> None:
    status = run_store.update_status(run, state="running")
    # One more hour on two ranks, at two dollars per GPU hour.
    assert summarize(run, status)["cost"]["expected_usd"] == pytest.approx(3.4 + 2 * 2.0)
    run_store.write_attempt(run, 2, replace(run_store.read_attempt(run, 2), num_workers=3))
    assert summarize(run, status)["cost"]["expected_usd"] == pytest.approx(3.4 + 3 * 2.0), "an idle worker is paid for"


def test_attempts_that_never_trained_are_paid_for(launch_here: Launch, run: RunDir) -> None:
    """Two GPUs ran for 51 minutes without logging a step. Waiting for the first machines costs nothing."""
    run.metrics.unlink()
    atomic_files.write_json(run.attempt(1) / "exit.json", {"state": "failed", "ended_at": time.time()})
    for file in run.attempt(2).iterdir():
        file.unlink()
    run.attempt(2).rmdir()
    status = run_store.update_status(run, state="failed", attempt=1, step=0)
    cost = summarize(run, status)["cost"]
    assert cost == {
        "gpu_hours": pytest.approx(1.7, abs=0.01),
        "usd": pytest.approx(3.4, abs=0.02),
        "expected_usd": None,
        "at_typical_price": False,
    }
    assert "$3.40" in launch_here("ls", "--root", str(run.root.parent)).stdout
    plan = json_records.read_json(run.plan)
    atomic_files.write_json(run.plan, plan | {"price": None})
    assert summarize(run, status)["cost"] == cost | {"usd": None}
    atomic_files.write_json(run.plan, plan | {"price": None, "topology": plan["topology"] | {"device": "cpu", "backend": "gloo"}})
    assert summarize(run, status)["cost"] is None
    (run.attempt(1) / "exit.json").unlink()
    run_store.write_attempt(run, 1, replace(run_store.read_attempt(run, 1), begun_at=None))
    atomic_files.write_json(run.plan, plan)
    assert summarize(run, replace(status, state="pending"))["cost"] is None


def test_a_typical_price_is_marked(launch_here: Launch, run: RunDir) -> None:
    plan = run_store.load_plan(run)
    assert plan.price is not None
    typical = replace(plan.price, assumption="typical")
    atomic_files.write_text(run.plan, plan.model_copy(update={"price": typical}).to_json())
    words = "$3.40 so far (1.70 GPU hours); at a typical price; set yours with cluster.price_per_gpu_hour"
    assert f"cost        {words}\n" in launch_here("status", str(run.root)).stdout
    assert json.loads(launch_here("status", str(run.root), "--json").stdout)["cost"]["at_typical_price"] is True
    assert " ~$3.40 " in launch_here("ls", "--root", str(run.root.parent)).stdout
    assert launch_here("report", str(run.root)).returncode == 0
    assert "$3.40 at a typical price" in (run.root / "report.html").read_text()
    # Without the attempts' files, the plan provides the price.
    shutil.rmtree(run.attempts)
    assert f"cost        {words}\n" in launch_here("status", str(run.root)).stdout


@pytest.mark.parametrize("price", [[], {"usd_per_gpu_hour": "much"}])
def test_a_plan_with_a_damaged_price_is_an_error_that_names_it(
    run: RunDir, capsys: pytest.CaptureFixture[str], price: object
) -> None:
    plan = json.loads(run.plan.read_text())
    atomic_files.write_json(run.plan, plan | {"price": price})
    assert main(["status", str(run.root)]) == 2
    said = capsys.readouterr().err
    assert "the plan of this run cannot be read by this launcher" in said
    assert str(run.plan) in said
