"""Two real ranks agree on the checkpoint that they start from.

Rank 0 reports why the previous ranks failed, because their own message is only in the run's files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hand_made
import pytest
import torch
import torch.distributed as dist
from forked_ranks import RankServer
from plan_fixtures import PlanOf
from unusual_files import stale

from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST, STATE
from launcher.distributed import RankInfo
from launcher.errors import Superseded
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import append_event
from launcher.tracking.tracker import Composite
from launcher.train.previous_failure import RESTART, PreviousFailure, find_previous_failure
from launcher.train.resume import agree_on_start_point, load_newest_intact
from launcher.train.setup import RunContext, build_components

CPU, ALONE = torch.device("cpu"), RankInfo(0, 0, 1, 2)
KILLED = {"rank": 3, "kind": "killed", "message": "killed by SIGKILL", "log": "/run/rank-00003.log"}


def run_with(
    root: Path,
    named: int | None,
    own: Sequence[int] = (),
    before: Sequence[int] = (),
    pinned: bool = False,
    automatic: bool = False,
) -> RunDir:
    """Create a run in its second attempt. `named` is its resume step, `own` are its checkpoints, `before` the first attempt's."""
    run = RunDir(root)
    run.attempt(2).mkdir(parents=True)
    run_store.write_attempt(run, 2, Attempt(resume_step=named, pinned=pinned, automatic=automatic))
    for attempt, steps in ((1, before), (2, own)):
        for step in steps:
            hand_made.checkpoint(run, step, attempt=attempt, files=hand_made.ONE_RANK)
    return run


def on_two_ranks(
    rank_server: RankServer, folder: Path, first: list[tuple[RunDir, int]], second: list[tuple[RunDir, int]], loads: bool = False
) -> list[list[Any]]:
    """Return each rank's result per case: its start point, or with `loads`, the loaded step and the messages to the user."""
    seen = [[[(str(run.root), restart, loads) for run, restart in cases]] for cases in (first, second)]
    return rank_server.values("train_ranks:begin", seen, folder / "ranks")


def test_all_ranks_begin_where_rank_0_chooses(rank_server: RankServer, tmp_path: Path) -> None:
    named = run_with(tmp_path / "named", 10, before=[10, 20])
    own = run_with(tmp_path / "own", 10, own=[30, 40], before=[10, 20, 50])
    ahead = run_with(tmp_path / "ahead", 10, own=[30, 40, 60], before=[10])
    nothing = run_with(tmp_path / "nothing", None)
    first = [(named, 0), (own, 0), (own, 1), (nothing, 2), (own, 0)]
    second = [(named, 0), (own, 3), (ahead, 0), (ahead, 0), (named, 0)]
    first_rank, second_rank = on_two_ranks(rank_server, tmp_path, first, second)

    def at(run: RunDir, step: int) -> list[Any]:
        return [step, str(run.checkpoints / store.step_name(step))]

    # Ranks start at the resume step; later checkpoints of the previous attempt are ignored.
    assert first_rank[0] == second_rank[0] == [*at(named, 10), 0]
    # After a restart, ranks use the attempt's own newest checkpoint and the highest restart count.
    assert first_rank[1] == second_rank[1] == [*at(own, 40), 3]
    # The second rank sees more checkpoints.
    assert (first_rank[2], second_rank[2]) == ([*at(own, 40), 1], [*at(ahead, 40), 1])
    assert first_rank[3] == second_rank[3] == [None, None, 2]
    # The second rank does not see the checkpoint and refuses, rather than silently starting elsewhere.
    assert first_rank[4] == [*at(own, 40), 0]
    assert isinstance(second_rank[4], str)
    assert "40" in second_rank[4]


