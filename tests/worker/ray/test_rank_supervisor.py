"""A Ray worker reports its rank to the coordinator; the rank is a real process that fails at once.

A run continues with fewer, more or other workers; the workers are fake.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_workers import KILLED, FakeWorkers, MakeFake, kind
from plan_fixtures import H100, PlanOf
from unusual_files import as_root

from launcher import run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.runs import journal
from launcher.tracking import goodput
from launcher.worker.ranks.rank_process import RankProcesses
from launcher.worker.ray import rank_supervisor
from launcher.worker.ray.coordinator import CoordinatorLost, call_coordinator
from launcher.worker.ray.messages import Assignment, BeatReply, CheckNode, RankResult, RankSign, ResizeProgress, Train, Verdict

__all__ = ["as_root"]


def assignment(run: RunDir, marker: str = "") -> Assignment:
    """The assignment of the only rank of a run's first attempt."""
    return Assignment(1, str(run.plan), marker, 0, 1, 1, "127.0.0.1", 1, ("127.0.0.1",))


class Told(rank_supervisor._Worker):
    """A worker without Ray whose coordinator replies with `answer`; `told` lists what the worker reports, in order."""

    def __init__(self, answer: BeatReply) -> None:
        self.rank = self.local_rank = 0
        self.node = "n1"
        self.ranks = RankProcesses()
        self.answer, self.told = answer, list[str | None]()

    def _beat(self, result: RankResult | None, sign: RankSign | None = None) -> BeatReply:
        self.told.append(result)
        return self.answer


class Endless:
    """A mirror that never finishes."""

    def __init__(self, worker: Told) -> None:
        self._worker = worker

    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        self._worker.told.append("mirrors")
        assert until < time.time() + 60
        assert not unwanted()


