"""What reaches a mirror, in which order, and what failures leave there."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
from mirror_tools import begun, commit, elsewhere, finished_files, hooked, make_run, send_all, steps_in, tree

from launcher import atomic_files, json_records, run_records, run_store
from launcher.checkpoint import remote_folder, store
from launcher.checkpoint.manifest import HELD_OUT, LaterEvaluation, record_evaluation
from launcher.checkpoint.mirror import CheckpointGone, MirrorTaken, require_usable_mirror
from launcher.checkpoint.remote_folder import RemoteFolder
from launcher.errors import CheckpointError, SubmitError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, OutcomeRecord


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def place(tmp_path: Path) -> tuple[LaunchPlan, RunDir, Path]:
    """A run and the folder that is its mirror."""
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror")
    return plan, run, tmp_path / "mirror" / "a"


def test_the_oldest_checkpoint_is_sent_first_and_its_manifest_last(place) -> None:
    plan, run, folder = place
    run.metrics.write_text('{"trainer/step": 5}\n')
    for step in (10, 5, 15):
        commit(run, step)
    with finished_files() as finished:
        mirror = begun(plan, run)
        assert send_all(mirror) == sum(e.size for c in store.list_checkpoints(run.checkpoints) for e in c.manifest.files.values())
    names = [str(Path(path).relative_to(folder)) for path in finished]
    assert names.index("run.json") > max(names.index(n) for n in ("code.zip", "plan.json", "attempts/001/attempt.json"))
    # A complete checkpoint has its metrics in the mirror.
    assert names.index("metrics.jsonl") < names.index("checkpoints/step-00000005/manifest.json")
    for step in (5, 10, 15):
        own = [n.rpartition("/")[2] for n in names if f"step-{step:08d}/" in n]
        assert own[-1] == "manifest.json"
        assert set(own) == {"manifest.json", *store.list_checkpoints(run.checkpoints)[0].manifest.files}
    manifests = [n for n in names if n.endswith("manifest.json")]
    assert manifests == [f"checkpoints/step-{step:08d}/manifest.json" for step in (5, 10, 15)]
    assert tree(folder / "checkpoints") == tree(run.checkpoints)
    # A tokenizer's files are uploaded; weights are not.
    assert sorted(p.name for p in (folder / "tokenizer").iterdir()) == ["config.json", "tokenizer.json"]
    with finished_files() as finished:
        assert send_all(begun(plan, run)) == 0
    assert not [path for path in finished if "checkpoints" in path], "no checkpoint that is there is sent again"


def test_the_mirror_has_the_final_state_that_the_agent_has_not_written_yet(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    outcome = OutcomeRecord(state="completed", reason="completed", step=20, message="20 steps", checkpoint="")
    json_records.write(run_records.outcome_file(run, 1), outcome)
    mirror.send_progress()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("completed", 20, "20 steps")
    assert run_store.read_status(run).state == "running"


@pytest.mark.rest
def test_an_upload_that_was_killed_at_any_point_is_completed_by_another_process(place) -> None:
    """The upload is killed at every write, rename and removal of a whole round."""
    plan, run, folder = place
    commit(run, 5)
    commit(run, 10)
    killed_at, code = 0, 9
    while code:
        shutil.rmtree(folder, ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            left = [killed_at]

            def die(what: str, path: str, left: list[int] = left) -> None:
                left[0] -= what != "read"
                if left[0] < 0:
                    os._exit(9)

            with hooked(die):
                send_all(begun(plan, run))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        for step in steps_in(folder):
            name = store.step_name(step)
            assert tree(folder / "checkpoints" / name) == tree(run.checkpoints / name), "what has a manifest is whole"
        send_all(begun(plan, run))
        assert tree(folder / "checkpoints") == tree(run.checkpoints)
        killed_at += 1
    assert killed_at > 20


@pytest.mark.parametrize("is_read_later", [False, True])
def test_a_checkpoint_removed_during_its_upload_leaves_nothing(place, is_read_later: bool) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    old = commit(run, 5)

    def prune(what: str, path: str) -> None:
        if what == "finish" and path.endswith("rank-00000.safetensors") and old.path.exists():
            atomic_files.remove_directory(old.path)
            if is_read_later:
                # The error of a network file system when a file is removed during a read.
                raise PermissionError("stale file handle")

    with hooked(prune), pytest.raises(CheckpointGone):
        mirror.send(old)
    assert not (folder / "checkpoints" / old.path.name).exists()
    commit(run, 10)
    send_all(mirror)
    assert steps_in(folder) == [10]


def test_the_mirror_keeps_the_checkpoints_that_retention_keeps(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    commit(run, 5)
    send_all(mirror)
    commit(run, 10)
    store.prune(run.checkpoints, store.Retention(1))
    assert mirror.prune() == []
    assert steps_in(folder) == [5], "until a later one is there"

    def fail(what: str, path: str) -> None:
        if path.endswith("manifest.json") and what == "write":
            raise PermissionError(path)

    with hooked(fail), pytest.raises(PermissionError):
        send_all(mirror)
    mirror.prune()
    assert steps_in(folder) == [5]
    send_all(mirror)
    assert steps_in(folder) == [10]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_checkpoint_damaged_here_stays_after_later_checkpoints(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    broken = commit(run, 5)
    send_all(mirror)
    os.truncate(broken.path / "state.json", 1)
    commit(run, 10)
    send_all(mirror)
    assert steps_in(folder) == [5, 10]


def test_retention_applies_to_checkpoints_that_only_the_mirror_has(tmp_path: Path) -> None:
    settings = ("checkpoint.keep_last=2", "checkpoint.keep_every=10", "checkpoint.keep_best=1")
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=settings)
    folder = tmp_path / "mirror" / "a"
    for step, loss in ((5, 1.0), (10, 2.0), (15, 2.0), (22, 3.0), (25, 2.0)):
        commit(run, step, loss=loss)
    send_all(begun(plan, run))
    moved = elsewhere(tmp_path, run, 25)
    mirror = begun(plan, moved, attempt=2)
    assert mirror.prune() == [15]
    assert steps_in(folder) == [5, 10, 22, 25]
    commit(moved, 30, attempt=2)
    send_all(mirror)
    assert steps_in(folder) == [5, 10, 25, 30], "22 is none of the last two any more"


def test_going_back_on_another_machine_removes_later_checkpoints_from_the_mirror(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=["checkpoint.keep_last=9"])
    folder = tmp_path / "mirror" / "a"
    for step in (5, 10, 15):
        commit(run, step)
    send_all(begun(plan, run))
    moved = elsewhere(tmp_path, run, 5, pinned=True)
    own = commit(moved, 15, b"of attempt 2", attempt=2)
    assert begun(plan, moved, attempt=2).prune() == [10]
    mirror = begun(plan, moved, attempt=2)
    send_all(mirror)
    commit(moved, 20, attempt=2)
    send_all(mirror)
    assert steps_in(folder) == [5, 15, 20]
    assert tree(folder / "checkpoints" / "step-00000015") == tree(own.path)
    # A checkpoint that this attempt saved itself stays in the mirror even if it is gone here.
    shutil.rmtree(own.path)
    assert begun(plan, moved, attempt=2).prune() == []


def test_a_resume_from_the_newest_removes_nothing_from_the_mirror(tmp_path: Path) -> None:
    """The run found the later checkpoint damaged here, but the mirror's copy may be intact."""
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror")
    for step in (5, 10):
        commit(run, step)
    send_all(begun(plan, run))
    assert begun(plan, elsewhere(tmp_path, run, 5), attempt=2).prune() == []
    assert steps_in(tmp_path / "mirror" / "a") == [5, 10]