def test_a_checkpoint_that_the_submitter_did_not_see_is_used(rank_server: RankServer, tmp_path: Path) -> None:
    unnamed = run_with(tmp_path / "unnamed", None, before=[10, 20], automatic=True)
    lower = run_with(tmp_path / "lower", 10, before=[10, 20], automatic=True)
    damaged = run_with(tmp_path / "damaged", None, before=[10, 20], automatic=True)
    flip(damaged, 20)
    own = run_with(tmp_path / "own", 10, before=[10, 30], own=[20], automatic=True)
    pinned = run_with(tmp_path / "pinned", 10, before=[10, 20], automatic=True, pinned=True)
    person = run_with(tmp_path / "person", 10, before=[10, 20])
    anew = run_with(tmp_path / "anew", None, before=[10, 20])
    runs = (unnamed, lower, damaged, own, pinned, person, anew)
    *loaded, refused = loaded_on_two_ranks(rank_server, tmp_path, *runs)
    assert [step for step, _ in loaded] == [20, 20, 10, 20, 10, 10]
    assert [run_store.read_attempt(run, 2).resume_step for run in runs] == [20, 20, 10, 10, 10, 10, None]
    assert folder_names(damaged) == ["damaged-step-00000020", "step-00000010"]
    assert refused.startswith("CheckpointError: attempt 2 would begin at step 0, but the attempts before it have checkpoints")
    assert "the newest is at step 20" in refused


