"""How a run on Ray makes way for fewer, more or other workers, with workers that are played."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from played_workers import KILLED, Played, kind, sign

from launcher import run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking import goodput
from launcher.worker.ray import attempts as module
from launcher.worker.ray.messages import ResizeProgress

BAD = ["bad", "bad", "n2", "n2"]


def test_before_a_node_is_taken_away_the_run_saves_and_goes_on_elsewhere(play: Callable[..., Played]) -> None:
    played = play(max_preemptions=1)
    played.draining = {"id-of-another-run"}
    played.begin("a", "n1", "n2")
    assert played.coordinator.beat("a", 0, None).signal is None
    played.draining = {"id-n2"}
    assert played.coordinator.beat("a", 0, None).signal == "USR2"
    assert "about to lose n2" in played.run.events.read_text()
    played.save(7)
    played.outcome("preempted", 7)
    for rank in range(2):
        played.end(rank, stopped=True)
        answer = played.coordinator.beat("a", rank, "done")
    assert answer.verdict.again
    assert played.causes == ["preempted"]


def test_a_node_that_is_gone_before_the_save_counts_as_taken(play: Callable[..., Played]) -> None:
    played = play(max_infrastructure_failures=0)
    played.begin("a", "n1", "n2")
    played.draining = {"id-n2"}
    played.coordinator.beat("a", 0, None)
    orders = played.begin("b", "n1", "n1")
    assert orders[0] is not None
    assert kind(orders[0]) == "train"
    assert played.causes == ["preempted"]


@pytest.mark.parametrize("num_workers, active", [(1, 1), (3, 2), (4, 4)])
def test_on_another_number_of_workers_the_global_batch_is_the_same(
    play: Callable[..., Played], num_workers: int, active: int
) -> None:
    played = play(workers=2, min_workers=1)
    orders = played.begin("a", *["n1"] * num_workers)
    assert [kind(o) for o in orders] == ["train"] * active + ["wait"] * (num_workers - active)
    assert orders[0] is not None
    plan = LaunchPlan.load(orders[0].assignment.plan_path)
    assert plan.topology.world_size == active
    assert plan.batch.global_batch_size == played.plan.batch.global_batch_size == 4
    assert plan.batch.micro_batch_size * plan.batch.accumulation * active == 4
    assert plan.deepspeed["gradient_accumulation_steps"] == plan.batch.accumulation
    assert [attempt.num_workers for attempt in goodput.read_attempt_times(played.run)] == [num_workers], "idle ones too"
    assert run_store.find_plan(played.run, plan.digest()) == plan


def test_a_run_that_grows_is_not_charged_for_it(play: Callable[..., Played]) -> None:
    played = play(workers=2, min_workers=1, max_infrastructure_failures=0, max_preemptions=0)
    played.begin("a", "n1")
    orders = played.begin("b", "n1", "n2")
    assert orders[0] is not None
    assert kind(orders[0]) == "train"


def test_a_run_saves_before_it_gets_more_workers(play: Callable[..., Played]) -> None:
    played = play(workers=2, min_workers=1, max_infrastructure_failures=0, max_preemptions=0)
    assert played.coordinator.prepare_resize() is ResizeProgress.ENDED, "there is nobody yet"
    played.begin("a", "n1")
    run_store.update_status(played.run, message="")
    assert played.coordinator.prepare_resize() is ResizeProgress.REQUESTED
    assert "another number of workers" in played.run.events.read_text()
    played.save(7)
    answer = played.coordinator.beat("a", 0, None)
    assert (answer.signal, answer.saved, answer.verdict) == ("USR2", (), None)
    assert played.coordinator.prepare_resize() is ResizeProgress.REQUESTED
    played.outcome("preempted", 7)
    played.end(0, stopped=True)
    assert played.coordinator.beat("a", 0, "done").verdict.again
    assert played.coordinator.prepare_resize() is ResizeProgress.ENDED
    assert played.causes == ["resized"]
    assert played.run.events.read_text().count("another number of workers") == 1
    orders = played.begin("b", "n1", "n2")
    assert orders[0] is not None
    assert kind(orders[0]) == "train"
    assert run_store.read_attempt(played.run, 2).resume_step == 7


def test_ranks_that_still_load_make_way_at_once(play: Callable[..., Played]) -> None:
    played = play(workers=2, min_workers=1)
    played.begin("a", "n1")
    assert played.coordinator.prepare_resize() is ResizeProgress.ENDED
    answer = played.coordinator.beat("a", 0, None)
    assert (answer.signal, answer.verdict.again) == ("TERM", True)
    assert played.causes == ["resized"]


def test_an_elastic_run_goes_on_without_a_node_that_is_unfit(play: Callable[..., Played]) -> None:
    """Rank 0's node it is: the others move up."""
    played = play(workers=4, min_workers=2)
    nodes = ["bad", "bad", "n2", "n2"]
    played.enter("a", nodes)
    played.check("a", nodes, {"bad": "GPU 1 computes wrong numbers"})
    assert played.coordinator.beat("a", 0, None).verdict.again
    orders = played.begin("b", *nodes)
    assert [kind(o) for o in orders] == ["wait", "wait", "train", "train"]
    third, fourth = orders[2], orders[3]
    assert third is not None
    assert fourth is not None
    assert [
        (found.assignment.rank, found.assignment.world_size, found.assignment.local_world_size) for found in (third, fourth)
    ] == [(0, 2, 2), (1, 2, 2)]
    assert (third.assignment.port, fourth.assignment.port) == (4002, 4002), "they meet at the first of those that train"
    attempt = run_store.read_attempt(played.run, 2)
    assert attempt.nodes == ("n2", "n2")
    assert "without bad, unfit before" in played.run.events.read_text()
    assert run_store.load_plan(played.run).topology.world_size == 2
    # A failure of theirs is recorded by their own ranks.
    played.coordinator.beat("b", 2, "done")
    played.end(0)
    played.end(1, KILLED)
    verdict = played.coordinator.beat("b", 3, "failed").verdict
    assert verdict.again
    assert "rank 1: killed by SIGKILL" in verdict.reason
    again = played.begin("c", *nodes)
    assert [kind(o) for o in again] == ["wait", "wait", "train", "train"], "it stays out until there is a newer checkpoint"


