"""Committed checkpoints: their manifests, which of them are kept, and a store on a disk that is really full."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hand_made
import plan_fixtures
import pytest
from unusual_files import small_disk

from launcher.checkpoint import store
from launcher.checkpoint.manifest import (
    HELD_OUT,
    LATER_EVALUATION,
    MANIFEST,
    Checkpoint,
    LaterEvaluation,
    Manifest,
    read_manifest,
    record_evaluation,
)
from launcher.checkpoint.store import Retention, retention_of, retention_reasons, select_outdated
from launcher.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size
from launcher.runs import atomic_files, run_store
from launcher.runs.atomic_files import FileEntry
from launcher.runs.run_records import Attempt

WHOLE = Manifest(
    step=7, world_size=2, plan_digest="d1ge57", attempt=1, eval_loss=1.5, files={"rank-00000.safetensors": FileEntry(3, "ab")}
)
REMOVED = object()
UNEVALUATED = dict.fromkeys((10, 20, 30, 40, 50))
DISK = 2**20
SHARD = b"x" * 300_000


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


def test_a_damaged_newest_checkpoint_is_passed_over_only_if_asked(tmp_path):
    for step in (5, 6, 7):
        committed(tmp_path, step)
    (tmp_path / "step-00000005" / MANIFEST).unlink()
    assert store.get_latest(tmp_path).step == 7
    (tmp_path / "step-00000007" / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint, match="step 7 is damaged") as error:
        store.get_latest(tmp_path)
    assert "the newest intact one is 6" in str(error.value)
    assert store.get_latest(tmp_path, or_older=True).step == 6


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
    assert [left.path.name for left in store.find_leftovers(tmp_path)] == names


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


def test_a_manifest_survives_a_round_trip():
    assert Manifest.from_json(WHOLE.to_json().encode()) == WHOLE


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_non_finite_loss_is_stored_as_null(loss):
    text = Manifest(step=7, world_size=2, plan_digest="d", attempt=1, eval_loss=loss, files={}).to_json()
    assert Manifest.from_json(text.encode()).eval_loss is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", REMOVED),
        ("world_size", "2"),
        ("eval_loss", "low"),
        ("files", []),
        ("files", {"../state.json": {"size": 1, "xxh3_128": "ab"}}),
        ("files", {"state.json": {"size": 1}}),
    ],
)
def test_an_invalid_field_is_refused_by_name(key, value):
    values = json.loads(WHOLE.to_json())
    values = {name: of for name, of in values.items() if name != key} | ({} if value is REMOVED else {key: value})
    with pytest.raises(ValueError, match=key):
        Manifest.from_json(json.dumps(values).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00"])
def test_content_that_is_not_an_object_is_refused(content):
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(content)


def checkpoints(losses: dict[int, float | None]) -> list[Checkpoint]:
    """A checkpoint for each step, with its held-out loss."""
    return [
        Checkpoint(
            Path(f"step-{step:08d}"), Manifest(step=step, world_size=1, plan_digest="d", attempt=1, eval_loss=loss, files={})
        )
        for step, loss in sorted(losses.items())
    ]


def gone(losses: dict[int, float | None], **rules: int) -> list[int]:
    return [checkpoint.step for checkpoint in select_outdated(checkpoints(losses), Retention(**rules))]


@pytest.mark.parametrize(
    ("losses", "rules", "expected"),
    [
        (UNEVALUATED, {"keep_last": 2}, [10, 20, 30]),
        (UNEVALUATED, {"keep_last": 9}, []),
        (UNEVALUATED, {"keep_last": 0}, [10, 20, 30, 40]),
        (UNEVALUATED, {"keep_every": 20}, [10, 30]),
        (UNEVALUATED, {"keep_best": 3}, [10, 20, 30, 40]),
        ({0: None, 5: None, 7: None}, {"keep_every": 5}, []),
        ({10: 2.0, 20: 1.0, 30: None, 40: 3.0}, {"keep_best": 1}, [10, 30]),
        ({10: 2.0, 20: 1.0, 30: None, 40: 3.0}, {"keep_best": 2}, [30]),
        ({10: 1.0, 20: 1.0, 30: 1.0, 40: 2.0}, {"keep_best": 1}, [10, 20]),
        ({10: float("nan"), 20: 5.0, 30: 6.0, 40: float("-inf")}, {"keep_best": 1}, [10, 30]),
        ({10: 1.0, 20: 9.0, 30: 8.0, 40: 7.0, 50: 6.0}, {"keep_last": 2, "keep_every": 20, "keep_best": 1}, [30]),
        ({}, {"keep_last": 2, "keep_best": 1}, []),
    ],
)
def test_checkpoints_that_no_rule_keeps_are_outdated(losses, rules, expected):
    assert gone(losses, **rules) == expected


def test_each_rule_names_the_steps_that_it_keeps():
    found = checkpoints({100: 1.0, 150: 2.0, 200: None, 250: 3.0})
    kept = retention_reasons(found, Retention(keep_last=1, keep_every=100, keep_best=1))
    assert kept == {100: ("every 100", "best"), 150: (), 200: ("every 100",), 250: ("newest",)}


def test_only_losses_of_the_chosen_set_are_compared() -> None:
    made = checkpoints({10: 3.0, 20: 1.0, 30: 2.0})
    of_other = [replace(one, manifest=replace(one.manifest, eval_set="general")) for one in made[1:2]]
    mixed = [made[0], *of_other, made[2]]
    steps = [one.step for one in mixed]
    assert retention_reasons(mixed, Retention(keep_last=1, keep_best=1))[steps[2]] == ("newest", "best")
    kept = retention_reasons(mixed, Retention(keep_last=1, keep_best=1, best_set="general"))
    assert kept == {steps[0]: (), steps[1]: ("best",), steps[2]: ("newest",)}


def test_losses_on_other_rows_count_only_where_too_few_are_on_these_rows() -> None:
    made = checkpoints({10: 1.0, 20: 4.0, 30: 3.0, 40: 5.0})
    before = replace(made[0], manifest=replace(made[0].manifest, plan_digest="earlier"))
    rules = Retention(keep_last=1, keep_best=1, rows="these", other_rows=frozenset({"earlier"}))
    assert retention_reasons([before, *made[1:]], rules) == {10: (), 20: (), 30: ("best",), 40: ("newest",)}
    unevaluated = checkpoints({40: None})
    assert retention_reasons([before, *unevaluated], rules) == {10: ("best",), 40: ("newest",)}, "nothing better is known"
    assert retention_reasons([before, *made[1:]], replace(rules, keep_best=4))[10] == ("best",)


@pytest.mark.parametrize(("rows", "is_best"), [("these", True), ("others", False), ("", False)])
def test_a_later_evaluation_names_its_rows(rows: str, is_best: bool) -> None:
    made = checkpoints({10: None, 20: 4.0})
    manifest = replace(made[0].manifest, plan_digest="earlier")
    later = replace(made[0], manifest=manifest, later_evaluation=LaterEvaluation(HELD_OUT, 2.0, rows))
    rules = Retention(keep_last=1, keep_best=1, rows="these", other_rows=frozenset({"earlier"}))
    assert ("best" in retention_reasons([later, made[1]], rules)[10]) is is_best


def test_the_plans_of_a_run_say_which_losses_are_on_other_rows(tmp_path: Path) -> None:
    def plan_with(digest: str, **settings: object) -> LaunchPlan:
        values = {**hand_made.SETTINGS, "checkpoint": {"keep_best": 1, **settings}}
        return hand_made.plan(tmp_path / "a", values, data=plan_fixtures.DATA.model_copy(update={"digest": digest}))

    # The first part is the digest of the training rows.
    first, same, other = plan_with("a-1"), plan_with("b-1", keep_last=3), plan_with("a-2")
    run = run_store.create(first)
    for plan in (same, other):
        run_store.write_plan(run, run_store.create_attempt(run, Attempt(resume_step=4)), plan)
    assert (retention_of(run, first).rows, retention_of(run, first).other_rows) == ("1", {other.digest()})
    assert retention_of(run, other).other_rows == {first.digest(), same.digest()}
    assert retention_of(run, plan_with("a-2", keep_best=0)).other_rows == frozenset()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The checkpoints folder of a run on a disk of 1 MiB."""
    with small_disk(tmp_path, str(DISK)):
        yield tmp_path / "checkpoints"


