"""The coordinator gives orders to successive groups of workers; workers are fake, the run directory is real."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hand_made
import pytest
from fake_workers import FIT, KILLED, FakeWorkers, MakeFake, kind
from hand_made import event_texts
from unusual_files import stale

from launcher import atomic_files, run_store
from launcher.checkpoint import store
from launcher.clusters.check_results import OK, CheckResult, MachineReport
from launcher.errors import UnreadableCheckpoint
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking import goodput
from launcher.tracking.jsonl import read_events
from launcher.worker.ray import attempts
from launcher.worker.ray import coordinator as module
from launcher.worker.ray.messages import BeatReply, Leave, Member, Verdict, Wait


@pytest.fixture
def fake(make_fake: MakeFake) -> FakeWorkers:
    """A group of two workers on one node, which trains."""
    fake = make_fake()
    fake.begin("a", "n1", "n1")
    return fake


def test_training_starts_when_all_workers_have_entered_and_all_nodes_are_checked(make_fake: MakeFake) -> None:
    fake = make_fake()
    coordinator = fake.coordinator
    coordinator.enter("a", 2, Member(0, 0, "n1", "1", "10.0.0.1", 4000))
    assert coordinator.orders("a", 0) is None
    coordinator.enter("a", 2, Member(1, 0, "n2", "2", "10.0.0.2", 4001))
    first, second = coordinator.orders("a", 0), coordinator.orders("a", 1)
    assert first is not None
    assert second is not None
    assert [kind(first), kind(second)] == ["checknode", "checknode"]
    assert (second.assignment.address, second.assignment.port, second.assignment.peers) == (
        "10.0.0.1",
        4000,
        ("10.0.0.1", "10.0.0.2"),
    )
    assert [first.others, second.others] == [(("n2", "10.0.0.2", 4001),), (("n1", "10.0.0.1", 4000),)]
    assert (fake.run.attempt(1) / "marker").read_text() == first.assignment.marker
    coordinator.report_check("a", 0, FIT)
    assert coordinator.orders("a", 0) is None, "the other node has not reported"
    coordinator.report_check("a", 1, FIT)
    orders = coordinator.orders("a", 1)
    assert orders is not None
    assert (kind(orders), orders.assignment.attempt, orders.assignment.plan_path) == ("train", 1, str(fake.run.plan))
    assert run_store.read_attempt(fake.run, 1).nodes == ("n1", "n2")


def test_one_worker_of_each_node_checks_it(make_fake: MakeFake) -> None:
    fake = make_fake(ranks_per_node=4)
    fake.enter("a", ["n1", "n1", "n2", "n2"])
    orders = [fake.coordinator.orders("a", rank) for rank in range(4)]
    assert [kind(o) for o in orders] == ["checknode", None, "checknode", None]


def test_an_unfit_node_is_named_and_nothing_is_loaded(make_fake: MakeFake) -> None:
    fake = make_fake()
    fake.enter("a", ["n1", "n2"])
    fake.check("a", ["n1", "n2"], {"n2": "the run directory is not visible"})
    verdict = fake.coordinator.beat("a", 0, None).verdict
    assert verdict.again is False
    assert "n2: the run directory is not visible" in verdict.reason
    assert "repair the node" in verdict.reason
    assert run_store.read_status(fake.run).state == "failed"
    assert fake.causes == ["bad_node"]


def test_a_package_version_that_differs_on_a_node_is_named(make_fake: MakeFake) -> None:
    fake = make_fake()
    fake.enter("a", ["n1", "n2"])
    assert fake.coordinator.orders("a", 0) is not None
    fake.coordinator.report_check("a", 0, replace(FIT, machine="n1"))
    other = CheckResult("packages", OK, "launcher 1, torch 1", must_match=True)
    fake.coordinator.report_check("a", 1, MachineReport("n2", (other,)))
    assert "n2: nodes differ in packages: torch 1; most nodes: torch 2" in fake.coordinator.state().over


def test_a_completed_run_ends_with_a_final_verdict(fake: FakeWorkers) -> None:
    assert fake.coordinator.beat("a", 0, None) == BeatReply()
    fake.save(5)
    fake.outcome("completed", 5)
    for rank in range(2):
        fake.end(rank)
    assert fake.coordinator.beat("a", 0, "done").verdict is None
    answer = fake.coordinator.beat("a", 1, "done")
    assert answer.verdict == Verdict(False, "completed")
    assert run_store.read_status(fake.run).state == "completed"


def test_after_a_killed_rank_the_others_get_term_and_the_next_group_resumes(fake: FakeWorkers) -> None:
    fake.save(5)
    fake.end(1, KILLED)
    assert fake.coordinator.beat("a", 1, "failed").verdict is None
    assert fake.coordinator.beat("a", 0, None).signal == "TERM"
    fake.end(0)
    verdict = fake.coordinator.beat("a", 0, "done").verdict
    assert verdict.again
    assert "rank 1: killed by SIGKILL" in verdict.reason
    assert fake.coordinator.state().idle_s > 0, "workers are waited for"
    orders = fake.begin("b", "n1", "n1")
    assert orders[0] is not None
    assert orders[0].assignment.attempt == 2
    assert run_store.read_attempt(fake.run, 2).resume_step == 5
    assert fake.coordinator.state().idle_s == 0
    assert fake.causes == ["infrastructure"]


def test_workers_without_records_count_until_the_budget_is_spent(make_fake: MakeFake) -> None:
    fake = make_fake(max_infrastructure_failures=2)
    for number, group in enumerate("abc", start=1):
        fake.begin(group, "n1", "n2")
        assert fake.number == number
    assert fake.begin("d", "n1", "n2") == [Leave(fake.coordinator.state().over)] * 2
    assert "cluster.max_infrastructure_failures=2 is used up" in fake.coordinator.state().over
    assert fake.causes == ["infrastructure"] * 3
    assert run_store.read_status(fake.run).state == "failed"


@pytest.mark.parametrize(
    "lost, words",
    [
        (["n2"], "Ray has lost n2"),
        (["n1", "n3"], "Ray has lost n1, n3"),
        ([], "no record from n1, n2, n3, n4, which Ray still has"),
        (None, "no record from n1, n2, n3, n4"),
    ],
)
def test_lost_nodes_are_named_where_no_worker_left_a_record(make_fake: MakeFake, lost: list[str] | None, words: str) -> None:
    """When one node is lost, Ray ends the workers on all others as well."""
    fake = make_fake(workers=4)
    nodes = ["n1", "n2", "n3", "n4"]
    fake.begin("a", *nodes)
    # None: Ray does not answer.
    fake.lost = None if lost is None else {"id-of-another-run", *(f"id-{node}" for node in lost)}  # type: ignore[assignment]
    orders = fake.begin("b", *nodes)
    assert [kind(o) for o in orders] == ["train"] * 4
    alerts = event_texts(fake.run)
    assert alerts == [f"the attempt ended (infrastructure): {words}; runs again"]
    assert read_events(fake.run.events)[-2]["attempt"] == 1


def test_the_end_of_an_attempt_alerts_once(make_fake: MakeFake) -> None:
    fake = make_fake(max_infrastructure_failures=1)
    fake.begin("a", "n1", "n2")
    for rank in range(2):
        fake.end(rank, KILLED if rank else None)
        fake.coordinator.beat("a", rank, "failed" if rank else "done")
    fake.begin("b", "n1", "n2")
    fake.begin("c", "n1", "n2")
    alerts = event_texts(fake.run)
    assert alerts == [
        "the attempt ended (infrastructure): rank 1 on n2: killed by SIGKILL; runs again",
        "the run ends: no record from n1, n2, which Ray still has; cluster.max_infrastructure_failures=1 is used up",
    ]


def test_the_wait_for_the_next_group_counts_as_queue_time(make_fake: MakeFake) -> None:
    fake, now, hour = make_fake(), time.time(), 3600
    fake.begin("a", "n1", "n1")
    times = {"submitted_at": now - 7 * hour, "begun_at": now - 7 * hour}
    run_store.write_attempt(fake.run, 1, replace(run_store.read_attempt(fake.run, 1), **times))
    for rank in range(2):
        fake.end(rank, KILLED)
        fake.coordinator.beat("a", rank, "failed")
    hand_made.end(fake.run, **hand_made.end_of(fake.run) | {"ended_at": now - 6 * hour})
    fake.begin("b", "n1", "n1")
    assert fake.number == 2
    found = goodput.read(fake.run, time.time())
    assert (found.queue_s, found.restart_s) == (pytest.approx(6 * hour, abs=60), 0)
    assert found.held_s == pytest.approx(hour, abs=60)


def test_a_reached_limit_ends_the_run_before_its_workers_load(fake: FakeWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.end(1, KILLED)
    monkeypatch.setattr(goodput, "reached_limit", lambda run, plan, now: "run.max_hours=2 is reached")
    assert fake.begin("b", "n1", "n1")[0] == Leave("run.max_hours=2 is reached")
    assert fake.number == 1
    assert run_store.read_status(fake.run).state == "preempted"
    assert read_events(fake.run.events)[-1]["text"] == "the run ends: run.max_hours=2 is reached"
    assert fake.causes == ["infrastructure"], "the attempt before was not ended by the limit: W&B has to be told"


def test_a_failure_of_the_training_that_repeats_ends_the_run(make_fake: MakeFake) -> None:
    fake = make_fake(max_failures=1)
    for group in "ab":
        fake.begin(group, "n1", "n1")
        fake.end(0, {**KILLED, "rank": 0, "kind": "KeyError", "exit_code": 1, "message": "KeyError: 'x'"})
        fake.end(1)
        fake.coordinator.beat(group, 0, "failed")
        verdict = fake.coordinator.beat(group, 1, "done").verdict
    assert verdict.again is False
    assert "cluster.max_failures=1 is used up" in verdict.reason


def test_cancel_asks_for_a_save_and_a_second_one_kills(fake: FakeWorkers) -> None:
    file = fake.run.cancel(1)
    atomic_files.write_json(file, {"save": True})
    assert fake.coordinator.beat("a", 0, None).signal == "USR1"
    atomic_files.write_json(file, {"save": False})
    assert fake.coordinator.beat("a", 0, None).signal == "KILL"
    for rank in range(2):
        fake.end(rank, stopped=True, killed=True)
        answer = fake.coordinator.beat("a", rank, "done")
    assert answer.verdict.again is False
    assert run_store.read_status(fake.run).state == "cancelled"


def test_a_save_beyond_the_grace_period_is_killed(make_fake: MakeFake) -> None:
    fake = make_fake(stop_grace_seconds=0.01)
    fake.begin("a", "n1", "n1")
    atomic_files.write_json(fake.run.cancel(1), {"save": True})
    fake.coordinator.beat("a", 0, None)
    time.sleep(0.02)
    assert fake.coordinator.beat("a", 0, None).signal == "KILL"


def test_workers_leave_a_run_that_another_command_has_restarted(make_fake: MakeFake) -> None:
    fake = make_fake()
    run_store.create_attempt(fake.run, Attempt(resume_step=None))
    before = run_store.read_status(fake.run)
    (orders, _) = fake.begin("a", "n1", "n1")
    assert orders is not None
    assert kind(orders) == "leave"
    assert run_store.read_status(fake.run) == before


def test_workers_of_a_replaced_group_are_ordered_to_exit(fake: FakeWorkers) -> None:
    fake.begin("b", "n1", "n1")
    answer = fake.coordinator.beat("a", 0, None)
    assert (answer.signal, answer.verdict.again) == ("KILL", False)
    assert fake.coordinator.orders("a", 0) == Leave("other workers have taken over")


def test_an_attempt_that_cannot_be_written_ends_the_run_after_a_deadline(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = make_fake()

    def full(run: RunDir, number: int, attempt: Attempt) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store, "write_attempt", full)
    assert fake.begin("a", "n1", "n1") == [None, None], "there may be room in a moment"
    monkeypatch.setattr(module, "_OPEN_DEADLINE_S", -1.0)
    orders = fake.coordinator.orders("a", 0)
    assert orders is not None
    assert kind(orders) == "leave"
    assert "No space left on device" in orders.reason
    assert run_store.read_status(fake.run).state == "failed"


def test_a_node_whose_check_never_ends_is_named(make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_DEADLINE_S", 0.05)
    fake = make_fake()
    fake.enter("a", ["n1", "n2"])
    assert fake.coordinator.orders("a", 0) is not None
    fake.coordinator.report_check("a", 0, FIT)
    assert fake.coordinator.orders("a", 0) is None
    time.sleep(0.06)
    assert fake.coordinator.orders("a", 0) == Wait()
    reason = fake.coordinator.beat("a", 0, None).verdict.reason
    assert "n2: the node did not report within" in reason
    assert "n1:" not in reason


def test_a_cancel_request_ends_the_node_checks(make_fake: MakeFake) -> None:
    fake = make_fake()
    fake.enter("a", ["n1", "n2"])
    assert fake.coordinator.orders("a", 0) is not None
    atomic_files.write_json(fake.run.cancel(1), {"save": True})
    assert fake.coordinator.orders("a", 0) == Wait()
    assert fake.coordinator.beat("a", 0, None).verdict.again is False
    assert run_store.read_status(fake.run).state == "cancelled"


def test_silent_workers_make_the_run_pending_until_they_return(fake: FakeWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_S", 0.05)
    time.sleep(0.06)
    assert fake.coordinator.state().idle_s > 0
    assert run_store.read_status(fake.run).state == "pending"
    assert "are gone; the run waits for others" in fake.run.events.read_text()
    fake.coordinator.beat("a", 0, None)
    assert fake.coordinator.state().idle_s == 0
    time.sleep(0.06)
    fake.lost = {"id-n1"}
    assert fake.coordinator.state().idle_s > 0
    assert run_store.read_status(fake.run).message == "its workers are gone; Ray has lost n1; it waits for others"
    assert "are gone; Ray has lost n1; the run waits for others" in fake.run.events.read_text()


def test_workers_that_repeatedly_cannot_start_end_the_run_with_their_error(
    make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    coordinator = make_fake().coordinator

    def fail_again(seconds: int, every_s: int) -> None:
        for _ in range(0, seconds, every_s):
            coordinator.report_early_failure("n2: no interface ib0")
            clock[0] += every_s

    for _ in range(2 * module._MAX_EARLY_FAILURES):
        coordinator.report_early_failure("n2: no interface ib0")
    assert coordinator.state().over is None, "the workers of one group fail together"
    fail_again(120, every_s=10)
    assert (coordinator.state().over, coordinator.state().early_failure) == (None, "n2: no interface ib0")
    fail_again(480, every_s=10)
    assert coordinator.state().over == "workers cannot start: n2: no interface ib0"
    status = run_store.read_status(coordinator._run)
    assert (status.state, status.message) == ("failed", "workers cannot start: n2: no interface ib0")


def test_the_error_of_workers_that_could_not_start_is_cleared_when_others_begin(make_fake: MakeFake) -> None:
    fake = make_fake()
    fake.coordinator.report_early_failure("n2: no interface ib0")
    fake.begin("a", "n1", "n1")
    assert fake.coordinator.state().early_failure == ""


def test_a_superseded_attempt_on_ray_writes_no_exit_record(fake: FakeWorkers) -> None:
    """The same holds if a network file system does not show the other attempt yet."""
    before = run_store.read_status(fake.run)
    with stale(fake.run.attempts):
        run_store.create_attempt(fake.run, Attempt(resume_step=None))
        for rank in range(2):
            answer = fake.coordinator.beat("a", rank, "done")
        attempts.record_end(fake.run, 1, "failed", "as it says")
    assert answer.verdict.again is False
    assert run_store.read_status(fake.run) == before
    assert fake.causes == []


def test_unreadable_storage_only_delays_an_attempt(fake: FakeWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def down(root: Path) -> int | None:
            raise UnreadableCheckpoint("a checkpoint file cannot be read right now")

        patch.setattr(store, "newest_step", down)
        fake.enter("b", ["n1", "n1"])
        assert fake.coordinator.orders("b", 0) is None
        assert fake.coordinator.state().over is None
    orders = fake.coordinator.orders("b", 0)
    assert orders is not None
    assert (kind(orders), orders.assignment.attempt) == ("checknode", 2)


def test_ranks_do_not_meet_at_a_public_address(make_fake: MakeFake) -> None:
    fake = make_fake(workers=1)
    fake.coordinator.enter("a", 1, Member(0, 0, "n1", "1", "8.8.8.8", 4000))
    orders = fake.coordinator.orders("a", 0)
    assert orders is not None
    assert kind(orders) == "leave"
    assert "a public address: n1 at 8.8.8.8" in orders.reason


def test_a_cancel_request_between_two_groups_ends_the_run(fake: FakeWorkers) -> None:
    fake.end(1, KILLED)
    fake.end(0)
    fake.coordinator.beat("a", 1, "failed")
    assert fake.coordinator.beat("a", 0, "done").verdict.again
    atomic_files.write_json(fake.run.cancel(1), {"save": True})
    (orders, _) = fake.begin("b", "n1", "n1")
    assert orders is not None
    assert kind(orders) == "leave"
    assert run_store.read_status(fake.run).state == "cancelled"
    assert fake.number == 1


def test_a_check_report_after_the_verdict_changes_nothing(make_fake: MakeFake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_DEADLINE_S", -1.0)
    fake = make_fake()
    fake.enter("a", ["n1", "n2"])
    assert fake.coordinator.orders("a", 0) == Wait()
    before = fake.coordinator.beat("a", 0, None).verdict
    for rank in range(2):
        fake.coordinator.report_check("a", rank, FIT)
    assert fake.coordinator.beat("a", 0, None).verdict == before