def trial(played: Played, group: str, step: int) -> None:
    """The two ranks of the nodes that are well have saved; where they are asked, they save again and leave."""
    played.save(step)
    for rank in (2, 3):
        # What is found at a look is answered at the next.
        played.coordinator.beat(group, rank, None)
    assert played.coordinator.beat(group, 2, None).signal == "USR2"
    played.save(step + 1)
    played.outcome("preempted", step + 1)
    for rank in range(2):
        played.end(rank, stopped=True)
        verdict = played.coordinator.beat(group, 2 + rank, "done").verdict
    assert verdict.again


def without_the_bad_node(play: Callable[..., Played]) -> Played:
    """A run of four workers whose group b trains on those two whose node is well."""
    played = play(workers=4, min_workers=2, max_infrastructure_failures=1, max_preemptions=0)
    played.enter("a", BAD)
    played.check("a", BAD, {"bad": "the run directory is not visible"})
    assert played.coordinator.beat("a", 0, None).verdict.again
    assert [kind(o) for o in played.begin("b", *BAD)] == ["wait", "wait", "train", "train"]
    assert played.coordinator.beat("b", 2, None).signal is None, "what is trained would be lost"
    return played


def test_a_node_that_was_left_out_is_tried_again_after_a_checkpoint(play: Callable[..., Played]) -> None:
    """What kept it was a mount that came late: nothing else would ever bring it back."""
    played = without_the_bad_node(play)
    trial(played, "b", 5)
    assert "trying bad again, unfit before: the run saves and begins again" in played.run.events.read_text()
    assert [kind(o) for o in played.begin("c", *BAD)] == ["train"] * 4
    assert run_store.read_attempt(played.run, 3).resume_step == 6
    played.save(10)
    assert played.coordinator.beat("c", 0, None).signal is None
    assert played.causes == ["bad_node", "resized"]


