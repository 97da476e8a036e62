from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import hand_made
import pytest

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.train.monitoring import monitor
from launcher.train.monitoring.monitor import StatusFile


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose second attempt has just started its ranks."""
    return hand_made.run(tmp_path / "demo", state="running", attempt=2, job={"id": "7"}, message="starting")


def step_on_disk(run: RunDir, step: int) -> bool:
    deadline = time.monotonic() + 20
    while run_store.read_status(run).step != step and time.monotonic() < deadline:
        time.sleep(0.01)
    return run_store.read_status(run).step == step


def no_alert(text: str) -> None:
    pytest.fail(text)


def test_a_state_is_on_disk_at_once_and_fields_of_others_are_kept(run: RunDir) -> None:
    file = StatusFile(run, 2, no_alert, is_main=True)
    file.write_state("saving", 12)
    status = run_store.read_status(run)
    assert (status.state, status.step, status.message) == ("saving", 12, "")
    assert (status.attempt, status.job, status.max_steps) == (2, {"id": "7"}, 40)
    StatusFile(run, 2, no_alert, is_main=False).write_state("running", 99)
    assert run_store.read_status(run) == status


def test_steps_are_written_now_and_then_without_holding_up_training(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each disk write blocks until the test releases it, as on storage that hangs."""
    monkeypatch.setattr(monitor, "_UPDATE_INTERVAL_S", 0.05)
    through, writes, fsync = threading.Event(), [], os.fsync

    def slow(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            writes.append(descriptor)
            assert through.wait(30)
        fsync(descriptor)

    file = StatusFile(run, 2, no_alert, is_main=True)
    monkeypatch.setattr(os, "fsync", slow)
    began = time.monotonic()
    for step in range(1, 101):
        file.update_step(step)
        time.sleep(0.001)
    assert time.monotonic() - began < 10
    deadline = time.monotonic() + 20
    while not writes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(writes) == 1
    assert run_store.read_status(run).step == 0
    through.set()
    assert step_on_disk(run, 1)
    time.sleep(0.06)
    monkeypatch.setattr(monitor, "_UPDATE_INTERVAL_S", 1e6)
    file.update_step(101)
    assert step_on_disk(run, 101)
    for _ in range(20):
        # Keep updating after the write of step 101 has ended.
        file.update_step(102)
        time.sleep(0.01)
    file.write_state("saving", 103)
    status = run_store.read_status(run)
    assert (status.state, status.step) == ("saving", 103)
    assert len(writes) == 3, "102 came too soon after 101"


def test_a_failed_write_is_an_alert(run: RunDir) -> None:
    run.status.unlink()
    alerts: list[str] = []
    StatusFile(run, 2, alerts.append, is_main=True).write_state("running", 3)
    assert len(alerts) == 1
    assert alerts[0].startswith("status.json could not be written: a file of the run is missing")


def test_a_superseded_attempt_writes_nothing(run: RunDir) -> None:
    file = StatusFile(run, 2, (alerts := []).append, is_main=True)
    run.attempt(3).mkdir(parents=True)
    run_store.update_status(run, attempt=3)
    file.write_state("running", 12)
    assert run_store.read_status(run).attempt == 3
    assert run_store.read_status(run).step == 0
    assert "attempt 3 has taken over" in alerts[0]
