"""A Ray worker reports its rank to the coordinator; the rank is a real process that fails at once."""

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
from fake_workers import FakeWorkers
from file_owners import as_root
from plan_fixtures import H100

from launcher import json_records, run_records, run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker.ranks.rank_process import RankProcesses
from launcher.worker.ray import node_checks, rank_supervisor
from launcher.worker.ray.coordinator_actor import CoordinatorLost, call_coordinator
from launcher.worker.ray.messages import Assignment, BeatReply, CheckNode, RankResult, RankSign, Train, Verdict

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
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWorkers(ray_plan(working_dir=str(tmp_path), workers=1))
    worker = Told(BeatReply())
    monkeypatch.setattr(rank_supervisor, "start_mirror", lambda *_: Endless(worker))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    orders = Train(assignment(fake.run), {})
    assert worker._train(orders) == "failed"
    assert worker.told[worker.told.index("failed") :] == ["failed", "mirrors", None]


def test_a_damaged_final_record_does_not_fail_the_worker(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWorkers(ray_plan(working_dir=str(tmp_path), workers=1, device=H100, ranks_per_node=1))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    rank = tmp_path / "rank"
    lines = ("#!/bin/sh", "env > $0.env", 'printf "{" > $0.final', "kill -KILL $$")
    rank.write_text("\n".join(lines))
    rank.chmod(0o700)
    (fake.run.attempt(1) / "final.json").symlink_to(f"{rank}.final")
    monkeypatch.setattr(sys, "executable", str(rank))
    orders = Train(assignment(fake.run), {})
    assert Told(BeatReply())._train(orders) == "failed"
    failure = json_records.read_json(run_records.node_file(fake.run, 1, 0))["first_failure"]
    assert (failure["kind"], failure["message"]) == ("killed", "killed by SIGKILL")
    # The GPU's allocator, and what a rank binds itself by to the CPUs next to its GPU.
    expected = {"PYTORCH_ALLOC_CONF=expandable_segments:True", "LOCAL_RANK=0", f"OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"}
    assert expected <= {*Path(f"{rank}.env").read_text().splitlines()}


def test_a_node_with_another_run_directory_than_the_head_node_is_refused(
    ray_plan: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    """The folder exists and has the same attempt; only this start's marker tells the two apart."""
    made = ray_plan(working_dir=str(tmp_path), workers=1)
    assert made.data is not None
    (tmp_path / "meta.json").touch()
    fake = FakeWorkers(made.model_copy(update={"data": made.data.model_copy(update={"cache_dir": str(tmp_path)})}))
    marker, orders = fake.run.attempt(1) / "marker", CheckNode(assignment(fake.run, "of this start"), ())

    def said() -> list[str]:
        problems = node_checks.check_node("n1", orders).problems
        return [wrong for problem in problems if wrong in f"{problem.where}: {problem.message}"]

    wrong = "n1: the run directory differs from the head node's: it lacks a file of this attempt"
    assert said() == [wrong]
    marker.write_text("of an earlier start")
    assert said() == [wrong]
    marker.write_text("of this start")
    assert said() == []
    shutil.rmtree(fake.run.root)
    (unseen,) = node_checks.check_node("n1", orders).problems
    assert unseen.where == "n1"
    assert "the run directory is not visible" in unseen.message


@pytest.mark.parametrize("local_rank, is_newest, is_kept", [(0, True, False), (1, True, True), (0, False, True)])
def test_offloaded_states_are_removed_with_the_newest_attempt_only(
    ray_plan: Callable[..., LaunchPlan],
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
