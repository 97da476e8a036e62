"""Which worker of a group hangs, across all nodes; and reports to Ray Train that block no worker."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fake_workers import FakeWorkers, MakeFake, kind, sign

from launcher import run_store
from launcher.worker.ranks.watchdog import Heartbeat, HeartbeatTable, StallLimits
from launcher.worker.ray import driver, rank_supervisor, worker_group
from launcher.worker.ray.messages import BeatReply, Leave, Member, RankSign, ResizeProgress
from launcher.worker.ray.rank_supervisor import Observer
from launcher.worker.ray.worker_group import GroupLiveness


@pytest.fixture
def fake(make_fake: MakeFake) -> FakeWorkers:
    """A group of two workers on two nodes, which trains."""
    fake = make_fake(workers=2, stall_seconds=60)
    fake.begin("a", "n1", "n2")
    return fake


@pytest.fixture(autouse=True)
def stacks_need_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "DUMP_S", 0.0)


def beats(fake: FakeWorkers, *signs: RankSign | None) -> list[BeatReply]:
    """All workers send two heartbeats: what the first one finds is answered with the second."""
    for _ in range(2):
        # Silence from before the group trained does not count, as for suspended ranks.
        fake.coordinator._group.liveness._since = 0.0  # type: ignore[union-attr]
        answers = [fake.coordinator.beat("a", rank, None, sign) for rank, sign in enumerate(signs)]
    return answers


def test_a_rank_behind_those_of_all_nodes_is_killed_alone_and_named_with_its_node(fake: FakeWorkers) -> None:
    late = beats(fake, sign(0, 61), sign(1, 61, count=499))
    assert [answer.hang for answer in late] == [None, None]
    late = beats(fake, sign(0, 74), sign(1, 76, count=499))
    assert late[0].hang is None
    words = "rank 1 on n2 (pid 4001) is behind the other ranks of the run: no progress for 76 s in step 17; killed it"
    assert late[1].hang == words
    assert words in fake.run.events.read_text()


@pytest.mark.parametrize("silent_s", [(61, 61), (61, 5)])
def test_all_ranks_dump_their_stacks_once_before_any_is_killed(silent_s: tuple[float, float], fake: FakeWorkers) -> None:
    """A rank that is not late yet also dumps its stacks: it may wait for the stalled one."""
    asked = {0: 0, 1: 0}
    fake.coordinator._group.liveness._since = 0.0  # type: ignore[union-attr]
    for _ in range(4):
        for rank in asked:
            answer = fake.coordinator.beat("a", rank, None, sign(rank, silent_s[rank]))
            asked[rank] += answer.dump_stacks
            assert answer.hang is None
    assert asked == {0: 1, 1: 1}


def test_a_rank_that_cannot_run_is_killed_whatever_the_others_have_counted(fake: FakeWorkers) -> None:
    answers = beats(fake, sign(0, 61, count=499), sign(1, 61, state=psutil.STATUS_STOPPED))
    assert answers[0].hang is None
    assert "rank 1 on n2 (pid 4001) is stopped" in answers[1].hang


LOADING = {"trained": False, "phase": "joined"}


def test_ranks_that_load_are_killed_when_none_of_the_run_reads(fake: FakeWorkers) -> None:
    # Rank 1 waits for rank 0, which reads; nothing is known about a rank that has not started.
    for first in (None, sign(0, 5, **LOADING), sign(0, 299, **LOADING)):
        assert [answer.hang for answer in beats(fake, first, sign(1, 600, **LOADING))] == [None, None]
    answers = beats(fake, sign(0, 301, **LOADING), sign(1, 600, **LOADING))
    words = "(pid 4001) reads nothing, and neither does any other rank: no progress for 600 s while the model is loaded"
    assert f"rank 1 on n2 {words}; killed it" in answers[1].hang
    assert "rank 0 on n1" in answers[0].hang


def test_a_rank_that_is_stopped_while_it_loads_is_killed_alone(fake: FakeWorkers) -> None:
    answers = beats(fake, sign(0, 61, **LOADING), sign(1, 61, state=psutil.STATUS_STOPPED, **LOADING))
    assert answers[0].hang is None
    assert answers[1].hang.endswith("is stopped by a signal (SIGSTOP): no progress for 61 s while the model is loaded; killed it")


def alone(fake: FakeWorkers, clock: list[float], seconds: int, goes_on: bool = False, **told: Any) -> str | None:
    """For this long only rank 0's worker sends its sign, with `told` in it; returns the signal that it gets in the end."""
    began = clock[0]
    while clock[0] < began + seconds:
        clock[0] += 5
        answer = fake.coordinator.beat("a", 0, None, sign(0, 0.0 if goes_on else clock[0] - began, **told))
    found: str | None = answer.signal
    return found


