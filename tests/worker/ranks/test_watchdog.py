"""Which ranks are stalled and which are killed: decided on values, then with processes that really hang."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import math
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
from launcher.worker.ranks.watchdog import StallLimits, StallVerdict, Watchdog, stalled, stalled_in_loading

NOW = 100_000.0
LIMITS = StallLimits(stall_s=60, rare_s=1800)
ALIVE = {0: "running", 1: "sleeping"}


def beat(ago: float, count: int = 500, phase: str = "training", slowest: float = 2.0, trained: bool = True) -> Beat:
    return Beat(count, 4242, 0, phase, 16, NOW - ago, slowest, trained)


def judge(
    beats: dict[int, Beat], states: dict[int, str] = ALIVE, limits: StallLimits = LIMITS, since: float = 0.0
) -> StallVerdict:
    return stalled(beats, states, NOW, limits, since)


def test_a_rank_with_heartbeats_is_not_stalled() -> None:
    assert judge({0: beat(1), 1: beat(59.9)}) == StallVerdict()
    assert judge({}) == StallVerdict()


@pytest.mark.parametrize(
    "state", [psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP, psutil.STATUS_ZOMBIE]
)
def test_a_rank_that_cannot_run_is_killed_at_once_and_alone(state: str) -> None:
    verdict = judge({0: beat(61), 1: beat(61)}, {0: "running", 1: state})
    assert verdict.stalled == {0: 61, 1: 61}
    assert list(verdict.kill) == [1]


def test_a_rank_that_cannot_run_is_killed_before_one_that_is_behind() -> None:
    verdict = judge({0: beat(80, count=499), 1: beat(80)}, {0: "running", 1: psutil.STATUS_STOPPED})
    assert list(verdict.kill) == [1]


def test_disk_sleep_between_heartbeats_is_no_stall() -> None:
    assert judge({0: beat(1), 1: beat(2)}, {0: "running", 1: psutil.STATUS_DISK_SLEEP}) == StallVerdict()


def test_a_rank_behind_the_others_is_killed_alone_and_after_a_quarter_more() -> None:
    beats = {0: beat(70), 1: beat(74, count=499), 2: beat(70)}
    states = {**ALIVE, 2: "running"}
    early = judge(beats, states)
    assert set(early.stalled) == {0, 1, 2}
    assert not early.kill
    assert list(judge({**beats, 1: beat(76, count=499)}, states).kill) == [1]


def test_a_rank_behind_is_found_although_others_sent_heartbeats_since() -> None:
    assert list(judge({0: beat(40), 1: beat(76, count=499)}).kill) == [1]


def test_the_rank_in_front_is_not_killed_for_being_silent_first() -> None:
    verdict = judge({0: beat(89, count=501), 1: beat(59, count=500)})
    assert set(verdict.stalled) == {0}
    assert not verdict.kill


def test_ranks_that_wait_for_another_node_are_killed_together_after_one_and_a_half_limits() -> None:
    waiting = judge({0: beat(89), 1: beat(88)})
    assert set(waiting.stalled) == {0, 1}
    assert not waiting.kill
    assert set(judge({0: beat(91), 1: beat(88)}).kill) == {0, 1}


def test_the_limit_is_ten_times_the_slowest_step() -> None:
    assert judge({0: beat(199, slowest=20), 1: beat(199, slowest=20)}) == StallVerdict()
    slow = {0: beat(201, slowest=20), 1: beat(201, slowest=20)}
    assert set(judge(slow).stalled) == {0, 1}
    assert not judge(slow).kill
    assert set(judge({r: beat(301, slowest=20) for r in (0, 1)}).kill) == {0, 1}


@pytest.mark.parametrize("phase, limit", [("training", 60), ("evaluating", 60), ("saving", 1800)])
def test_the_limit_is_longer_while_saving(phase: str, limit: float) -> None:
    writing = {0: psutil.STATUS_DISK_SLEEP}
    assert judge({0: beat(limit - 1, phase=phase)}, writing) == StallVerdict()
    assert list(judge({0: beat(limit + 1, phase=phase)}, writing).kill) == [0]


@pytest.mark.parametrize("state", [psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE])
def test_a_rank_that_is_stopped_while_it_saves_is_killed_as_soon_as_one_that_trains(state: str) -> None:
    beats = {0: beat(61, phase="saving"), 1: beat(61, phase="saving")}
    verdict = judge(beats, {0: "sleeping", 1: state})
    assert list(verdict.kill) == [1]
    assert judge({**beats, 1: beat(59, phase="saving")}, {0: "sleeping", 1: state}) == StallVerdict()


def test_an_export_has_no_limit() -> None:
    assert judge({0: beat(10**6, phase="finishing")}, {0: psutil.STATUS_STOPPED}) == StallVerdict()


def test_ranks_that_have_not_trained_or_have_ended_are_not_judged() -> None:
    assert judge({0: beat(900, phase="loaded", trained=False), 1: beat(900, phase="evaluating", trained=False)}) == StallVerdict()
    assert judge({0: beat(900), 1: beat(1)}, {1: "running"}) == StallVerdict()
    # Nor does what the dead one has counted make the living one late.
    assert not judge({0: beat(900, count=900), 1: beat(80)}, {1: "running"}).kill


def test_silence_from_before_the_watchdog_resumed_does_not_count() -> None:
    assert judge({0: beat(900), 1: beat(900)}, since=NOW - 30) == StallVerdict()
    assert set(judge({0: beat(900), 1: beat(900)}, since=NOW - 95).kill) == {0, 1}


def loading(ago: float, phase: str = "joined", trained: bool = False) -> Beat:
    return beat(ago, phase=phase, trained=trained)


@pytest.mark.parametrize("phase", ["starting", "joined", "loaded"])
def test_a_rank_that_cannot_run_is_killed_while_it_loads(phase: str) -> None:
    beats, states = {0: loading(61, phase), 1: loading(61, phase)}, {0: "sleeping", 1: psutil.STATUS_STOPPED}
    verdict = stalled_in_loading(beats, states, NOW, LIMITS, since=0.0, others_at=math.inf)
    assert dict(verdict.kill) == {1: "is stopped by a signal (SIGSTOP)"}
    beats[1] = loading(59, phase)
    assert stalled_in_loading(beats, states, NOW, LIMITS, since=0.0, others_at=math.inf) == StallVerdict()


def test_ranks_that_read_nothing_are_killed_only_where_no_rank_of_the_run_reads() -> None:
    beats = {0: loading(301), 1: loading(400)}
    for others_at in (-math.inf, NOW - 301):
        assert set(stalled_in_loading(beats, ALIVE, NOW, LIMITS, 0.0, others_at).kill) == {0, 1}
    for others_at in (NOW - 299, math.inf):
        assert not stalled_in_loading(beats, ALIVE, NOW, LIMITS, 0.0, others_at).kill
    for other in (loading(1), loading(900, trained=True), loading(900, "evaluating")):
        assert not stalled_in_loading({**beats, 1: other}, ALIVE, NOW, LIMITS, 0.0, -math.inf).kill
    assert not stalled_in_loading(beats, ALIVE, NOW, LIMITS, since=NOW - 30, others_at=-math.inf).kill


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
    assert dataclasses.replace(read[1], at=0, slowest_step_s=0) == Beat(8, os.getpid(), 5, "finishing", 7, 0, 0, True)


def test_the_slowest_step_excludes_evaluations_and_saves(table: HeartbeatTable, monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Heartbeat(table.path, 0, 0)
    clock = iter([10, 12, 15, 17, 117, 120, 121, 122])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    heart.beat("loaded", 0)
    assert not table.read()[0].trained
    for phase, step, slowest in (
        ("training", 0, 0),
        ("training", 0, 0),
        ("training", 1, 5),
        ("saving", 1, 5),
        ("training", 1, 5),
        ("training", 1, 5),
        ("training", 2, 5),
    ):
        heart.beat(phase, step)
        assert table.read()[0].slowest_step_s == slowest, (phase, step)
        assert table.read()[0].trained


def test_heartbeats_need_no_table_and_a_missing_table_is_refused() -> None:
    env = RankEnv(rank=0, local_rank=0, world_size=1, restart=0)
    Heartbeat.from_environ({}, env).beat("training", 1)
    with pytest.raises(RunError, match="cannot send heartbeats to its node's agent"):
        Heartbeat.from_environ({VARIABLE: "/proc/self/fd/999"}, env)


def read_until_told(log: Path) -> None:
    """What loading looks like from outside."""
    weights = log.with_suffix(".weights")
    weights.write_bytes(bytes(4 << 20))
    while not log.with_name("enough").exists():
        weights.read_bytes()
        time.sleep(0.05)


def rank(table: Path, local_rank: int, way: str, log: Path) -> None:
    """What a rank does: it beats, and at its second step falls silent in the way it is told to."""
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
# Forked, for the watchdog watches children, and they need nothing that would have to be imported.
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
    """The ranks that were asked for the collectives that they have recorded."""
    return []


@pytest.fixture
def reports(table: HeartbeatTable, asked: list[int]) -> Iterator[list[str]]:
    """What the watchdog of this test's table has reported."""
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
    """Those that wait for a silent rank may be late only after it has been killed."""
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


