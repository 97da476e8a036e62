"""The `checkpoints` command on real run directories, without torch."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import hand_made
import pytest

from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST
from launcher.clusters.detached_process import describe_this_process
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, run_records, run_store
from launcher.runs.run_records import Attempt

LOSSES = {100: 3.0, 150: 1.5, 200: None, 250: 2.0, 300: None, 320: 2.5, 330: None}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with seven checkpoints from two attempts."""
    settings = {**hand_made.SETTINGS, "checkpoint": {"keep_last": 1, "keep_every": 100, "keep_best": 1}}
    made = hand_made.run(hand_made.plan(tmp_path / "runs/saved", settings), Attempt(None), state="failed", attempt=2)
    for step, loss in LOSSES.items():
        hand_made.checkpoint(made, step, loss, attempt=1 + (step > 200))
    return made


def flip(run: RunDir, step: int) -> None:
    (run.checkpoints / store.step_name(step) / store.shard_name(1)).write_bytes(b"y" + b"x" * 999)


def leave_behind(run: RunDir) -> None:
    """Create one leftover of each kind, a thousand bytes each, and a folder that is not the launcher's."""
    names = (".saving-step-00000340-002", ".removing-0123", ".replaced-step-00000100", "aside-step-00000400", "notes")
    for name in (*names, "damaged-step-00000310"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "file").write_bytes(b"z" * 1000)


def steps(run: RunDir) -> list[int]:
    return [checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints)]


Ask = Callable[..., tuple[int, str, str]]
StorageFails = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def ask(run: RunDir, typed: Ask) -> Ask:
    """Run `checkpoints RUN FLAGS`."""
    return partial(typed, "checkpoints", str(run.root))


def cells(text: str) -> dict[str, list[str]]:
    """Return the table's rows by step, each split at spaces."""
    return {words[0]: words for line in text.splitlines() if (words := line.split()) and words[0].isdigit()}


def test_the_table_shows_why_each_checkpoint_is_kept(run: RunDir, ask: Ask) -> None:
    os.utime(run.checkpoints / store.step_name(100) / MANIFEST, (time.time() - 7350,) * 2)
    code, out, _ = ask()
    assert code == 0
    rows = cells(out)
    assert list(rows) == [str(step) for step in LOSSES]
    assert rows["100"] == ["100", "1.95", "KiB", "2h02m", "2", "1", "3.0000", "every", "100", "not", "verified"]
    assert rows["150"][4:8] == ["2", "1", "1.5000", "best"]
    assert rows["250"][4:10] == ["2", "2", "2.0000", "would", "be", "pruned"]
    assert rows["330"][4:8] == ["2", "2", "-", "newest"]
    assert len(steps(run)) == 7


def test_verify_names_each_damaged_file(run: RunDir, ask: Ask) -> None:
    code, out, _ = ask("--verify")
    assert code == 0
    assert all(words[-1] == "intact" for words in cells(out).values())
    flip(run, 150)
    os.truncate(run.checkpoints / store.step_name(200) / store.shard_name(0), 7)
    (run.checkpoints / store.step_name(250) / MANIFEST).unlink()
    (run.checkpoints / store.step_name(335)).mkdir()
    code, out, _ = ask("--verify")
    assert code == 1
    said = {line.split()[0]: line for line in out.splitlines() if line.split() and line.split()[0].isdigit()}
    assert "damaged: rank-00001.safetensors: a checkpoint file is damaged: its digest differs" in said["150"]
    assert "damaged: rank-00000.safetensors: a checkpoint file has the wrong size (7 bytes instead of 1,000)" in said["200"]
    assert "damaged: manifest.json: a checkpoint has no readable manifest" in said["250"]
    assert "damaged: manifest.json" in said["335"]
    # The checkpoint with the lowest loss is damaged, so another one is the best intact checkpoint.
    assert said["320"].split()[7] == "best"
    assert all(said[step].endswith("intact") for step in ("100", "300", "320", "330"))
    assert len(list(run.checkpoints.iterdir())) == 8, "nothing was touched"


def test_prune_removes_outdated_checkpoints_and_leftovers(run: RunDir, ask: Ask) -> None:
    leave_behind(run)
    _, out, _ = ask()
    assert out.count(", 1,000 bytes\n") == 5
    assert "aside-step-00000400: set aside when the run went back" in out
    before = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    code, out, _ = ask("--prune")
    after = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    assert code == 0
    assert steps(run) == [100, 150, 200, 300, 330]
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == {*(store.step_name(step) for step in (100, 150, 200, 300, 330)), "notes"}
    assert "removed  step-00000250: no longer kept" in out
    assert "removed  damaged-step-00000310: set aside as damaged, 1,000 bytes" in out
    assert f"({before - after:,} bytes)" in out
    code, out, _ = ask("--prune", "--json")
    assert json.loads(out)["removed"] == []


def test_prune_keeps_the_newest_intact_checkpoint(run: RunDir, ask: Ask) -> None:
    """The retention rules alone would remove step 320 and keep only the newest checkpoint, which is damaged."""
    flip(run, 330)
    code, out, _ = ask("--prune")
    assert code == 1, "it has found damage"
    assert steps(run) == [100, 150, 200, 300, 320]
    assert store.verify(run.checkpoints / store.step_name(320)) == []
    assert "removed  step-00000330: damaged" in out