def test_another_checkpoint_of_the_same_step_replaces_the_first(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    commit(run, 5)
    send_all(mirror)
    record_evaluation(run.checkpoints / "step-00000005", LaterEvaluation(HELD_OUT, 1.0))
    mirror.send_evaluations()
    shutil.rmtree(run.checkpoints / "step-00000005")
    other = commit(run, 5, b"other weights", attempt=2)

    def fail(what: str, path: str) -> None:
        if what == "write" and path.endswith("rank-00001.safetensors"):
            raise PermissionError(path)

    with hooked(fail), pytest.raises(PermissionError):
        send_all(mirror)
    assert steps_in(folder) == [], "files of two checkpoints are none"
    send_all(begun(plan, run))
    assert tree(folder / "checkpoints" / "step-00000005") == tree(other.path)


def test_a_damaged_file_is_not_committed_in_the_mirror(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    broken = commit(run, 5)
    file = broken.path / store.shard_name(1)
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        mirror.send(broken)
    assert steps_in(folder) == []


def test_a_mirror_belongs_to_one_run_and_its_newest_attempt(place, tmp_path: Path) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    other_plan, other = make_run(tmp_path / "other", plan.config.checkpoint.mirror or "", created_at="2026-02-01T00:00:00Z")
    with pytest.raises(MirrorTaken, match="another run"):
        begun(other_plan, other)
    with pytest.raises(SubmitError, match="another run"):
        require_usable_mirror(other_plan)
    require_usable_mirror(plan)
    # The run continues elsewhere while this machine still runs it.
    shutil.copytree(run.root, tmp_path / "elsewhere")
    moved = RunDir(tmp_path / "elsewhere")
    run_store.create_attempt(moved, Attempt(resume_step=None))
    later = begun(plan, moved, attempt=2)
    assert [(folder / f"attempts/{number:03d}/attempt.json").is_file() for number in (1, 2)] == [True, True]
    with pytest.raises(MirrorTaken, match="attempt 2"):
        mirror.send(commit(run, 5))
    with pytest.raises(MirrorTaken, match="attempt 2"):
        begun(plan, run)
    commit(moved, 5, b"of attempt 2")
    send_all(later)
    assert tree(folder / "checkpoints") == tree(moved.checkpoints)
    run_store.create_attempt(moved, Attempt(resume_step=None))
    with pytest.raises(Superseded):
        later.send(commit(moved, 10))


def test_large_files_are_sent_block_by_block(place, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    monkeypatch.setattr(remote_folder, "_BLOCK_BYTES", 2**20)
    large = commit(run, 5, bytes(48 * 2**20), num_ranks=2)
    tracemalloc.start()
    mirror.send(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert (
        atomic_files.digest_file(folder / "checkpoints/step-00000005" / store.shard_name(0))
        == large.manifest.files["rank-00000.safetensors"]
    )


def test_a_file_in_the_mirror_is_replaced_atomically(tmp_path: Path) -> None:
    place = RemoteFolder(f"faulty://{tmp_path}")
    place.write("file", b"old")
    seen = []
    with hooked(lambda what, path: seen.append(Path(path).read_bytes()) if what == "finish" else None):
        place.write("file", b"new")
    assert (seen, place.read("file")) == ([b"old"], b"new")
    assert place.names() == ["file"]


def test_the_address_is_checked_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SubmitError, match="NotADirectoryError"):
        remote_folder.require_writable(f"file://{tmp_path}/file/runs")
    with pytest.raises(SubmitError, match="nowhere"):
        remote_folder.require_writable("nowhere://runs")
    with pytest.raises(SubmitError, match="adlfs"):
        remote_folder.require_writable("abfs://container/runs")
    remote_folder.require_writable(f"file://{tmp_path}/runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_loss_that_was_computed_after_the_save_counts_where_only_the_mirror_has_the_checkpoint(tmp_path: Path) -> None:
    settings = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=settings)
    folder = tmp_path / "mirror" / "a"
    for step, loss in ((5, 2.0), (10, None), (15, 3.0)):
        commit(run, step, loss=loss)
    mirror = begun(plan, run)
    # Saved without a loss, as when a preemption skips the evaluation.
    later = run.checkpoints / store.step_name(10)
    assert record_evaluation(later, LaterEvaluation(HELD_OUT, 1.0))
    for checkpoint in mirror.behind():
        mirror.send(checkpoint)
    for _ in range(2):
        with finished_files() as names:
            mirror.send_evaluations()
    assert names == [], "it is sent once"
    assert tree(folder / "checkpoints" / later.name) == tree(later)
    # The next machine has fetched only the newest checkpoint.
    assert begun(plan, elsewhere(tmp_path, run, 15), attempt=2).prune() == [5]
    assert steps_in(folder) == [10, 15]
