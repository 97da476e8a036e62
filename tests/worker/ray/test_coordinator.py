"""What the workers of one group after another are told, with workers that are played and a run directory that is real."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from played_workers import FIT, KILLED, Played, kind

from launcher import atomic_files, json_records, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST
from launcher.errors import UnreadableCheckpoint
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking import goodput
from launcher.tracking.jsonl import read_events
from launcher.worker.ray import coordinator as module
from launcher.worker.ray import node_checks
from launcher.worker.ray.messages import BeatReply, Leave, Member, Verdict, Wait


def test_nothing_begins_before_all_have_come_and_all_nodes_are_checked(play: Callable[..., Played]) -> None:
    played = play()
    coordinator = played.coordinator
    coordinator.enter("a", 2, Member(0, 0, "n1", "1", "10.0.0.1", 4000))
    assert coordinator.orders("a", 0) is None
    coordinator.enter("a", 2, Member(1, 0, "n2", "2", "10.0.0.2", 4001))
    first, second = coordinator.orders("a", 0), coordinator.orders("a", 1)
    assert first is not None
    assert second is not None
    assert [kind(first), kind(second)] == ["check", "check"]
    assert (second.assignment.address, second.assignment.port, second.assignment.peers) == (
        "10.0.0.1",
        4000,
        ("10.0.0.1", "10.0.0.2"),
    )
    assert [first.others, second.others] == [(("n2", "10.0.0.2", 4001),), (("n1", "10.0.0.1", 4000),)]
    assert (played.run.attempt(1) / "marker").read_text() == first.assignment.marker
    coordinator.report_check("a", 0, FIT)
    assert coordinator.orders("a", 0) is None, "the other node has not reported"
    coordinator.report_check("a", 1, FIT)
    orders = coordinator.orders("a", 1)
    assert orders is not None
    assert (kind(orders), orders.assignment.attempt, orders.assignment.plan_path) == ("train", 1, str(played.run.plan))
    assert run_store.read_attempt(played.run, 1).nodes == ("n1", "n2")


def test_one_worker_of_each_node_checks_it(play: Callable[..., Played]) -> None:
    played = play(ranks_per_node=4)
    played.enter("a", ["n1", "n1", "n2", "n2"])
    orders = [played.coordinator.orders("a", rank) for rank in range(4)]
    assert [kind(o) for o in orders] == ["check", None, "check", None]


def test_an_unfit_node_is_named_and_nothing_is_loaded(play: Callable[..., Played]) -> None:
    played = play()
    played.enter("a", ["n1", "n2"])
    played.check("a", ["n1", "n2"], {"n2": "the run directory is not visible"})
    verdict = played.coordinator.beat("a", 0, None).verdict
    assert verdict.again is False
    assert "n2: the run directory is not visible" in verdict.reason
    assert "repair the node" in verdict.reason
    assert run_store.read_status(played.run).state == "failed"
    assert played.causes == ["bad_node"]


def test_another_version_on_a_node_is_named(play: Callable[..., Played]) -> None:
    played = play()
    played.enter("a", ["n1", "n2"])
    assert played.coordinator.orders("a", 0) is not None
    played.coordinator.report_check("a", 0, replace(FIT, host="n1"))
    played.coordinator.report_check("a", 1, replace(FIT, host="n2", packages={"torch": "1"}))
    assert "n2: the version of torch differs from the head node's n2: 1; n1: 2" in played.coordinator.state().over


def test_a_run_that_is_done_is_done(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    assert played.coordinator.beat("a", 0, None) == BeatReply()
    played.save(5)
    played.outcome("completed", 5)
    for rank in range(2):
        played.end(rank)
    assert played.coordinator.beat("a", 0, "done").verdict is None
    answer = played.coordinator.beat("a", 1, "done")
    assert answer.verdict == Verdict(False, "completed")
    assert [saved.step for saved in answer.saved] == [5], "all workers are told of it, and tell Ray"
    assert run_store.read_status(played.run).state == "completed"


def test_after_a_killed_rank_the_others_are_sent_away_and_the_next_group_goes_on(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    played.save(5)
    played.end(1, KILLED)
    assert played.coordinator.beat("a", 1, "failed").verdict is None
    assert played.coordinator.beat("a", 0, None).signal == "TERM"
    played.end(0)
    verdict = played.coordinator.beat("a", 0, "done").verdict
    assert verdict.again
    assert "rank 1: killed by SIGKILL" in verdict.reason
    assert played.coordinator.state().idle_s > 0, "workers are waited for"
    orders = played.begin("b", "n1", "n1")
    assert orders[0] is not None
    assert orders[0].assignment.attempt == 2
    assert run_store.read_attempt(played.run, 2).resume_step == 5
    assert played.coordinator.state().idle_s == 0
    assert played.causes == ["infrastructure"]


def test_workers_that_leave_no_word_are_counted_until_the_budget_is_spent(play: Callable[..., Played]) -> None:
    played = play(max_infrastructure_failures=2)
    for number, group in enumerate("abc", start=1):
        played.begin(group, "n1", "n2")
        assert played.number == number
    assert played.begin("d", "n1", "n2") == [Leave(played.coordinator.state().over)] * 2
    assert "cluster.max_infrastructure_failures=2 is used up" in played.coordinator.state().over
    assert played.causes == ["infrastructure"] * 3
    assert run_store.read_status(played.run).state == "failed"


@pytest.mark.parametrize(
    "lost, words",
    [
        (["n2"], "Ray has lost n2"),
        (["n1", "n3"], "Ray has lost n1, n3"),
        ([], "no record from n1, n2, n3, n4, which Ray still has"),
        (None, "no record from n1, n2, n3, n4"),
    ],
)
def test_of_workers_that_all_left_no_word_the_nodes_that_are_lost_are_named(
    play: Callable[..., Played], lost: list[str] | None, words: str
) -> None:
    """Where one is lost, Ray ends the workers on all others too."""
    played = play(workers=4)
    nodes = ["n1", "n2", "n3", "n4"]
    played.begin("a", *nodes)
    # None is what a Ray that does not answer comes to.
    played.lost = None if lost is None else {"id-of-another-run", *(f"id-{node}" for node in lost)}  # type: ignore[assignment]
    orders = played.begin("b", *nodes)
    assert [kind(o) for o in orders] == ["train"] * 4
    alerts = [event["text"] for event in read_events(played.run.events) if event["kind"] == "alert"]
    assert alerts == [f"the attempt ended (infrastructure): {words}; runs again"]
    assert read_events(played.run.events)[-2]["attempt"] == 1


def test_how_an_attempt_ended_is_told_once(play: Callable[..., Played]) -> None:
    played = play(max_infrastructure_failures=1)
    played.begin("a", "n1", "n2")
    for rank in range(2):
        played.end(rank, KILLED if rank else None)
        played.coordinator.beat("a", rank, "failed" if rank else "done")
    played.begin("b", "n1", "n2")
    played.begin("c", "n1", "n2")
    alerts = [event["text"] for event in read_events(played.run.events) if event["kind"] == "alert"]
    assert alerts == [
        "the attempt ended (infrastructure): rank 1: killed by SIGKILL; runs again",
        "the run ends: no record from n1, n2, which Ray still has; cluster.max_infrastructure_failures=1 is used up",
    ]


def test_a_group_that_came_after_hours_has_waited_for_machines(play: Callable[..., Played]) -> None:
    played, now, hour = play(), time.time(), 3600
    played.begin("a", "n1", "n1")
    times = {"submitted_at": now - 7 * hour, "begun_at": now - 7 * hour}
    run_store.write_attempt(played.run, 1, replace(run_store.read_attempt(played.run, 1), **times))
    for rank in range(2):
        played.end(rank, KILLED)
        played.coordinator.beat("a", rank, "failed")
    exit_file = played.run.attempt(1) / "exit.json"
    atomic_files.write_json(exit_file, json_records.read_json(exit_file) | {"ended_at": now - 6 * hour})
    played.begin("b", "n1", "n1")
    assert played.number == 2
    found = goodput.read(played.run, time.time())
    assert (found.queue_s, found.restart_s) == (pytest.approx(6 * hour, abs=60), 0)
    assert found.held_s == pytest.approx(hour, abs=60)


def test_a_limit_that_is_reached_ends_the_run_before_its_workers_load(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    played.end(1, KILLED)
    monkeypatch.setattr(goodput, "reached_limit", lambda run, plan, now: "run.max_hours=2 is reached")
    assert played.begin("b", "n1", "n1")[0] == Leave("run.max_hours=2 is reached")
    assert played.number == 1
    assert run_store.read_status(played.run).state == "preempted"
    assert read_events(played.run.events)[-1]["text"] == "the run ends: run.max_hours=2 is reached"
    assert played.causes == ["infrastructure"], "the attempt before was not ended by the limit: W&B has to be told"


def test_a_failure_of_the_training_that_repeats_ends_the_run(play: Callable[..., Played]) -> None:
    played = play(max_failures=1)
    for group in "ab":
        played.begin(group, "n1", "n1")
        played.end(0, {**KILLED, "rank": 0, "kind": "KeyError", "exit_code": 1, "message": "KeyError: 'x'"})
        played.end(1)
        played.coordinator.beat(group, 0, "failed")
        verdict = played.coordinator.beat(group, 1, "done").verdict
    assert verdict.again is False
    assert "cluster.max_failures=1 is used up" in verdict.reason


def test_cancel_asks_for_a_save_and_a_second_one_kills(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    file = played.run.cancel(1)
    atomic_files.write_json(file, {"save": True})
    assert played.coordinator.beat("a", 0, None).signal == "USR1"
    atomic_files.write_json(file, {"save": False})
    assert played.coordinator.beat("a", 0, None).signal == "KILL"
    for rank in range(2):
        played.end(rank, stopped=True, killed=True)
        answer = played.coordinator.beat("a", rank, "done")
    assert answer.verdict.again is False
    assert run_store.read_status(played.run).state == "cancelled"


def test_a_save_that_takes_too_long_is_ended(play: Callable[..., Played]) -> None:
    played = play(stop_grace_seconds=0.01)
    played.begin("a", "n1", "n1")
    atomic_files.write_json(played.run.cancel(1), {"save": True})
    played.coordinator.beat("a", 0, None)
    time.sleep(0.02)
    assert played.coordinator.beat("a", 0, None).signal == "KILL"


def test_workers_of_a_run_that_another_command_has_started_again_leave_it_alone(play: Callable[..., Played]) -> None:
    played = play()
    run_store.create_attempt(played.run, Attempt(resume_step=None))
    before = run_store.read_status(played.run)
    (orders, _) = played.begin("a", "n1", "n1")
    assert orders is not None
    assert kind(orders) == "leave"
    assert run_store.read_status(played.run) == before


def test_workers_of_a_group_that_another_has_followed_are_sent_away(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    played.begin("b", "n1", "n1")
    answer = played.coordinator.beat("a", 0, None)
    assert (answer.signal, answer.verdict.again) == ("KILL", False)
    assert played.coordinator.orders("a", 0) == Leave("other workers have taken over")


def test_what_cannot_be_written_ends_the_run_instead_of_going_round(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = play()

    def full(run: RunDir, number: int, attempt: Attempt) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store, "write_attempt", full)
    assert played.begin("a", "n1", "n1") == [None, None], "there may be room in a moment"
    monkeypatch.setattr(module, "_OPEN_DEADLINE_S", -1.0)
    orders = played.coordinator.orders("a", 0)
    assert orders is not None
    assert kind(orders) == "leave"
    assert "No space left on device" in orders.reason
    assert run_store.read_status(played.run).state == "failed"


def test_a_node_whose_check_never_ends_is_named(play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "DEADLINE_S", 0.05)
    played = play()
    played.enter("a", ["n1", "n2"])
    assert played.coordinator.orders("a", 0) is not None
    played.coordinator.report_check("a", 0, FIT)
    assert played.coordinator.orders("a", 0) is None
    time.sleep(0.06)
    assert played.coordinator.orders("a", 0) == Wait()
    reason = played.coordinator.beat("a", 0, None).verdict.reason
    assert "n2: the node did not report within" in reason
    assert "n1:" not in reason


def test_cancel_is_heard_while_nodes_are_checked(play: Callable[..., Played]) -> None:
    played = play()
    played.enter("a", ["n1", "n2"])
    assert played.coordinator.orders("a", 0) is not None
    atomic_files.write_json(played.run.cancel(1), {"save": True})
    assert played.coordinator.orders("a", 0) == Wait()
    assert played.coordinator.beat("a", 0, None).verdict.again is False
    assert run_store.read_status(played.run).state == "cancelled"


def test_workers_that_were_silent_for_a_while_are_not_given_up(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENT_S", 0.05)
    played = play()
    played.begin("a", "n1", "n1")
    time.sleep(0.06)
    assert played.coordinator.state().idle_s > 0
    assert run_store.read_status(played.run).state == "pending"
    assert "are gone; the run waits for others" in played.run.events.read_text()
    played.coordinator.beat("a", 0, None)
    assert played.coordinator.state().idle_s == 0
    time.sleep(0.06)
    played.lost = {"id-n1"}
    assert played.coordinator.state().idle_s > 0
    assert run_store.read_status(played.run).message == "its workers are gone; Ray has lost n1; it waits for others"
    assert "are gone; Ray has lost n1; the run waits for others" in played.run.events.read_text()


def test_workers_that_cannot_even_start_end_the_run_with_their_words(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    coordinator = play().coordinator

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


def test_what_workers_said_that_could_not_start_is_forgotten_when_others_begin(play: Callable[..., Played]) -> None:
    played = play()
    played.coordinator.report_early_failure("n2: no interface ib0")
    played.begin("a", "n1", "n1")
    assert played.coordinator.state().early_failure == ""


def test_an_attempt_that_another_has_followed_writes_no_end(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    run_store.create_attempt(played.run, Attempt(resume_step=None))
    before = run_store.read_status(played.run)
    for rank in range(2):
        answer = played.coordinator.beat("a", rank, "done")
    assert answer.verdict.again is False
    assert run_store.read_status(played.run) == before
    assert played.causes == []


def test_storage_that_does_not_answer_for_a_moment_only_delays_an_attempt(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    with monkeypatch.context() as patch:

        def down(root: Path) -> int | None:
            raise UnreadableCheckpoint("a checkpoint file cannot be read now")

        patch.setattr(store, "newest_step", down)
        played.enter("b", ["n1", "n1"])
        assert played.coordinator.orders("b", 0) is None
        assert played.coordinator.state().over is None
    orders = played.coordinator.orders("b", 0)
    assert orders is not None
    assert (kind(orders), orders.assignment.attempt) == ("check", 2)


def test_ranks_do_not_meet_at_a_public_address(play: Callable[..., Played]) -> None:
    played = play(workers=1)
    played.coordinator.enter("a", 1, Member(0, 0, "n1", "1", "8.8.8.8", 4000))
    orders = played.coordinator.orders("a", 0)
    assert orders is not None
    assert kind(orders) == "leave"
    assert "a public address: n1 at 8.8.8.8" in orders.reason


def test_what_was_logged_at_a_checkpoint_goes_with_it_to_ray(play: Callable[..., Played]) -> None:
    """Training is some steps ahead when a checkpoint is committed, and evaluations are lines of their own."""
    played = play()
    played.begin("a", "n1", "n1")
    lines = [{"trainer/step": step, "attempt": 1, "train/loss": float(step), "time": 0.0} for step in range(1, 12)]
    lines.insert(5, {"trainer/step": 5, "attempt": 1, "eval/held_out/loss": 9.0, "time": 0.0})
    played.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (5, 10):
        played.save(step)
        saved = played.coordinator.beat("a", 0, None).saved[-1]
        assert (saved.step, saved.metrics["train/loss"]) == (step, step)
    first = played.coordinator.beat("a", 1, None).saved[0]
    assert first.metrics["eval/held_out/loss"] == 9.0
    assert first.path == str(played.run.checkpoints / "step-00000005")
    assert [saved.step for saved in played.coordinator.beat("a", 1, None, num_saved=1).saved] == [10], "one is known"


def test_a_damaged_checkpoint_keeps_no_later_one_from_ray(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    played.save(5)
    (played.run.checkpoints / "step-00000005" / MANIFEST).write_text("{")
    played.save(10)
    assert [saved.step for saved in played.coordinator.beat("a", 0, None).saved] == [10]


def test_a_wish_to_stop_that_comes_between_two_groups_is_heard(play: Callable[..., Played]) -> None:
    played = play()
    played.begin("a", "n1", "n1")
    played.end(1, KILLED)
    played.end(0)
    played.coordinator.beat("a", 1, "failed")
    assert played.coordinator.beat("a", 0, "done").verdict.again
    atomic_files.write_json(played.run.cancel(1), {"save": True})
    (orders, _) = played.begin("b", "n1", "n1")
    assert orders is not None
    assert kind(orders) == "leave"
    assert run_store.read_status(played.run).state == "cancelled"
    assert played.number == 1


def test_a_report_that_comes_after_the_verdict_changes_nothing(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_checks, "DEADLINE_S", -1.0)
    played = play()
    played.enter("a", ["n1", "n2"])
    assert played.coordinator.orders("a", 0) == Wait()
    before = played.coordinator.beat("a", 0, None).verdict
    for rank in range(2):
        played.coordinator.report_check("a", rank, FIT)
    assert played.coordinator.beat("a", 0, None).verdict == before
