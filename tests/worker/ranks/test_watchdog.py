"""The watchdog finds and kills processes that really hang; test_stall_verdict.py tests the verdicts."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from pace import wait_for

from launcher.errors import RunError
from launcher.worker.ranks import watchdog as watchdog_module
from launcher.worker.ranks.heartbeat import PHASES, VARIABLE, Beat, Heartbeat, HeartbeatTable
from launcher.worker.ranks.rank_env import RankEnv
from launcher.worker.ranks.watchdog import Watchdog

pytestmark = pytest.mark.rest


@pytest.fixture
def table() -> Iterator[HeartbeatTable]:
    table = HeartbeatTable(2)
    yield table
    table.close()


def test_a_heartbeat_is_read_as_it_was_written(table: HeartbeatTable) -> None:
    assert table.read() == {}
    env = RankEnv(rank=5, local_rank=1, world_size=8, restart=0)
    heart = Heartbeat.from_environ({VARIABLE: str(table.path)}, env)
    assert table.read()[1].phase == "starting"
    before = time.monotonic()
    for phase in PHASES:
        heart.beat(phase, 7)
        assert table.read()[1].phase == phase
    read = table.read()
    assert set(read) == {1}
    assert before <= read[1].at <= time.monotonic()
    assert dataclasses.replace(read[1], at=0) == Beat(8, os.getpid(), 5, "finishing", 7, 0, True)


def test_heartbeats_need_no_table_and_a_missing_table_is_refused() -> None:
    env = RankEnv(rank=0, local_rank=0, world_size=1, restart=0)
    Heartbeat.from_environ({}, env).beat("training", 1)
    with pytest.raises(RunError, match="cannot send heartbeats to its node's agent"):
        Heartbeat.from_environ({VARIABLE: "/proc/self/fd/999"}, env)


def read_until_told(log: Path) -> None:
    """Read a file again and again, as loading does, until the file `enough` exists."""
    weights = log.with_suffix(".weights")
    weights.write_bytes(bytes(4 << 20))
    while not log.with_name("enough").exists():
        weights.read_bytes()
        time.sleep(0.05)


def rank(table: Path, local_rank: int, way: str, log: Path) -> None:
    """Act as a rank: send heartbeats, then fall silent in the given `way`."""
    faulthandler.register(signal.SIGQUIT, file=log.open("w"), all_threads=True, chain=False)
    heart = Heartbeat(table, local_rank, 10 + local_rank)
    if way == "stopped while loading":
        heart.beat("joined", 0)
        os.kill(os.getpid(), signal.SIGSTOP)
    if way in ("reads", "waits for the one that reads"):
        heart.beat("joined", 0)
        if way == "reads":
            read_until_told(log)
        waits_for_the_others()
    for step in range(3):
        heart.beat("training", step)
    if way == "behind":
        time.sleep(120)
    heart.beat("training", 3)
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while way == "lively":
        heart.beat("training", 3)
        time.sleep(0.05)
    waits_for_the_others()


def waits_for_the_others() -> None:
    time.sleep(120)


STALL_S = 1.0
# Fork, because the watchdog watches only children; they also need no imports.
FORK = multiprocessing.get_context("fork")
Start = Callable[..., list[multiprocessing.process.BaseProcess]]


@pytest.fixture
def start(table: HeartbeatTable, tmp_path: Path) -> Iterator[Start]:
    started: list[multiprocessing.process.BaseProcess] = []

    def run(*ways: str, at: HeartbeatTable = table) -> list[multiprocessing.process.BaseProcess]:
        for local_rank, way in enumerate(ways):
            process = FORK.Process(target=rank, args=(at.path, local_rank, way, tmp_path / f"{local_rank}.log"))
            process.start()
            started.append(process)
        return started

    yield run
    for process in started:
        process.kill()
        process.join(10)


def exit_code(process: multiprocessing.process.BaseProcess, within_s: float = 5) -> int | None:
    process.join(within_s)
    return process.exitcode


@pytest.fixture
def asked() -> list[int]:
    """The ranks whose flight recorders were requested."""
    return []


@pytest.fixture
def reports(table: HeartbeatTable, asked: list[int]) -> Iterator[list[str]]:
    """The reports of the watchdog of this test's table."""
    reports: list[str] = []
    watchdog = Watchdog(table, STALL_S, 1800, reports.append, on_silence=asked.extend).start()
    yield reports
    watchdog.stop()


def wait_for_report(reports: list[str], deadline_s: float = 20) -> str:
    end = time.monotonic() + deadline_s
    while not reports:
        assert time.monotonic() < end, "no report"
        time.sleep(0.02)
    return reports[0]