def test_prune_without_an_intact_checkpoint_is_refused(run: RunDir, ask: Ask) -> None:
    leave_behind(run)
    for step in LOSSES:
        flip(run, step)
    before = sorted(run.checkpoints.rglob("*"))
    code, _, err = ask("--prune")
    assert code == 2
    assert "no checkpoint of this run is intact, so nothing is removed" in err
    assert sorted(run.checkpoints.rglob("*")) == before


def test_a_checkpoint_of_another_format_is_shown_and_kept(run: RunDir, ask: Ask) -> None:
    manifest = run.checkpoints / store.step_name(250) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    code, out, _ = ask("--prune", "--verify")
    assert code == 0
    assert "unreadable: manifest.json" in out
    assert manifest.is_file()


@pytest.mark.parametrize("name", [MANIFEST, store.shard_name(0)])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_prune_is_refused_while_a_checkpoint_cannot_be_read(
    run: RunDir, ask: Ask, storage_fails: StorageFails, name: str, code: int
) -> None:
    leave_behind(run)
    before = sorted(run.checkpoints.rglob("*"))
    with storage_fails(run.checkpoints / store.step_name(330) / name, code):
        assert cells(ask()[1])["330"][7:11] == ["cannot", "be", "read:", f"{name}:"]
        found, out, _ = ask("--verify")
        assert found == 1
        assert os.strerror(code) in out
        refused, _, err = ask("--prune")
    assert refused == 2
    assert "a checkpoint file cannot be read right now, so nothing is removed" in err
    assert sorted(run.checkpoints.rglob("*")) == before
    assert ask("--prune")[0] == 0
    assert steps(run) == [100, 150, 200, 300, 330]


@pytest.mark.parametrize("state", run_records.RUNNING_STATES)
def test_prune_refuses_a_running_run(run: RunDir, ask: Ask, state: str) -> None:
    run_store.update_status(run, state=state, job=describe_this_process())
    code, _, err = ask("--prune")
    assert code == 2
    assert f"the run is {state}" in err
    assert "cancel" in err
    assert len(steps(run)) == 7
    assert ask("--verify")[0] == 0, "looking is no harm"


@pytest.mark.parametrize(("state", "attempt"), [("running", 2), ("running", 1), ("failed", 2)])
def test_a_save_in_progress_is_not_a_leftover(run: RunDir, ask: Ask, state: str, attempt: int) -> None:
    run_store.create_attempt(run, Attempt(None, automatic=True))
    run_store.update_status(run, state=state, job=describe_this_process())
    saving = store.saving_path(run.checkpoints, 340, attempt)
    saving.mkdir()
    _, out, _ = ask()
    shown = json.loads(ask("--json")[1])["leftovers"]
    if state != "failed" and attempt == 2:
        assert f"a save in progress:\n  {saving.name}: being written, 0 bytes" in out
        assert "--prune" not in out
        assert shown[0]["what"] == "being written"
    else:
        assert f"leftovers, which --prune removes:\n  {saving.name}: unfinished save, 0 bytes" in out
        assert shown[0]["what"] == "unfinished save"


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(
    run: RunDir, ask: Ask, storage_fails: StorageFails, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_behind(run)
    (run.checkpoints / "aside-step-00000400" / "sub").mkdir()
    listed = store.list_checkpoints(run.checkpoints)
    monkeypatch.setattr(store, "list_checkpoints", lambda root: listed)
    atomic_files.remove_directory(run.checkpoints / store.step_name(100))
    with storage_fails(run.checkpoints / "aside-step-00000400" / "file", errno.ENOENT):
        code, out, _ = ask()
    assert code == 0
    assert list(cells(out)) == ["150", "200", "250", "300", "320", "330"]
    assert "aside-step-00000400: set aside when the run went back to an earlier step, 0 bytes" in out
    code, out, _ = ask("--verify")
    assert code == 0, "what is gone is not damaged"


def test_a_replaced_checkpoint_that_cannot_be_read_is_not_a_leftover(run: RunDir, ask: Ask, storage_fails: StorageFails) -> None:
    replaced = run.checkpoints / ".replaced-step-00000150"
    (run.checkpoints / store.step_name(150)).rename(replaced)
    with storage_fails(replaced / MANIFEST, errno.EIO):
        assert "leftovers" not in ask()[1]
        ask("--prune")
    assert store.verify(replaced) == []


def test_prune_is_refused_while_an_attempt_is_started(run: RunDir, ask: Ask) -> None:
    with run_store.start_lock(run):
        code, _, err = ask("--prune")
    assert code == 2
    assert "another command is starting this run" in err
    assert len(steps(run)) == 7


def test_json_contains_the_table(run: RunDir, ask: Ask) -> None:
    leave_behind(run)
    flip(run, 150)
    code, out, _ = ask("--json", "--verify")
    assert code == 1
    shown = json.loads(out)
    by_step = {row["step"]: row for row in shown["checkpoints"]}
    assert by_step[100] == {
        "step": 100,
        "path": str(run.checkpoints / "step-00000100"),
        "bytes": 2000,
        "saved_at": by_step[100]["saved_at"],
        "world_size": 2,
        "attempt": 1,
        "eval_loss": 3.0,
        "kept": ["every 100"],
        "state": "intact",
        "problems": [],
        "eval_set": "held_out",
    }
    assert by_step[150]["state"] == "damaged"
    assert by_step[150]["problems"][0].startswith("rank-00001.safetensors: ")
    assert {left["bytes"] for left in shown["leftovers"]} == {1000}
    assert len(shown["leftovers"]) == 5
    assert shown["freed_bytes"] == 0
