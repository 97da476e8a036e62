"""A process is found again by its pid and start, whatever happens to the machine's clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from steps import start_of_process

from launcher.clusters import detached_process
from launcher.locks import Holder, is_same_start, read_start
from launcher.run_records import Status


@pytest.fixture
def set_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """After this, the machine's clock is an hour ahead, as far as psutil knows."""
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert psutil.boot_time() == booted + 3600


def test_a_process_is_known_by_its_start_after_the_clock_was_set(request: pytest.FixtureRequest) -> None:
    holder, job = Holder.this_process("pytest"), detached_process.describe_this_process()
    status = Status("running", 1, job=job)
    request.getfixturevalue("set_the_clock")
    assert psutil.Process().create_time() - job["started"] == pytest.approx(3600)
    assert not holder.has_ended
    found = detached_process.find_process(status)
    assert found is not None
    assert found.pid == os.getpid()
    # Another process with this pid:
    assert replace(holder, started=holder.started - 1).has_ended
    assert (
        detached_process.find_process(replace(status, job={**job, "started_after_boot": job["started_after_boot"] - 1})) is None
    )


def test_a_process_that_has_ended_has_no_start() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert read_start(process.pid) is None
    assert read_start(process.pid) is None


def test_starts_are_compared_with_a_tolerance_below_the_time_in_which_pids_are_reused() -> None:
    assert is_same_start(8.0, 8.02)
    assert not is_same_start(8.0, 8.6)


def test_the_start_of_a_process_in_time_of_day_is_exact() -> None:
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        after = time.time()
        started = start_of_process(process.pid)
        process.kill()
    # The kernel counts in ticks of 0.01 s.
    assert before - 0.02 <= started <= after + 0.02
