"""The watchdog finds and kills processes that really hang; verdicts from given heartbeats.

What counts as progress of ranks that load the model, here and on other nodes.
"""

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
from launcher.worker.ranks import watchdog
from launcher.worker.ranks import watchdog as watchdog_module
from launcher.worker.ranks.rank_env import RankEnv
from launcher.worker.ranks.watchdog import (
    HEARTBEATS_VARIABLE,
    PHASES,
    Beat,
    Heartbeat,
    HeartbeatTable,
    LoadProgress,
    SharedProgress,
    StallLimits,
    StallVerdict,
    Watchdog,
    count_bytes,
    judge_ranks,
)

STALL_S = 1.0
# Fork, because the watchdog watches only children; they also need no imports.
FORK = multiprocessing.get_context("fork")
Start = Callable[..., list[multiprocessing.process.BaseProcess]]
NOW = 100_000.0
LIMITS = StallLimits(stall_s=60, rare_s=1800)
ALIVE = {0: "running", 1: "sleeping"}


@pytest.fixture
def table() -> Iterator[HeartbeatTable]:
    table = HeartbeatTable(2)
    yield table
    table.close()


@pytest.mark.rest
def test_a_heartbeat_is_read_as_it_was_written(table: HeartbeatTable) -> None:
    assert table.read() == {}
    env = RankEnv(rank=5, local_rank=1, world_size=8, restart=0)
    heart = Heartbeat.from_environ({HEARTBEATS_VARIABLE: str(table.path)}, env)
    assert table.read()[1].phase == "starting"
    before = time.monotonic()
    for phase in PHASES:
        heart.beat(phase, 7)
        assert table.read()[1].phase == phase
    read = table.read()
    assert set(read) == {1}
    assert before <= read[1].at <= time.monotonic()
    assert dataclasses.replace(read[1], at=0) == Beat(8, os.getpid(), 5, "finishing", 7, 0, True)


@pytest.mark.rest
def test_heartbeats_need_no_table_and_a_missing_table_is_refused() -> None:
    env = RankEnv(rank=0, local_rank=0, world_size=1, restart=0)
    Heartbeat.from_environ({}, env).beat("training", 1)
    with pytest.raises(RunError, match="cannot send heartbeats to its node's agent"):
        Heartbeat.from_environ({HEARTBEATS_VARIABLE: "/proc/self/fd/999"}, env)


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


@pytest.mark.rest
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


@pytest.mark.rest
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


@pytest.mark.rest
def test_a_hang_is_ended_although_nothing_can_be_learned_of_it(start: Start, table: HeartbeatTable) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("can't start new thread")

    reports: list[str] = []
    watchdog = Watchdog(table, STALL_S, 1800, reports.append, on_silence=fail, explain=fail).start()
    (stopped,) = start("stopped")
    assert wait_for_report(reports).endswith("killed it")
    assert exit_code(stopped) == -signal.SIGKILL
    watchdog.stop()


@pytest.mark.rest
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


@pytest.mark.rest
def test_a_rank_behind_is_killed_with_its_stacks_in_its_log(start: Start, reports: list[str], tmp_path: Path) -> None:
    behind, waiting = start("behind", "waits")
    assert "rank 10" in wait_for_report(reports)
    assert "behind" in reports[0]
    assert exit_code(behind) == -signal.SIGKILL
    assert waiting.is_alive()
    assert "most recent call first" in (tmp_path / "0.log").read_text()


@pytest.mark.rest
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


@pytest.mark.rest
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


def beat(ago: float, count: int = 500, phase: str = "training", trained: bool = True) -> Beat:
    return Beat(count, 4242, 0, phase, 16, NOW - ago, trained)


def judge(
    beats: dict[int, Beat], states: dict[int, str] = ALIVE, limits: StallLimits = LIMITS, since: float = 0.0
) -> StallVerdict:
    return judge_ranks(beats, states, NOW, limits, since)


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


@pytest.mark.parametrize("phase, limit", [("training", 60), ("evaluating", 60), ("saving", 1800)])
def test_the_limit_is_longer_while_saving(phase: str, limit: float) -> None:
    writing = {0: psutil.STATUS_DISK_SLEEP}
    assert judge({0: beat(limit - 1, phase=phase)}, writing) == StallVerdict()
    assert list(judge({0: beat(limit + 1, phase=phase)}, writing).kill) == [0]