def test_a_superseded_attempt_does_not_change_its_resume_step(rank_server: RankServer, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", None, before=[10], automatic=True)
    run_store.create_attempt(run, Attempt(resume_step=10))
    (error,) = loaded_on_two_ranks(rank_server, tmp_path, run)
    assert error.startswith("Superseded: attempt 2 is superseded")
    assert run_store.read_attempt(run, 2).resume_step is None


@pytest.fixture
def alone() -> Iterator[None]:
    """Make this process the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_successor_that_the_directory_does_not_show_yet_is_seen_before_anything_is_changed(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    fresh = run_with(tmp_path / "fresh", None, before=[10], automatic=True)
    with stale(fresh.attempts):
        run_store.create_attempt(fresh, Attempt(resume_step=10))
        with pytest.raises(Superseded, match="attempt 3 has taken over"):
            agree_on_start_point(fresh, ALONE, CPU)
    assert run_store.read_attempt(fresh, 2).resume_step is None
    damaged = run_with(tmp_path / "damaged", 20, before=[10, 20, 30])
    truncate(damaged, 30)
    with stale(damaged.attempts):
        first = agree_on_start_point(damaged, ALONE, CPU).checkpoint
        assert first is not None
        run_store.create_attempt(damaged, Attempt(resume_step=20))
        with pytest.raises(Superseded, match="attempt 3 has taken over"):
            load_newest_intact(damaged, ALONE, first, lambda path: path.name, lambda message: None)
    assert folder_names(damaged) == ["step-00000010", "step-00000020", "step-00000030"]
    unbuilt = run_with(tmp_path / "unbuilt", None)
    with stale(unbuilt.attempts):
        run_store.create_attempt(unbuilt, Attempt(resume_step=None))
        with pytest.raises(Superseded, match="attempt 3 has taken over"):
            build_components(RunContext(plan_of(), ALONE, unbuilt, CPU, Composite([])), lambda phase, step: None)


def loaded_on_two_ranks(rank_server: RankServer, folder: Path, *runs: RunDir) -> list[Any]:
    """Return the result for each run; check that both ranks agree."""
    first_rank, second_rank = on_two_ranks(
        rank_server, folder, [(run, 0) for run in runs], [(run, 0) for run in runs], loads=True
    )
    assert first_rank == second_rank
    assert len(first_rank) == len(runs)
    return first_rank


def flip(run: RunDir, step: int, name: str = store.shard_name(0)) -> None:
    """Flip one bit of a file."""
    file = run.checkpoints / store.step_name(step) / name
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


def truncate(run: RunDir, step: int) -> None:
    os.truncate(run.checkpoints / store.step_name(step) / store.shard_name(0), 3)


def folder_names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_resume_refuses_a_missing_checkpoint(rank_server: RankServer, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", 30, before=[10, 20])
    for results in on_two_ranks(rank_server, tmp_path, [(run, 0)], [(run, 0)]):
        assert results[0].startswith("CheckpointError: there is no committed checkpoint of step 30")
        assert "choose one of: 10, 20" in results[0]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(rank_server: RankServer, tmp_path: Path) -> None:
    flipped = run_with(tmp_path / "flipped", 30, before=[10, 20, 30])
    flip(flipped, 30)
    twice = run_with(tmp_path / "twice", 30, before=[10, 20, 30])
    flip(twice, 30)
    flip(twice, 20, STATE)
    # The submitting command already fell back to step 20, which can be opened, without reporting it.
    truncated = run_with(tmp_path / "truncated", 20, before=[10, 20, 30])
    truncate(truncated, 30)
    since = run_with(tmp_path / "since", 30, before=[10, 20, 30])
    (since.checkpoints / store.step_name(30) / MANIFEST).unlink()
    own = run_with(tmp_path / "own", 10, before=[10], own=[20, 30])
    flip(own, 30)
    intact = run_with(tmp_path / "intact", 20, before=[10, 20, 30])
    empty = run_with(tmp_path / "empty", 20, before=[10, 20])
    (empty.checkpoints / store.step_name(30)).mkdir()
    other = run_with(tmp_path / "other", 30, before=[10, 20, 30])
    manifest = (other.checkpoints / store.step_name(10) / MANIFEST).read_bytes()
    (other.checkpoints / store.step_name(30) / MANIFEST).write_bytes(manifest)
    results = loaded_on_two_ranks(rank_server, tmp_path, flipped, twice, truncated, since, own, intact, empty, other)
    assert [step for step, _ in results] == [20, 10, 20, 20, 20, 20, 20, 20]

    def message(step: int, what: str, used: int) -> str:
        set_aside = f"it is set aside as damaged-step-{step:08d}, and training continues from step {used}"
        return f"the checkpoint of step {step} is damaged ({what}); {set_aside}"

    digest = "a checkpoint file is damaged: its digest differs from the manifest's"
    assert results[0][1] == [message(30, f"rank-00000.safetensors: {digest}", 20)]
    assert results[1][1] == [message(20, f"state.json: {digest}", 10), message(30, f"rank-00000.safetensors: {digest}", 10)]
    wrong_size = "rank-00000.safetensors: a checkpoint file has the wrong size (3 bytes instead of 7)"
    assert results[2][1] == [message(30, wrong_size, 20)]
    assert "no readable manifest" in results[3][1][0]
    assert len(results[4][1]) == 1
    assert results[5][1] == []
    assert "no readable manifest" in results[6][1][0]
    assert results[7][1] == [message(30, "step-00000030: a manifest belongs to another step (step 10)", 20)]
    assert folder_names(flipped) == ["damaged-step-00000030", "step-00000010", "step-00000020"]
    assert folder_names(twice) == ["damaged-step-00000020", "damaged-step-00000030", "step-00000010"]
    assert folder_names(truncated) == folder_names(since) == folder_names(empty) == folder_names(other) == folder_names(flipped)
    assert folder_names(own) == ["damaged-step-00000030", "step-00000010", "step-00000020"]
    # The resume step is updated for restarted ranks.
    assert [run_store.read_attempt(run, 2).resume_step for run in (flipped, twice, truncated, since, own)] == [20, 10, 20, 20, 10]
    again = loaded_on_two_ranks(rank_server, tmp_path, flipped, twice, since)
    assert again == [[20, []], [10, []], [20, []]]


def withhold(run: RunDir, step: int, name: str = MANIFEST) -> None:
    """Make reads of the file fail with an error other than 'missing', as if the storage server were down."""
    file = run.checkpoints / store.step_name(step) / name
    file.rename(file.with_name(f"kept-{name}"))
    file.symlink_to(name)


def test_a_checkpoint_that_cannot_be_read_right_now_is_neither_skipped_nor_set_aside(
    rank_server: RankServer, tmp_path: Path
) -> None:
    named = run_with(tmp_path / "named", 30, before=[10, 20, 30])
    withhold(named, 30)
    shard = run_with(tmp_path / "shard", 30, before=[10, 20, 30])
    withhold(shard, 30, store.shard_name(0))
    # Storage was already unavailable at submission.
    later = run_with(tmp_path / "later", 20, before=[10, 20, 30])
    withhold(later, 30)
    own = run_with(tmp_path / "own", 10, before=[10], own=[20, 30])
    withhold(own, 30)
    unnamed = run_with(tmp_path / "unnamed", None, before=[30])
    withhold(unnamed, 30)
    between = run_with(tmp_path / "between", 30, before=[10, 20, 30])
    flip(between, 30)
    withhold(between, 20)
    refused = (named, shard, later, own, unnamed, between)
    pinned = run_with(tmp_path / "pinned", 20, before=[10, 20, 30], pinned=True)
    withhold(pinned, 30)
    before = run_with(tmp_path / "before", 30, before=[10, 20, 30])
    withhold(before, 20)
    stood = [folder_names(run) for run in refused]
    *results, asked_for, newest = loaded_on_two_ranks(rank_server, tmp_path, *refused, pinned, before)
    for error in results:
        assert error.startswith("UnreadableCheckpoint: ")
        assert "cannot be read right now" in error
    assert [folder_names(run) for run in refused] == stood
    assert (asked_for, newest) == ([20, []], [30, []])


def test_without_an_intact_checkpoint_nothing_starts_and_nothing_is_set_aside(rank_server: RankServer, tmp_path: Path) -> None:
    flipped = run_with(tmp_path / "flipped", 20, before=[10, 20])
    flip(flipped, 10)
    flip(flipped, 20)
    unopened = run_with(tmp_path / "unopened", 20, before=[10, 20])
    truncate(unopened, 10)
    truncate(unopened, 20)
    # An automatic continuation found no checkpoint, so it set no resume step.
    unnamed = run_with(tmp_path / "unnamed", None, before=[10, 20])
    truncate(unnamed, 10)
    truncate(unnamed, 20)
    runs = (flipped, unopened, unnamed)
    for run, error in zip(runs, loaded_on_two_ranks(rank_server, tmp_path, *runs), strict=True):
        assert error.startswith("DamagedCheckpoint: no checkpoint of this run is intact")
        assert "step 10: rank-00000.safetensors" in error
        assert "step 20: rank-00000.safetensors" in error
        assert folder_names(run) == ["step-00000010", "step-00000020"]


def test_a_step_that_a_person_asked_for_is_used_or_refused(rank_server: RankServer, tmp_path: Path) -> None:
    flipped = run_with(tmp_path / "flipped", 20, before=[10, 20], pinned=True)
    flip(flipped, 20)
    unopened = run_with(tmp_path / "unopened", 20, before=[10, 20], pinned=True)
    truncate(unopened, 20)
    intact = run_with(tmp_path / "intact", 20, before=[10, 20], own=[30], pinned=True)
    flip(intact, 30)
    *refused, used = loaded_on_two_ranks(rank_server, tmp_path, flipped, unopened, intact)
    for error in refused:
        assert error.startswith("DamagedCheckpoint: the checkpoint of step 20 is damaged")
        assert "name the step to use instead: 10" in error
    assert folder_names(flipped) == folder_names(unopened) == ["step-00000010", "step-00000020"]
    # The user's step takes precedence over the attempt's own checkpoints.
    assert used[0] == 20
    assert folder_names(intact) == ["damaged-step-00000030", "step-00000010", "step-00000020"]


def test_a_superseded_attempt_sets_nothing_aside(rank_server: RankServer, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", 20, before=[10, 20])
    flip(run, 20)
    run_store.create_attempt(run, Attempt(resume_step=20))
    (error,) = loaded_on_two_ranks(rank_server, tmp_path, run)
    assert error.startswith("Superseded: attempt 2 is superseded")
    assert folder_names(run) == ["step-00000010", "step-00000020"]
    assert run_store.read_attempt(run, 2).resume_step == 20


def test_a_checkpoint_that_only_one_node_finds_damaged_stays(rank_server: RankServer, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", 20, before=[10, 20])
    seen = run_with(tmp_path / "seen", 20, before=[10, 20])
    flip(seen, 20)
    first_rank, second_rank = on_two_ranks(rank_server, tmp_path, [(run, 0)], [(seen, 0)], loads=True)
    assert first_rank == second_rank
    assert first_rank[0].startswith("CheckpointError: some ranks find a checkpoint damaged that rank 0 finds intact")
    assert str(run.checkpoints / "step-00000020") in first_rank[0]
    assert folder_names(run) == folder_names(seen) == ["step-00000010", "step-00000020"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose second attempt started automatically after the first."""
    return hand_made.run(tmp_path / "demo", Attempt(None), Attempt(None, automatic=True))


def write_exit(run: RunDir, cause: str, first_failure: dict[str, Any] | None) -> None:
    hand_made.end(run, state="pending", cause=cause, message="rank 3: killed by SIGKILL", first_failure=first_failure)


@pytest.mark.parametrize(
    ("cause", "first_failure", "message"),
    [
        ("infrastructure", KILLED, "rank 3: killed by SIGKILL (log: /run/rank-00003.log); this attempt continues the run"),
        ("bad_node", None, "attempt 1 ended (bad_node): rank 3: killed by SIGKILL; this attempt continues the run"),
        ("resized", None, ""),
    ],
)
def test_an_unreported_end_of_the_previous_attempt_is_reported(
    run: RunDir, cause: str, first_failure: dict[str, Any] | None, message: str
) -> None:
    write_exit(run, cause, first_failure)
    failure = find_previous_failure(run, 2)
    assert (failure is not None) == bool(message)
    assert failure is None or failure.message.endswith(message)
    assert failure is None or not failure.is_recorded
    assert find_previous_failure(run, 1) is None
    append_event(run, 1, "alert", f"the attempt ended ({cause}): rank 3: killed by SIGKILL; runs again")
    again = find_previous_failure(run, 2)
    assert again is None or again.is_recorded


def test_an_end_that_the_ranks_reported_is_not_reported_again(run: RunDir) -> None:
    write_exit(run, "preempted", None)
    failure = find_previous_failure(run, 2)
    assert failure is not None
    assert failure.message.startswith("attempt 1 ended (preempted)")
    hand_made.record(run, 1, "TrainingEnded", state="preempted", reason="preempted", step=1, message="")
    assert find_previous_failure(run, 2) is None


def test_an_attempt_that_a_person_started_gets_no_report(run: RunDir) -> None:
    write_exit(run, "infrastructure", KILLED)
    run_store.write_attempt(run, 2, Attempt(None))
    assert find_previous_failure(run, 2) is None


def test_restarted_ranks_report_the_last_reason(run: RunDir) -> None:
    write_exit(run, "infrastructure", KILLED)
    append_event(run, 1, "alert", "of another attempt", **{RESTART: 1})
    for count, reason in ((1, "the first"), (2, "the second")):
        append_event(run, 2, "alert", reason, **{RESTART: count})
    append_event(run, 2, "alert", "another matter")
    assert find_previous_failure(run, 2) == PreviousFailure("the second", is_recorded=True)


def test_unreported_gpu_faults_are_named(run: RunDir) -> None:
    write_exit(run, "infrastructure", None)
    append_event(run, 2, "alert", "Xid 94 on GPU 1: of another attempt")
    for gpu in range(3):
        append_event(run, 1, "alert", f"Xid 45 on GPU {gpu}: work was taken off the GPU (rank {gpu} on n1)")
    for _ in range(2):
        append_event(run, 1, "alert", "Xid 79 on GPU 3: fallen off the bus (rank 3 on n1)")
    failure = find_previous_failure(run, 2)
    assert failure is not None
    assert failure.message.endswith(
        "this attempt continues the run; GPU faults: Xid 79 on GPU 3: fallen off the bus (rank 3 on n1); Xid 45 on GPU 0: work "
        "was taken off the GPU (rank 0 on n1); Xid 45 on GPU 1: work was taken off the GPU (rank 1 on n1); 1 more"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_unreadable_events_do_not_stop_training(run: RunDir, text: str) -> None:
    (run.attempt(1) / "journal/attempt.jsonl").write_text(text)
    assert find_previous_failure(run, 2) is None
