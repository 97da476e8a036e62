"""When a machine of an attempt counts as lost, whatever clocks and storage do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.clusters import static
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker import static as static_agent
from launcher.worker.static import Peers

LOST_S = 180.0
RECORD = Attempt(None, nodes=("a", "b"))


class Clock:
    """A monotonic clock that only moves when told; the time of day stays real."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (static, static_agent):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, time=clock.time, sleep=time.sleep))
    return clock


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    for node, name in enumerate(RECORD.nodes):
        static.write_alive(run, 1, node, name)
    return run


def watch_for(watch: static.HeartbeatWatch, clock: Clock, seconds: float, step_s: float = 0.5) -> static.NodeState:
    """Look every `step_s` and return the last state of machine b."""
    state = watch.look()[1]
    for _ in range(round(seconds / step_s)):
        clock.now += step_s
        state = watch.look()[1]
    return state


def test_a_machine_is_lost_when_its_file_has_not_changed_for_long_enough(run: RunDir, clock: Clock) -> None:
    watch = static.HeartbeatWatch(run, 1, RECORD)
    assert watch_for(watch, clock, LOST_S).is_alive
    state = watch_for(watch, clock, 1.0)
    assert not state.is_alive
    assert state.lost == "b was lost: no sign of life for 3m01s"
    assert static.describe_silence([state]) == {"b": state.lost}
    static.write_alive(run, 1, 1, "b")
    assert watch_for(watch, clock, 1.0).is_alive


def test_the_times_of_files_do_not_count(run: RunDir, clock: Clock) -> None:
    """Lustre and CephFS store the time of the machine that wrote the file, whose clock may be behind."""
    watch = static.HeartbeatWatch(run, 1, RECORD)
    for _ in range(30):
        static.write_alive(run, 1, 1, "b")
        os.utime(static.alive_file(run, 1, 1), (1e9, 1e9))
        assert watch_for(watch, clock, 10.0).is_alive


def test_an_outage_of_the_storage_counts_as_nobodys_silence(run: RunDir, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = static.HeartbeatWatch(run, 1, RECORD)
    assert watch_for(watch, clock, 5.0).is_alive
    # A hard NFS mount blocks during an outage.
    refresh = static.atomic_files.refresh_directory

    def blocked(folder: Path) -> float:
        clock.now += 400
        return refresh(folder)

    monkeypatch.setattr(static.atomic_files, "refresh_directory", blocked)
    assert watch.look()[1].is_alive
    monkeypatch.setattr(static.atomic_files, "refresh_directory", refresh)
    assert watch_for(watch, clock, 100.0).is_alive, "the other machine has time to write again"

    def failing(folder: Path) -> float:
        raise OSError("Stale file handle")

    monkeypatch.setattr(static.atomic_files, "refresh_directory", failing)
    for _ in range(40):
        clock.now += 10
        with pytest.raises(OSError, match="Stale"):
            watch.look()
    monkeypatch.setattr(static.atomic_files, "refresh_directory", refresh)
    assert watch_for(watch, clock, 60.0).is_alive
    assert watch_for(watch, clock, 60.0).lost, "it has been silent for 225 seconds in which this machine could look"


def test_time_in_which_this_machine_was_suspended_does_not_count(run: RunDir, clock: Clock) -> None:
    watch = static.HeartbeatWatch(run, 1, RECORD)
    watch.look()
    clock.now += 3600
    assert watch.look()[1].is_alive


def test_a_machine_that_comes_back_gets_the_whole_patience_the_next_time(run: RunDir, clock: Clock) -> None:
    killed: list[int] = []
    watcher = Peers(run, 1, RECORD, 0, killed.append)
    alive, lost = static.NodeState("b", 1.0, False), static.NodeState("b", 200.0, False, "b was lost")
    for state, after_s in ((lost, 0), (alive, 5), (lost, 60), (lost, 9)):
        clock.now += after_s
        watcher._write_alive()
        watcher.heartbeats.look = lambda state=state: [static.NodeState("a", 0.0, False), state]
        watcher._look_at_peers()
        assert watcher.why_ended() == ""
    clock.now += 2
    watcher._look_at_peers()
    assert watcher.why_ended() == "remote process exited: b was lost"
    watcher.start()
    deadline = time.monotonic() + 20
    while not killed and time.monotonic() < deadline:
        time.sleep(0.05)
    watcher.stop()
    assert signal.SIGKILL in killed