def test_a_stopped_rank_is_killed_and_the_others_only_dump_their_stacks(
    start: Start, reports: list[str], asked: list[int], tmp_path: Path
) -> None:
    waiting, stopped = start("waits", "stopped")
    report = wait_for_report(reports)
    assert report.startswith(f"rank 11 (pid {stopped.pid}) is stopped by a signal (SIGSTOP): no progress for ")
    assert report.endswith(" s in step 4; killed it")
    assert exit_code(stopped) == -signal.SIGKILL
    time.sleep(STALL_S)
    assert waiting.is_alive(), "elastic ends it"
    assert len(reports) == 1
    assert "waits_for_the_others" in (tmp_path / "0.log").read_text()
    assert {10, 11} == set(asked)


def test_all_ranks_of_all_nodes_are_asked_for_their_collectives_at_the_first_silence(
    start: Start, table: HeartbeatTable, tmp_path: Path
) -> None:
    """Ranks that wait for a silent one may become late only after it was killed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    other_table, reports, asked = HeartbeatTable(1), {"here": [], "there": []}, {"here": [], "there": []}
    tables = {"here": table, "there": other_table}
    watchdogs = [
        Watchdog(tables[node], 8 * STALL_S, 1800, reports[node].append, store, asked[node].extend).start() for node in tables
    ]
    start("lively", "stopped")
    (lively_there,) = start("lively", at=other_table)[2:]
    try:
        assert "rank 11" in wait_for_report(reports["here"], 60)
        wait_for("the request of the other node", lambda: asked["there"])
        assert (sorted(asked["here"]), asked["there"]) == ([10, 11], [10])
        assert lively_there.is_alive()
        assert reports["there"] == []
    finally:
        for watchdog in watchdogs:
            watchdog.stop()
        other_table.close()


def test_a_hang_is_ended_although_nothing_can_be_learned_of_it(start: Start, table: HeartbeatTable) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("can't start new thread")

    reports: list[str] = []
    watchdog = Watchdog(table, STALL_S, 1800, reports.append, on_silence=fail, explain=fail).start()
    (stopped,) = start("stopped")
    assert wait_for_report(reports).endswith("killed it")
    assert exit_code(stopped) == -signal.SIGKILL
    watchdog.stop()


def test_ranks_wait_as_long_as_one_of_another_node_reads(
    start: Start, table: HeartbeatTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node's agent judges its own ranks, and learns from the head node's store whether any rank of the run still reads."""
    from torch.distributed import TCPStore

    monkeypatch.setattr(watchdog_module, "_MIN_LOAD_S", STALL_S)
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    other_table, reports = HeartbeatTable(1), {"here": [], "there": []}
    (reader,) = start("reads")
    waiting = start("waits for the one that reads", at=other_table)[1]
    here = Watchdog(table, STALL_S, 1800, reports["here"].append, store).start()
    there = Watchdog(other_table, STALL_S, 1800, reports["there"].append, store).start()
    try:
        time.sleep(4 * STALL_S)
        assert reports == {"here": [], "there": []}
        assert reader.is_alive()
        assert waiting.is_alive()
        (tmp_path / "enough").touch()
        for process, node in ((reader, "here"), (waiting, "there")):
            report = wait_for_report(reports[node])
            assert "reads nothing, and neither does any other rank: no progress for " in report
            assert exit_code(process) == -signal.SIGKILL
    finally:
        here.stop()
        there.stop()
        other_table.close()


def test_a_rank_behind_is_killed_with_its_stacks_in_its_log(start: Start, reports: list[str], tmp_path: Path) -> None:
    behind, waiting = start("behind", "waits")
    assert "rank 10" in wait_for_report(reports)
    assert "behind" in reports[0]
    assert exit_code(behind) == -signal.SIGKILL
    assert waiting.is_alive()
    assert "most recent call first" in (tmp_path / "0.log").read_text()


def test_the_time_in_which_the_agent_was_stopped_is_no_silence(start: Start, table: HeartbeatTable, reports: list[str]) -> None:
    start("waits", "waits")
    end = time.monotonic() + 20
    while [beat.step for beat in table.read().values()] != [3, 3]:
        assert time.monotonic() < end, "the ranks have not begun"
        time.sleep(0.02)
    # This call holds the GIL, so the watchdog cannot run, as if `scontrol suspend` had stopped the agent.
    ctypes.PyDLL(None).sleep(4)
    silent_s = re.search(r"no progress for (\d+) s", wait_for_report(reports))
    assert silent_s is not None
    assert int(silent_s[1]) < 4


def test_stall_seconds_zero_turns_the_watchdog_off(table: HeartbeatTable, start: Start) -> None:
    reports: list[str] = []
    watchdog = Watchdog(table, 0, 1800, reports.append).start()
    stopped = start("stopped")[0]
    process, end = psutil.Process(stopped.pid), time.monotonic() + 20
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.02)
    # The watchdog would look every tenth of the limit, which is 0 here.
    time.sleep(0.3)
    watchdog.stop()
    assert stopped.is_alive()
    assert reports == []
