from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import hand_made
import pytest

from launcher import atomic_files
from launcher.checkpoint import store
from launcher.checkpoint.cleanup import find_leftovers
from launcher.checkpoint.manifest import (
    LATER_EVALUATION,
    MANIFEST,
    LaterEvaluation,
    Manifest,
    read_manifest,
    record_evaluation,
)
from launcher.errors import CheckpointError, UnreadableCheckpoint


def committed(root, step, content=b"weights", attempt=1):
    return hand_made.checkpoint(root, step, attempt=attempt, files=dict.fromkeys(hand_made.ONE_RANK, 2 * content))


def steps(root):
    return [c.step for c in store.list_checkpoints(root)]


def test_committed_checkpoints_are_listed_by_step(tmp_path):
    for step in (200, 100, 123456789):
        committed(tmp_path, step)
    assert steps(tmp_path) == [100, 200, 123456789]
    latest = store.get_latest(tmp_path)
    assert latest.path == tmp_path / "step-123456789"
    assert Manifest.from_json(latest.manifest.to_json().encode()) == latest.manifest
    assert latest.manifest.files["state.json"] == atomic_files.digest_file(latest.path / "state.json")
    assert store.get_at_step(tmp_path, 100).step == 100
    with pytest.raises(CheckpointError, match="choose one of: 100, 200, 123456789"):
        store.get_at_step(tmp_path, 150)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000100", "step-00000200", "step-123456789"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no readable manifest"),
        (lambda p: (p / "manifest.json").write_text('{"step": 7'), "manifest is damaged"),
        (lambda p: (p / "state.json").unlink(), "is missing"),
        (lambda p: os.truncate(p / "rank-00000.safetensors", 3), "wrong size"),
        (lambda p: p.rename(p.with_name("step-00000008")), "another step"),
        (
            lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('version": 1', 'version": 9')),
            "format 9; readable: 1",
        ),
        (
            lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace("state.json", "../state.json")),
            "manifest is damaged",
        ),
    ],
)
def test_incomplete_checkpoints_are_not_listed(tmp_path, damage, said):
    path = committed(tmp_path, 7)
    damage(path)
    assert steps(tmp_path) == []
    (damaged,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError, match=said):
        store.open_checkpoint(damaged)
    with pytest.raises(CheckpointError, match=damaged.name):
        store.get_latest(tmp_path)


def test_the_error_without_a_checkpoint_lists_the_directory(tmp_path):
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        store.get_latest(tmp_path / "none")
    with pytest.raises(CheckpointError, match="the folder is empty"):
        store.get_latest(tmp_path)
    store.begin_save(tmp_path, step=4, attempt=1, needed_bytes=1)
    with pytest.raises(CheckpointError, match="saving-step-00000004-001: unfinished save"):
        store.get_latest(tmp_path)


def test_verify_detects_one_flipped_bit(tmp_path):
    path = committed(tmp_path, 7)
    assert store.verify(path) == []
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    assert steps(tmp_path) == [7]
    (problem,) = store.verify(path)
    assert "digest differs" in problem.message
    assert problem.where == str(file)


def test_a_storage_error_does_not_count_as_damage(tmp_path, storage_fails):
    for step in (7, 8):
        committed(tmp_path, step)
    for name, code in itertools.product(("manifest.json", "state.json"), (errno.EIO, errno.ESTALE, errno.EACCES)):
        with storage_fails(tmp_path / "step-00000008" / name, code):
            for read in (store.open_checkpoint, store.verify):
                with pytest.raises(UnreadableCheckpoint, match="cannot be read right now") as error:
                    read(tmp_path / "step-00000008")
                assert os.strerror(code) in str(error.value)
            # The previous checkpoint must not be taken for the newest.
            assert steps(tmp_path) == [7]
            for ask in (lambda: store.get_latest(tmp_path), lambda: store.get_at_step(tmp_path, 8)):
                with pytest.raises(UnreadableCheckpoint):
                    ask()
            assert store.get_at_step(tmp_path, 7).step == 7
    with storage_fails(tmp_path / "step-00000007" / "manifest.json", errno.EIO):
        assert store.get_latest(tmp_path).step == 8
    assert store.verify(store.get_latest(tmp_path).path) == []


def test_going_back_sets_unreadable_later_checkpoints_aside(tmp_path, storage_fails):
    for step in (6, 7, 8):
        committed(tmp_path, step)
    with storage_fails(tmp_path / "step-00000008" / "manifest.json", errno.EIO):
        aside = store.set_aside_after(tmp_path, 6)
    assert aside == [tmp_path / "aside-step-00000007", tmp_path / "aside-step-00000008"]
    assert store.get_latest(tmp_path).step == 6


def test_files_of_another_user_are_reported(tmp_path, monkeypatch):
    checkpoint = store.open_checkpoint(committed(tmp_path, 7))
    assert store.find_foreign_files(checkpoint.path, checkpoint.manifest) == []
    if os.geteuid() == 0:
        os.chown(checkpoint.path / "state.json", 12345, -1)
        foreign = 1
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        foreign = 3
    problems = store.find_foreign_files(checkpoint.path, checkpoint.manifest)
    assert len(problems) == foreign
    assert "belongs to another user" in problems[0].message