def test_a_rank_that_is_stopped_while_it_saves_is_killed_as_soon_as_in_training() -> None:
    beats = {0: beat(61, phase="saving"), 1: beat(61, phase="saving")}
    assert list(judge(beats, {0: psutil.STATUS_DISK_SLEEP, 1: psutil.STATUS_STOPPED}).kill) == [1]


def test_an_export_has_no_limit() -> None:
    assert judge({0: beat(10**6, phase="finishing")}, {0: psutil.STATUS_STOPPED}) == StallVerdict()


def test_ranks_that_have_not_trained_or_have_ended_are_not_judged() -> None:
    assert judge({0: beat(900, phase="loaded", trained=False), 1: beat(900, phase="evaluating", trained=False)}) == StallVerdict()
    assert judge({0: beat(900), 1: beat(1)}, {1: "running"}) == StallVerdict()
    # The count of a dead rank does not make the live one late either.
    assert not judge({0: beat(900, count=900), 1: beat(80)}, {1: "running"}).kill


def test_silence_from_before_the_watchdog_resumed_does_not_count() -> None:
    assert judge({0: beat(900), 1: beat(900)}, since=NOW - 30) == StallVerdict()
    assert set(judge({0: beat(900), 1: beat(900)}, since=NOW - 95).kill) == {0, 1}


def loading(ago: float, phase: str = "joined", trained: bool = False) -> Beat:
    return beat(ago, phase=phase, trained=trained)


@pytest.mark.parametrize("phase", ["starting", "joined", "loaded"])
def test_a_rank_that_cannot_run_is_killed_while_it_loads(phase: str) -> None:
    beats, states = {0: loading(61, phase), 1: loading(61, phase)}, {0: "sleeping", 1: psutil.STATUS_STOPPED}
    verdict = judge_ranks(beats, states, NOW, LIMITS, since=0.0, others_at=math.inf)
    assert dict(verdict.kill) == {1: "is stopped by a signal (SIGSTOP)"}
    beats[1] = loading(59, phase)
    assert judge_ranks(beats, states, NOW, LIMITS, since=0.0, others_at=math.inf) == StallVerdict()


def test_ranks_that_read_nothing_are_killed_only_where_no_rank_of_the_run_reads() -> None:
    beats = {0: loading(301), 1: loading(400)}
    for others_at in (-math.inf, NOW - 301):
        assert set(judge_ranks(beats, ALIVE, NOW, LIMITS, 0.0, others_at).kill) == {0, 1}
    for others_at in (NOW - 299, math.inf):
        assert not judge_ranks(beats, ALIVE, NOW, LIMITS, 0.0, others_at).kill
    for other in (loading(1), loading(1, trained=True), loading(900, "evaluating")):
        assert not judge_ranks({**beats, 1: other}, ALIVE, NOW, LIMITS, 0.0, -math.inf).kill
    assert not judge_ranks(beats, ALIVE, NOW, LIMITS, since=NOW - 30, others_at=-math.inf).kill


def loading_rank(pid: int) -> Beat:
    """A rank that joined long ago and has not started to train."""
    return Beat(500, pid, 0, "joined", 0, NOW - 500, False)


def test_reading_and_touching_memory_are_progress(tmp_path: Path) -> None:
    progress, here = LoadProgress(), loading_rank(os.getpid())
    assert progress.update({0: here}, NOW)[0].at == NOW
    assert progress.update({0: here}, NOW + 1)[0].at == NOW, "nothing was read since"
    (tmp_path / "weights").write_bytes(bytes(2 << 20))
    (tmp_path / "weights").read_bytes()
    assert progress.update({0: here}, NOW + 2)[0].at == NOW + 2
    trained = dataclasses.replace(here, trained=True)
    assert progress.update({0: trained}, NOW + 3) == {0: trained}
    assert count_bytes(2**22 + 1) == 0


def test_a_head_node_that_is_gone_says_nothing_of_the_other_ranks_until_it_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    monkeypatch.setattr(watchdog, "_RETRY_S", 0.1)
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = store.port
    shared, until = SharedProgress(TCPStore("127.0.0.1", port, None, False), 0.01), time.monotonic() + 60
    began = shared.changed_at
    while shared.changed_at == began:
        shared.report()
        assert time.monotonic() < until
    del store
    while shared.changed_at < math.inf:
        assert time.monotonic() < until
        time.sleep(0.01)
    again = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    while shared.changed_at == math.inf:
        assert time.monotonic() < until, "the nodes tell each other of their progress again"
        time.sleep(0.01)
    assert again.check(["load_progress"])
    shared.stop()