def test_a_node_that_stays_unfit_is_tried_again_hours_later(play: Callable[..., Played], clock: list[float]) -> None:
    played = without_the_bad_node(play)
    trial(played, "b", 5)
    for trained, tried, step in (("d", "c", 10), ("f", "e", 20)):
        played.enter(tried, BAD)
        played.check(tried, BAD, {"bad": "the run directory is not visible"})
        assert played.coordinator.beat(tried, 0, None).verdict.again
        assert [kind(o) for o in played.begin(trained, *BAD)] == ["wait", "wait", "train", "train"]
        for _ in range(2):
            played.coordinator.beat(trained, 2, None)
        played.save(step)
        clock[0] += module._TRIAL_S - 60
        for _ in range(2):
            assert played.coordinator.beat(trained, 2, None).signal is None
        clock[0] += 120
        trial(played, trained, step + 5)
    assert played.causes == ["bad_node", "resized"] * 3


@pytest.mark.parametrize("phase", ["finishing", "saving"])
def test_a_run_that_ends_anyway_begins_not_again_for_a_node(play: Callable[..., Played], phase: str) -> None:
    played = without_the_bad_node(play)
    played.save(5)
    for _ in range(2):
        answer = played.coordinator.beat("b", 2, None, sign(2, 0.0, phase=phase))
    assert answer.signal == (None if phase == "finishing" else "USR2")


def test_an_elastic_run_that_has_too_few_workers_without_a_bad_node_tries_it_again(play: Callable[..., Played]) -> None:
    played = play(workers=4, min_workers=3, max_infrastructure_failures=1)
    nodes = ["n1", "n1", "bad", "bad"]
    played.enter("a", nodes)
    played.check("a", nodes, {"bad": "GPU 1 computes wrong numbers"})
    assert played.coordinator.beat("a", 0, None).verdict.again
    played.enter("b", nodes)
    assert kind(played.coordinator.orders("b", 0)) == "check"
    assert "on n1, bad, for lack of other nodes with bad, unfit before" in played.run.events.read_text()
    played.check("b", nodes, {"bad": "GPU 1 computes wrong numbers"})
    over = played.coordinator.state().over
    assert "bad: GPU 1 computes wrong numbers" in over
    assert "cluster.max_infrastructure_failures=1 is used up" in over


@pytest.mark.parametrize("min_workers", [2, 3])
def test_an_unfit_node_is_not_tried_again_where_as_many_train_without_it(play: Callable[..., Played], min_workers: int) -> None:
    """Of three workers two train, since the batch of four rows does not divide over three."""
    played = play(workers=4, min_workers=min_workers)
    nodes = ["bad", "n1", "n2"]
    played.enter("a", nodes)
    played.check("a", nodes, {"bad": "GPU 1 computes wrong numbers"})
    assert played.coordinator.beat("a", 0, None).verdict.again
    orders = played.begin("b", *nodes)
    assert [kind(o) for o in orders] == ["wait", "train", "train"]
    assert "without bad, unfit before" in played.run.events.read_text()
    played.save(5)
    for _ in range(2):
        assert played.coordinator.beat("b", 1, None).signal is None


def test_after_a_run_has_shrunk_and_grown_its_plan_is_that_of_the_newest_attempt(play: Callable[..., Played]) -> None:
    played = play(workers=2, min_workers=1)
    sizes = []
    for name, nodes in (("a", ["n1", "n2"]), ("b", ["n1"]), ("c", ["n1"]), ("d", ["n1", "n2"])):
        orders = played.begin(name, *nodes)
        assert orders[0] is not None
        assert LaunchPlan.load(orders[0].assignment.plan_path) == run_store.load_plan(played.run)
        sizes.append(run_store.load_plan(played.run).topology.world_size)
    assert sizes == [2, 1, 1, 2]
    assert run_store.load_plan(played.run).limits == played.plan.limits