def test_a_silent_worker_is_named_and_the_run_continues_without_it(make_fake: MakeFake, clock: list[float]) -> None:
    fake = make_fake(workers=2, min_workers=1, stall_seconds=200)
    fake.begin("a", "n1", "n2")
    beats(fake, sign(0, 0), sign(1, 0))
    assert alone(fake, clock, 195) is None
    said = fake.run.events.read_text()
    assert "no heartbeat for 65 s from the worker of rank 1 on n2: it hangs or is cut off from the network" in said
    assert alone(fake, clock, 205) == "TERM"
    assert "the other ranks wait for the worker of rank 1 on n2: the attempt ends" in fake.run.events.read_text()
    fake.end(0)
    verdict = fake.coordinator.beat("a", 0, "done").verdict
    assert verdict.again, "the lost one is not waited for"
    assert "no record from n2, which Ray still has" in verdict.reason
    assert fake.causes == ["infrastructure"]


@pytest.mark.parametrize(
    "settings, told",
    [
        ({}, {"trained": False, "phase": "joined", "goes_on": True}),
        ({}, {"trained": False, "phase": "evaluating"}),
        ({}, {"phase": "saving"}),
        ({}, {"phase": "finishing"}),
        ({"stall_seconds": 0}, {}),
        ({}, {"goes_on": True}),
    ],
)
def test_a_silent_worker_does_not_end_an_attempt_that_loads_saves_or_progresses(
    make_fake: MakeFake, clock: list[float], settings: dict[str, Any], told: dict[str, Any]
) -> None:
    fake = make_fake(**{"workers": 2, "stall_seconds": 200, **settings})
    fake.begin("a", "n1", "n2")
    beats(fake, sign(0, 0), sign(1, 0))
    assert alone(fake, clock, 1000, **told) is None
    assert "from the worker of rank 1 on n2" in fake.run.events.read_text()


def test_the_run_continues_without_a_rank_that_cannot_be_killed(clock: list[float], fake: FakeWorkers) -> None:
    """The rank hangs in the kernel, for example on lost storage, and its worker keeps reporting that."""
    late = beats(fake, sign(0, 61), sign(1, 61, state=psutil.STATUS_DISK_SLEEP))
    assert "hangs in the kernel" in late[1].hang
    for _ in range(2):
        clock[0] += 8
        assert late[0].signal is None
        late = beats(fake, sign(0, 70), sign(1, 70, state=psutil.STATUS_DISK_SLEEP))
    assert late[0].signal == "TERM"
    assert "rank 1 on n2 was killed and does not end" in fake.run.events.read_text()
    fake.end(0)
    assert fake.coordinator.beat("a", 0, "done").verdict is None, "its record may come yet"
    clock[0] += 31
    verdict = fake.coordinator.beat("a", 0, "done").verdict
    assert verdict.again
    assert "no record from n2" in verdict.reason


@pytest.mark.parametrize(
    "phase, progress, signal", [("finishing", "writing", None), ("saving", "writing", "USR2"), ("training", "requested", "USR2")]
)
def test_a_resize_does_not_interrupt_writes(
    make_fake: MakeFake, clock: list[float], phase: str, progress: str, signal: str | None
) -> None:
    fake = make_fake(workers=2, min_workers=1)
    fake.begin("a", "n1")
    run_store.update_status(fake.run, message="")
    fake.coordinator.beat("a", 0, None, sign(0, 0, phase=phase))
    assert fake.coordinator.prepare_resize() == progress
    assert fake.coordinator.beat("a", 0, None).signal == signal
    clock[0] += 61
    assert fake.coordinator.prepare_resize() is ResizeProgress.REQUESTED, "of a worker that is silent nothing is known"


def test_ray_trains_controller_waits_while_the_run_writes_and_for_the_grace_period(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2._internal.execution.controller.state import ResizingState
    from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

    answers = [ResizeProgress.WRITING] * 100 + [None] * 100
    began = clock[0]
    monkeypatch.setattr(time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 1))
    monkeypatch.setattr("ray.get", lambda progress, timeout: progress)
    coordinator = SimpleNamespace(prepare_resize=SimpleNamespace(remote=lambda: answers.pop(0)))
    state = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1}))
    driver.save_before_resize(coordinator, 10).after_controller_state_update(None, state)
    assert clock[0] - began == 99 + 10, "from the last word that it writes"


