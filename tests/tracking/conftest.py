"""Fixtures: a plan, and W&B without login or network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import hand_made
import pytest
from plan_fixtures import PlanOf

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_records, run_store


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory of a run whose first attempt a user started."""
    run = RunDir(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    run_store.write_attempt(run, 1, run_records.Attempt(None))
    return run.root


@pytest.fixture
def make_plan(run_dir: Path) -> PlanOf:
    """Make a plan for `run_dir` with these tracking.* settings."""
    return functools.partial(_plan, run_dir)


@pytest.fixture(autouse=True)
def no_wandb_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _plan(run_dir: Path, **tracking: Any) -> LaunchPlan:
    settings = {
        "model": {"path": "./model"},
        "data": {"sources": [{"path": "train.jsonl"}]},
        "train": {"max_steps": 40},
        "tracking": tracking,
    }
    return hand_made.plan(run_dir, settings)
