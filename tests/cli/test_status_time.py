"""The run time of `status`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable

import pytest

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker

Launch = Callable[..., subprocess.CompletedProcess[str]]


def test_a_long_run_is_shown_as_fast_as_a_short_one(launch: Launch, run: RunDir) -> None:
    """The run has 10,000 steps; the limit is generous because other programs may be running."""
    log = JsonlTracker(run, 2)
    metrics = {f"group/metric_{i}": 0.123456789 * i for i in range(40)}
    for step in range(11, 10_011):
        log.log(step, {"train/loss": 3.0, "perf/tokens_per_sec": 1.0, "time/step_s": 1.0, "memory/host_rss_gib": 1.0, **metrics})
    began = time.monotonic()
    done = launch("status", str(run.root), "--json")
    took = time.monotonic() - began
    assert json.loads(done.stdout)["metrics"]["trainer/step"] == 10_010
    assert took < 3


@pytest.mark.parametrize("state", ["completed", "running"])
def test_status_does_not_load_the_models_of_plans(launch: Launch, run: RunDir, state: str) -> None:
    """Importing pydantic would take as long as the rest of `status`."""
    run_store.update_status(run, state=state, job={"pid": os.getpid(), "host": "here", "started": 1.0})
    done = launch("status", str(run.root), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "launcher.checkpoint.manifest" in done.stderr
    assert "pydantic" not in done.stderr