def test_no_rank_is_judged_while_a_worker_is_silent(fake: FakeWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent worker's last report is outdated, and its rank may be the one that all others wait for."""
    monkeypatch.setattr(worker_group, "_FRESH_S", -1.0)
    answers = beats(fake, sign(0, 74), sign(1, 76, count=499))
    assert [answer.hang for answer in answers] == [None, None]


def test_a_blocked_coordinator_counts_no_silence_of_workers(clock: list[float]) -> None:
    found = GroupLiveness(StallLimits(600, 1800))
    found.hear(0)
    found.hear(1)
    clock[0] += 100
    found.hear(0)
    assert found.find_silent({0, 1}) == {}
    for _ in range(7):
        clock[0] += 10
        found.hear(0)
    assert found.find_silent({0, 1}) == {1: 70}


def test_a_worker_counts_as_silent_after_the_stall_limit_where_that_is_shorter(clock: list[float]) -> None:
    found = GroupLiveness(StallLimits(20, 1800))
    found.hear(0)
    found.hear(1)
    seen = []
    for _ in range(3):
        clock[0] += 9
        found.hear(0)
        seen.append(found.find_silent({0, 1}))
    assert seen == [{}, {}, {1: 27}]


@pytest.fixture
def table() -> Iterator[HeartbeatTable]:
    found = HeartbeatTable(2)
    yield found
    found.close()


def test_a_worker_reports_the_heartbeat_of_its_rank_with_its_age(table: HeartbeatTable, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Observer(table, 1, stall_s=600)
    assert observer.read_sign(os.getpid()) is None
    Heartbeat(table.path, 1, 7).beat("training", 3)
    told = observer.read_sign(os.getpid())
    assert told is not None
    assert (told.beat.rank, told.beat.step, told.beat.trained) == (7, 3, True)
    assert 0 <= told.silent_s < 5
    assert observer.read_sign(os.getpid() + 1) is None, "the process before it"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 299)
    assert observer.read_sign(os.getpid()).silent_s > 290  # type: ignore[index]
    monkeypatch.setattr(time, "monotonic", lambda: now + 900)
    assert observer.read_sign(os.getpid()).silent_s == 0, "the worker was stopped, perhaps with its rank"  # type: ignore[index]


def test_a_worker_reports_what_a_rank_that_loads_reads_as_progress(
    table: HeartbeatTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, (now, weights) = Observer(table, 0, stall_s=600), (time.monotonic(), tmp_path / "weights")
    weights.write_bytes(bytes(4 << 20))
    Heartbeat(table.path, 0, 0).beat("joined", 0)
    for second in range(0, 900, 100):
        monkeypatch.setattr(time, "monotonic", lambda second=second: now + 60 + second)
        told = observer.read_sign(os.getpid())
        assert told is not None
        assert told.silent_s == pytest.approx(0 if second <= 500 else second - 500)
        if second < 500:
            weights.read_bytes()


STOPS_ITSELF = """
import os, signal, sys
from pathlib import Path
from launcher.worker.ranks.watchdog import Heartbeat
Heartbeat(Path(sys.argv[1]), 0, 0).beat("training", 1)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_worker_reports_a_stopped_rank(table: HeartbeatTable) -> None:
    observer, deadline = Observer(table, 0, 600), time.monotonic() + 20
    with subprocess.Popen([sys.executable, "-c", STOPS_ITSELF, str(table.path)]) as process:
        try:
            while getattr(observer.read_sign(process.pid), "process_state", None) != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()


def test_a_late_worker_of_a_replaced_group_is_refused(make_fake: MakeFake) -> None:
    fake = make_fake(workers=2)
    late = Member(1, 0, "n9", "id-n9", "10.0.0.9", 1)
    fake.coordinator.enter("old", 2, replace(late, rank=0))
    fake.begin("a", "n1", "n2")
    fake.coordinator.enter("old", 2, late)
    assert fake.coordinator.orders("old", 1) == Leave("other workers have taken over")
    # A worker of a group that is new to the coordinator waits for the rest of its group, and disturbs no other.
    fake.coordinator.enter("older", 2, late)
    assert fake.coordinator.orders("older", 1) is None
    orders = fake.coordinator.orders("a", 1)
    assert orders is not None
    assert kind(orders) == "train"
    fake.begin("b", "n1", "n2")
    fake.coordinator.enter("a", 2, late)
    assert fake.coordinator.orders("a", 1) == Leave("other workers have taken over")
    assert fake.coordinator.orders("older", 1) == Leave("other workers have taken over")


def test_an_unreachable_node_is_named_and_so_is_a_node_that_reaches_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_supervisor, "_MIN_REACH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as closed:
        open_port, closed_port = listening.getsockname()[1], closed.getsockname()[1]
        closed.close()
        there, away = ("n2", "127.0.0.1", open_port), ("n3", "127.0.0.1", closed_port)
        assert rank_supervisor.find_unreachable("n1", [there], 0.1) == []
        assert rank_supervisor.find_unreachable("n1", [], 0.1) == []
        (one,) = rank_supervisor.find_unreachable("n1", [there, away], 0.1)
        assert (one.machine, one.seen) == ("n3", f"cannot be reached from n1 at 127.0.0.1:{closed_port}")
        (own,) = rank_supervisor.find_unreachable("n1", [away], 0.1)
        assert (own.machine, own.seen) == ("", f"cannot reach n3 at 127.0.0.1:{closed_port}")