def save(root: Path, step: int, shard: bytes = SHARD, needed_bytes: int = 1) -> Path:
    return hand_made.checkpoint(root, step, files={store.shard_name(0): shard}, needed_bytes=needed_bytes)


def fill(root: Path) -> Path:
    """Fill the disk completely."""
    path = root / "filler"
    with pytest.raises(OSError, match="No space left"):
        path.write_bytes(b"0" * DISK)
    return path


def test_a_full_disk_names_the_shard_and_keeps_earlier_checkpoints(root: Path) -> None:
    first = save(root, 1)
    with pytest.raises(OSError, match="No space left") as error:
        save(root, 2, b"x" * DISK)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename.endswith(".saving-step-00000002-001/rank-00000.safetensors")
    assert store.get_latest(root).path == first
    assert store.verify(first) == []
    # The next save removes what the failed one wrote.
    assert store.verify(save(root, 3)) == []
    assert [checkpoint.step for checkpoint in store.list_checkpoints(root)] == [1, 3]


def test_a_full_disk_during_the_manifest_commits_nothing(root: Path) -> None:
    first = save(root, 1)
    saving = store.begin_save(root, step=2, attempt=1, needed_bytes=1)
    files = {store.shard_name(0): atomic_files.write_file(saving / store.shard_name(0), [SHARD])}
    filler = fill(root)
    with pytest.raises(OSError, match="No space left"):
        store.commit(saving, Manifest(step=2, world_size=1, plan_digest="d", attempt=1, files=files))
    assert [checkpoint.path for checkpoint in store.list_checkpoints(root)] == [first]
    filler.unlink()
    assert store.verify(save(root, 2)) == []


def test_checkpoints_to_be_pruned_do_not_count_as_free_space(root: Path) -> None:
    """The disk holds three shards: beside two, one of twice the size does not fit, although one will be pruned."""
    save(root, 1)
    save(root, 2)
    with pytest.raises(CheckpointError) as error:
        save(root, 3, SHARD * 2, needed_bytes=len(SHARD) * 2)
    (problem,) = error.value.problems
    available = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    assert f"needed 585.94 KiB, available {format_size(available)}" in problem.value
    assert f"free {format_size(600_000 - available)}" in problem.remedy
    assert store.prune(root, store.Retention(1)) == [root / "step-00000001"]
    assert store.verify(save(root, 3, SHARD * 2, needed_bytes=len(SHARD) * 2)) == []


def test_a_read_only_disk_is_readable(root: Path) -> None:
    first = save(root, 1)
    subprocess.run(["mount", "-o", "remount,ro", root.parent], check=True, capture_output=True, timeout=10)
    with pytest.raises(OSError, match="Read-only file system"):
        save(root, 2)
    assert store.get_latest(root).path == first
    assert store.verify(first, threads=2) == []