def test_a_rank_that_is_stopped_while_it_loads_is_killed(start: Start, reports: list[str]) -> None:
    (stopped,) = start("stopped while loading")
    report = wait_for_report(reports)
    assert report.startswith(f"rank 10 (pid {stopped.pid}) is stopped by a signal (SIGSTOP): no progress for ")
    assert report.endswith(" s while the model is loaded; killed it")
    assert exit_code(stopped) == -signal.SIGKILL


def test_ranks_wait_as_long_as_one_of_another_node_reads(
    start: Start, table: HeartbeatTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node's agent judges its own ranks, and learns from the head node's store whether any rank of the run reads."""
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


def test_ranks_without_a_culprit_on_their_node_are_killed_together_last(start: Start, reports: list[str]) -> None:
    began = time.monotonic()
    ranks = start("waits", "waits")
    report = wait_for_report(reports)
    assert time.monotonic() - began > 1.5 * STALL_S
    assert "rank 10" in report
    assert "rank 11" in report
    assert [exit_code(rank) for rank in ranks] == [-signal.SIGKILL] * 2


def test_the_successor_of_a_killed_rank_is_watched_as_well(start: Start, reports: list[str]) -> None:
    exit_code(start("stopped")[0], 20)
    wait_for_report(reports)
    reports.clear()
    second = start("stopped")[1]
    assert f"(pid {second.pid}) is stopped" in wait_for_report(reports)


def test_the_time_in_which_the_agent_was_stopped_is_no_silence(start: Start, table: HeartbeatTable, reports: list[str]) -> None:
    start("waits", "waits")
    end = time.monotonic() + 20
    while [beat.step for beat in table.read().values()] != [3, 3]:
        assert time.monotonic() < end, "the ranks have not begun"
        time.sleep(0.02)
    # This call holds the GIL, so the watchdog stands still, as if `scontrol suspend` had stopped the agent.
    ctypes.PyDLL(None).sleep(4)
    silent_s = re.search(r"no progress for (\d+) s", wait_for_report(reports))
    assert silent_s is not None
    assert int(silent_s[1]) < 4


def test_ranks_with_heartbeats_and_foreign_processes_are_left_alone(
    start: Start, table: HeartbeatTable, reports: list[str], tmp_path: Path
) -> None:
    lively = start("lively")[0]
    reader, writer = FORK.Pipe()

    def parent() -> None:
        child = FORK.Process(target=rank, args=(table.path, 1, "waits", tmp_path / "1.log"))
        child.start()
        writer.send(child.pid)
        child.join()

    other = FORK.Process(target=parent)
    other.start()
    grandchild = psutil.Process(reader.recv())
    try:
        time.sleep(2.5 * STALL_S)
        assert grandchild.is_running()
        assert lively.is_alive()
        assert reports == []
    finally:
        grandchild.kill()
        other.join(10)


def test_stall_seconds_zero_turns_the_watchdog_off(table: HeartbeatTable, start: Start) -> None:
    reports: list[str] = []
    watchdog = Watchdog(table, 0, 1800, reports.append).start()
    stopped = start("stopped")[0]
    process, end = psutil.Process(stopped.pid), time.monotonic() + 20
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < end
        time.sleep(0.02)
    # A tenth of its limit, which is none, is how often it would look.
    time.sleep(0.3)
    watchdog.stop()
    assert stopped.is_alive()
    assert reports == []