def test_a_failed_rank_is_reported_before_the_wait_for_the_mirror(
    ray_plan: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWorkers(ray_plan(working_dir=str(tmp_path), workers=1))
    worker = Told(BeatReply())
    monkeypatch.setattr(rank_supervisor, "start_mirror", lambda *_: Endless(worker))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    orders = Train(assignment(fake.run), {})
    assert worker._train(orders) == "failed"
    assert worker.told[worker.told.index("failed") :] == ["failed", "mirrors", None]


def test_a_damaged_final_record_does_not_fail_the_worker(
    ray_plan: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWorkers(ray_plan(working_dir=str(tmp_path), workers=1, device=H100, ranks_per_node=1))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    rank = tmp_path / "rank"
    lines = ("#!/bin/sh", "env > $0.env", 'printf "{" > $0.final', "kill -KILL $$")
    rank.write_text("\n".join(lines))
    rank.chmod(0o700)
    (fake.run.attempt(1) / "journal/rank-00000.jsonl").symlink_to(f"{rank}.final")
    monkeypatch.setattr(sys, "executable", str(rank))
    orders = Train(assignment(fake.run), {})
    assert Told(BeatReply())._train(orders) == "failed"
    ended = journal.read_node(fake.run, 1, 0)
    assert ended is not None
    assert ended.first_failure is not None
    assert (ended.first_failure.kind, ended.first_failure.message) == ("killed", "killed by SIGKILL")
    # The GPU's allocator, and what a rank binds itself by to the CPUs next to its GPU.
    expected = {"PYTORCH_ALLOC_CONF=expandable_segments:True", "LOCAL_RANK=0", f"OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"}
    assert expected <= {*Path(f"{rank}.env").read_text().splitlines()}


def test_a_node_with_another_run_directory_than_the_head_node_is_refused(ray_plan: PlanOf, tmp_path: Path) -> None:
    """The folder exists and has the same attempt; only this start's marker tells the two apart."""
    made = ray_plan(working_dir=str(tmp_path), workers=1)
    assert made.data is not None
    (tmp_path / "meta.json").touch()
    fake = FakeWorkers(made.model_copy(update={"data": made.data.model_copy(update={"cache_dir": str(tmp_path)})}))
    marker, orders = fake.run.attempt(1) / "marker", CheckNode(assignment(fake.run, "of this start"), ())

    def said() -> list[str]:
        problems = rank_supervisor.check_node("n1", orders).problems
        return [wrong for problem in problems if wrong in f"{problem.where}: {problem.message}"]

    wrong = "n1: the run directory differs from the head node's: it lacks a file of this attempt"
    assert said() == [wrong]
    marker.write_text("of an earlier start")
    assert said() == [wrong]
    marker.write_text("of this start")
    assert said() == []
    shutil.rmtree(fake.run.root)
    (unseen,) = rank_supervisor.check_node("n1", orders).problems
    assert unseen.where == "n1"
    assert "the run directory is not visible" in unseen.message


@pytest.mark.parametrize("local_rank, is_newest, is_kept", [(0, True, False), (1, True, True), (0, False, True)])
def test_offloaded_states_are_removed_with_the_newest_attempt_only(
    ray_plan: PlanOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    local_rank: int,
    is_newest: bool,
    is_kept: bool,
) -> None:
    made, states = ray_plan(working_dir=str(tmp_path), workers=1), tmp_path / "nvme/tried"
    states.mkdir(parents=True)
    zero = {**made.deepspeed["zero_optimization"], "offload_optimizer": {"device": "nvme", "nvme_path": str(states)}}
    fake = FakeWorkers(made.model_copy(update={"deepspeed": {**made.deepspeed, "zero_optimization": zero}}))
    assert run_store.load_plan(fake.run).nvme_folder == states
    if not is_newest:
        run_store.create_attempt(fake.run, Attempt(resume_step=None, automatic=True))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    worker = Told(BeatReply())
    worker.local_rank = local_rank
    worker._train(Train(assignment(fake.run), {}))
    assert states.exists() is is_kept


def test_a_worker_whose_coordinator_has_died_returns_so_that_ray_train_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

    handle = SimpleNamespace(orders=SimpleNamespace(remote=lambda *_: None))
    for death in (ActorDiedError(), OutOfMemoryError("killed by Ray's memory monitor")):
        answers = iter([ActorUnavailableError("it is out of reach", None), death])

        def get(_: object, timeout: float, answers: Iterator[Exception] = answers) -> Any:
            raise next(answers)

        monkeypatch.setattr("ray.get", get)
        with pytest.raises(CoordinatorLost):
            call_coordinator(handle, "orders", "a", 0)
        assert next(answers, None) is None

    def lose(*_: object) -> Verdict:
        raise CoordinatorLost

    monkeypatch.setattr(rank_supervisor, "_take_part", lose)
    rank_supervisor.supervise({"coordinator": None, "interface": None})


def test_before_a_node_is_drained_the_run_saves_and_continues_elsewhere(make_fake: MakeFake) -> None:
    fake = make_fake()
    fake.draining = {"id-of-another-run"}
    fake.begin("a", "n1", "n2")
    assert fake.coordinator.beat("a", 0, None).signal is None
    fake.draining = {"id-n2"}
    assert fake.coordinator.beat("a", 0, None).signal == "USR2"
    assert "about to lose n2" in fake.run.events.read_text()
    fake.save(7)
    fake.outcome("preempted", 7)
    for rank in range(2):
        fake.end(rank, stopped=True)
        answer = fake.coordinator.beat("a", rank, "done")
    assert answer.verdict.again
    assert fake.causes == ["preempted"]


def test_a_drained_node_that_is_lost_before_the_save_counts_as_preempted(make_fake: MakeFake) -> None:
    fake = make_fake(max_infrastructure_failures=0)
    fake.begin("a", "n1", "n2")
    fake.draining = {"id-n2"}
    fake.coordinator.beat("a", 0, None)
    orders = fake.begin("b", "n1", "n1")
    assert orders[0] is not None
    assert kind(orders[0]) == "train"
    assert fake.causes == ["preempted"]


def test_a_rank_that_dies_on_a_drained_node_counts_as_preempted(make_fake: MakeFake) -> None:
    fake = make_fake(max_infrastructure_failures=0)
    fake.begin("a", "n1", "n2")
    fake.draining = {"id-n2"}
    fake.coordinator.beat("a", 0, None)
    fake.end(0, stopped=True)
    fake.end(1, KILLED, stopped=True)
    fake.coordinator.beat("a", 0, "failed")
    assert fake.coordinator.beat("a", 1, "failed").verdict.again
    assert fake.causes == ["preempted"]


@pytest.mark.parametrize("num_workers, active", [(1, 1), (3, 2), (4, 4)])
def test_on_another_number_of_workers_the_global_batch_is_the_same(make_fake: MakeFake, num_workers: int, active: int) -> None:
    fake = make_fake(workers=2, min_workers=1)
    orders = fake.begin("a", *["n1"] * num_workers)
    assert [kind(o) for o in orders] == ["train"] * active + ["wait"] * (num_workers - active)
    assert orders[0] is not None
    plan = LaunchPlan.load(orders[0].assignment.plan_path)
    assert plan.topology.world_size == active
    assert plan.batch.global_batch_size == fake.plan.batch.global_batch_size == 4
    assert plan.batch.micro_batch_size * plan.batch.accumulation * active == 4
    assert plan.deepspeed["gradient_accumulation_steps"] == plan.batch.accumulation
    assert [attempt.num_workers for attempt in goodput.read_attempt_times(fake.run)] == [num_workers], "idle ones too"
    assert run_store.find_plan(fake.run, plan.digest()) == plan


def test_a_run_that_grows_is_not_charged_for_it(make_fake: MakeFake) -> None:
    fake = make_fake(workers=2, min_workers=1, max_infrastructure_failures=0)
    fake.begin("a", "n1")
    orders = fake.begin("b", "n1", "n2")
    assert orders[0] is not None
    assert kind(orders[0]) == "train"


def test_a_run_saves_before_it_gets_more_workers(make_fake: MakeFake) -> None:
    fake = make_fake(workers=2, min_workers=1, max_infrastructure_failures=0)
    assert fake.coordinator.prepare_resize() is ResizeProgress.ENDED, "there is nobody yet"
    fake.begin("a", "n1")
    run_store.update_status(fake.run, message="")
    assert fake.coordinator.prepare_resize() is ResizeProgress.REQUESTED
    assert "another number of workers" in fake.run.events.read_text()
    fake.save(7)
    answer = fake.coordinator.beat("a", 0, None)
    assert (answer.signal, answer.verdict) == ("USR2", None)
    assert fake.coordinator.prepare_resize() is ResizeProgress.REQUESTED
    fake.outcome("preempted", 7)
    fake.end(0, stopped=True)
    assert fake.coordinator.beat("a", 0, "done").verdict.again
    assert fake.coordinator.prepare_resize() is ResizeProgress.ENDED
    assert fake.causes == ["resized"]
    assert fake.run.events.read_text().count("another number of workers") == 1
    orders = fake.begin("b", "n1", "n2")
    assert orders[0] is not None
    assert kind(orders[0]) == "train"
    assert run_store.read_attempt(fake.run, 2).resume_step == 7


def test_ranks_that_still_load_are_replaced_at_once(make_fake: MakeFake) -> None:
    fake = make_fake(workers=2, min_workers=1)
    fake.begin("a", "n1")
    assert fake.coordinator.prepare_resize() is ResizeProgress.ENDED
    answer = fake.coordinator.beat("a", 0, None)
    assert (answer.signal, answer.verdict.again) == ("TERM", True)
    assert fake.causes == ["resized"]


def test_an_elastic_run_continues_without_an_unfit_node(make_fake: MakeFake) -> None:
    """The excluded node has rank 0, so the other ranks move up."""
    fake = make_fake(workers=4, min_workers=2)
    nodes = ["bad", "bad", "n2", "n2"]
    fake.enter("a", nodes)
    fake.check("a", nodes, {"bad": "GPU 1 computes wrong numbers"})
    assert fake.coordinator.beat("a", 0, None).verdict.again
    orders = fake.begin("b", *nodes)
    assert [kind(o) for o in orders] == ["wait", "wait", "train", "train"]
    third, fourth = orders[2], orders[3]
    assert third is not None
    assert fourth is not None
    assert [
        (found.assignment.rank, found.assignment.world_size, found.assignment.local_world_size) for found in (third, fourth)
    ] == [(0, 2, 2), (1, 2, 2)]
    assert (third.assignment.port, fourth.assignment.port) == (4002, 4002), "they meet at the first of those that train"
    attempt = run_store.read_attempt(fake.run, 2)
    assert attempt.nodes == ("n2", "n2")
    assert "without bad, which failed the node checks before" in fake.run.events.read_text()
    assert run_store.load_plan(fake.run).topology.world_size == 2
    # A failure is recorded under the new rank numbers.
    fake.coordinator.beat("b", 2, "done")
    fake.end(0)
    fake.end(1, KILLED)
    verdict = fake.coordinator.beat("b", 3, "failed").verdict
    assert verdict.again
    assert "rank 1: killed by SIGKILL" in verdict.reason
    again = fake.begin("c", *nodes)
    assert [kind(o) for o in again] == ["wait", "wait", "train", "train"], "it stays out until there is a newer checkpoint"


def test_a_bad_node_is_used_again_where_too_few_workers_remain_without_it(make_fake: MakeFake) -> None:
    fake = make_fake(workers=4, min_workers=3, max_infrastructure_failures=1)
    nodes = ["n1", "n1", "bad", "bad"]
    fake.enter("a", nodes)
    fake.check("a", nodes, {"bad": "GPU 1 computes wrong numbers"})
    assert fake.coordinator.beat("a", 0, None).verdict.again
    fake.enter("b", nodes)
    assert kind(fake.coordinator.orders("b", 0)) == "checknode"
    assert "on n1, bad, still with bad, which failed the node checks before" in fake.run.events.read_text()
    fake.check("b", nodes, {"bad": "GPU 1 computes wrong numbers"})
    over = fake.coordinator.state().over
    assert "bad: GPU 1 computes wrong numbers" in over
    assert "cluster.max_infrastructure_failures=1 is used up" in over


def test_after_a_run_has_shrunk_and_grown_its_plan_is_that_of_the_newest_attempt(make_fake: MakeFake) -> None:
    fake = make_fake(workers=2, min_workers=1)
    sizes = []
    for name, nodes in (("a", ["n1", "n2"]), ("b", ["n1"]), ("c", ["n1"]), ("d", ["n1", "n2"])):
        orders = fake.begin(name, *nodes)
        assert orders[0] is not None
        assert LaunchPlan.load(orders[0].assignment.plan_path) == run_store.load_plan(fake.run)
        sizes.append(run_store.load_plan(fake.run).topology.world_size)
    assert sizes == [2, 1, 1, 2]
    assert run_store.load_plan(fake.run).limits == fake.plan.limits
