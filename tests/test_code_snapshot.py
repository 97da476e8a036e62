"""The code snapshot in a run directory is durable, checked against its digests, and replaced if it cannot be used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from launcher import run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run_store.copy_code(RunDir(tmp_path).code)
    return RunDir(tmp_path)


def test_code_of_an_earlier_launcher_is_replaced_and_kept(run: RunDir) -> None:
    assert run_store.is_code_current(run)
    shutil.rmtree(run.code)
    (run.code / "launcher").mkdir(parents=True)
    (run.code / "launcher/__init__.py").write_text("earlier")
    assert not run_store.is_code_current(run)
    earlier = run_store.replace_code(run, 1)
    assert earlier == run.root / "code-until-attempt-001"
    assert (earlier / "launcher/__init__.py").read_text() == "earlier"
    assert run_store.is_code_current(run)
    assert (run.code / "launcher/run_store.py").is_file()


def test_code_that_does_not_know_a_setting_of_today_is_replaced(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(LaunchPlan):
        setting_of_today: int = 0

    monkeypatch.setattr("launcher.plan.launch_plan.LaunchPlan", Later)
    assert not run_store.is_code_current(run)
    run_store.replace_code(run, 1)
    assert run_store.is_code_current(run)


def test_replacing_code_continues_after_an_interruption(run: RunDir) -> None:
    run.code.rename(run.earlier_code(1))
    (run.root / ".code").mkdir()
    assert not run_store.is_code_current(run)
    run_store.replace_code(run, 1)
    assert run_store.is_code_current(run)
    assert (run.earlier_code(1) / "launcher/run_store.py").is_file()


def test_code_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run = RunDir(tmp_path)
    run_store.copy_code(run.code)
    assert {str(path) for path in (run.code, *run.code.rglob("*"))} <= synced