def test_a_save_does_not_make_a_run_directory_that_was_moved(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.begin_save(tmp_path / "moved" / "checkpoints", step=5, attempt=1, needed_bytes=1)
    assert not (tmp_path / "moved").exists()


def test_a_second_commit_of_a_step_replaces_the_first(tmp_path):
    committed(tmp_path, 7, b"old")
    committed(tmp_path, 7, b"new", attempt=2)
    (only,) = store.list_checkpoints(tmp_path)
    assert (only.path / "state.json").read_bytes() == b"newnew"
    assert only.manifest.attempt == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("survives", [1, 2])
def test_a_crash_while_a_step_is_replaced_loses_nothing(tmp_path, monkeypatch, survives):
    """The process dies at its first or second directory rename; afterwards the old or the new checkpoint is found."""
    committed(tmp_path, 7, b"old")
    rename, calls = os.rename, []

    def dying_rename(source, target):
        calls.append(target)
        if len(calls) > survives:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", dying_rename)
    with pytest.raises(KeyboardInterrupt):
        committed(tmp_path, 7, b"new", attempt=2)
    monkeypatch.undo()
    found = store.get_latest(tmp_path)
    assert found.step == 7
    assert (found.path / "state.json").read_bytes() == {1: b"oldold", 2: b"newnew"}[survives]
    assert store.verify(found.path) == []
    committed(tmp_path, 7, b"newer", attempt=3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    assert (store.get_latest(tmp_path).path / "state.json").read_bytes() == b"newernewer"


def test_a_damaged_step_does_not_block_the_one_it_replaced(tmp_path):
    path = committed(tmp_path, 7, b"old")
    path.rename(tmp_path / ".replaced-step-00000007")
    committed(tmp_path, 8)
    damaged = committed(tmp_path, 9)
    damaged.rename(tmp_path / "step-00000007")
    assert steps(tmp_path) == [7, 8]
    committed(tmp_path, 7, b"new")
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000007", "step-00000008"}
    assert (store.get_at_step(tmp_path, 7).path / "state.json").read_bytes() == b"newnew"


@pytest.mark.parametrize("prefix", [store.SET_ASIDE_PREFIX, store.DAMAGED_PREFIX])
def test_a_step_set_aside_again_gets_a_free_name(tmp_path, monkeypatch, prefix):
    names = [f"{prefix}step-00000007{end}" for end in ("", "-2", "-3")]
    rename, renamed = os.rename, []

    def counted(source, target):
        renamed.append(target)
        rename(source, target)

    for content, name in zip((b"first", b"second", b"third"), names, strict=True):
        path = committed(tmp_path, 7, content)
        monkeypatch.setattr(os, "rename", counted)
        assert store.set_aside(path, prefix) == tmp_path / name
        monkeypatch.undo()
    assert len(renamed) == 3, "a second rename of the same directory could be missed by a crash"
    assert [(tmp_path / name / "state.json").read_bytes() for name in names] == [b"firstfirst", b"secondsecond", b"thirdthird"]
    assert steps(tmp_path) == []
    assert [left.path.name for left in find_leftovers(tmp_path)] == names


def test_begin_save_removes_leftovers_except_of_later_attempts(tmp_path):
    for step, attempt in ((1, 1), (2, 2), (3, 3)):
        (tmp_path / f".saving-step-{step:08d}-{attempt:03d}").mkdir()
    (tmp_path / ".removing-0123").mkdir()
    (tmp_path / "notes").mkdir()
    store.begin_save(tmp_path, step=2, attempt=2, needed_bytes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".saving-step-00000002-002", ".saving-step-00000003-003", "notes"]


def test_prune_keeps_the_newest_and_the_paths_in_keep(tmp_path):
    for step in (1, 2, 3, 4, 5):
        committed(tmp_path, step)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    removed = store.prune(tmp_path, store.Retention(2), keep=[tmp_path / "step-00000001"])
    assert removed == [tmp_path / "step-00000002"]
    assert steps(tmp_path) == [1, 3, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003", "step-00000004", "step-00000005"]


def test_a_loss_computed_after_the_commit_counts_and_leaves_the_manifest_alone(tmp_path: Path) -> None:
    first, second, last = (committed(tmp_path, step) for step in (2, 4, 6))
    before = (first / MANIFEST).read_bytes()
    rules = store.Retention(keep_last=1, keep_best=1)
    assert record_evaluation(first, LaterEvaluation("held_out", 1.5))
    assert record_evaluation(second, LaterEvaluation("held_out", 1.7))
    assert (first / MANIFEST).read_bytes() == before
    assert not store.verify(first)
    assert [checkpoint.eval_loss for checkpoint in store.list_checkpoints(tmp_path)] == [1.5, 1.7, None]
    assert store.prune(tmp_path, rules) == [second]
    # The evaluation belongs to a set other than `best_set`.
    assert store.prune(tmp_path, store.Retention(keep_last=1, keep_best=1, best_set="other")) == [first]
    (last / LATER_EVALUATION).write_text("[")
    assert store.open_checkpoint(last).eval_loss is None


def test_a_loss_in_the_manifest_is_not_recorded_again(tmp_path: Path) -> None:
    saving = store.begin_save(tmp_path, step=2, attempt=1, needed_bytes=1)
    path = store.commit(saving, Manifest(step=2, world_size=1, plan_digest="d", attempt=1, eval_loss=2.0, files={}))
    assert not record_evaluation(path, LaterEvaluation("held_out", 2.5))
    assert store.open_checkpoint(path).eval_loss == read_manifest(path).eval_loss == 2.0


def test_a_full_disk_is_refused_with_needed_and_available_bytes(tmp_path):
    with pytest.raises(CheckpointError, match=r"needed 931,322,574.62 GiB, available [\d,.]+ GiB"):
        store.begin_save(tmp_path, step=1, attempt=1, needed_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_partition_covers_every_element_once():
    for num_elements in (0, 1, 2, 5, 27, 64):
        for world_size in (1, 2, 3, 8):
            parts = [store.partition(num_elements, world_size, rank) for rank in range(world_size)]
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(num_elements))


def test_the_store_needs_no_torch():
    code = "import sys, launcher.checkpoint.store; print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
