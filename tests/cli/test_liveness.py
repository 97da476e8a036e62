"""Commands that start or remove a run do not rely on the times of another machine's files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.cli.status import find_living_problem, require_ended, require_idle
from launcher.clusters import detached_process
from launcher.clusters.local import LocalCluster
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import Liveness


@pytest.fixture
def run(run: RunDir) -> RunDir:
    elsewhere = {**detached_process.describe_this_process(), "host": "another", "space": "another-boot pid:[1]"}
    run_store.update_status(run, state="running", job=elsewhere)
    detached_process.write_liveness(run)
    set_age(run, 400)
    return run


def set_age(run: RunDir, seconds: float) -> None:
    at = time.time() - seconds
    for file in (run.status, run.alive):
        os.utime(file, (at, at))


@pytest.fixture(autouse=True)
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached_process, "_LOOK_S", 0.05)
    monkeypatch.setattr(detached_process, "_WATCH_S", 0.5)


@contextmanager
def refreshed(run: RunDir) -> Iterator[None]:
    """Refresh the run's file as a machine whose clock is 400 seconds behind, on storage that keeps the writer's clock."""
    ended = threading.Event()

    def refresh() -> None:
        at = time.time() - 400
        while not ended.wait(0.02):
            # At no moment does the file have today's time.
            partial = run.root / ".partial"
            json_records.write(partial, Liveness(time.time(), "another"))
            os.utime(partial, (at, at))
            os.replace(partial, run.alive)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


def test_a_run_whose_machine_has_another_clock_is_neither_started_nor_removed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detached_process, "_WATCH_S", 30.0)
    with refreshed(run):
        assert LocalCluster().status(run).state == "failed", "its last sign of life seems to be 400 seconds old"
        with pytest.raises(SubmitError, match="the run is still alive") as refusal:
            require_idle(run, LocalCluster())
        assert "on another" in str(refusal.value.problems[0].value)
        assert "the clocks of two machines differ" in str(refusal.value)
        problem = find_living_problem(run)
    assert problem is not None
    assert problem.message.startswith("the run is still alive")
    assert "checking for 30 seconds whether the run demo is still alive on another" in capsys.readouterr().err


def test_a_run_that_nobody_refreshes_has_ended(run: RunDir) -> None:
    require_ended(run)
    assert find_living_problem(run) is None


def test_nobody_waits_for_a_run_that_is_silent_for_hours_or_has_ended(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached_process, "_WATCH_S", 600.0)
    set_age(run, 7200)
    require_ended(run)
    run_store.update_status(run, state="completed")
    set_age(run, 400)
    require_ended(run)
