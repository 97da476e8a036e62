"""How the outcomes of saves are reported to the trackers."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hand_made import checkpoint

from launcher.checkpoint.saver import Saved
from launcher.checkpoint.store import open_checkpoint
from launcher.errors import CheckpointError
from launcher.plan.run_dir import RunDir
from launcher.tracking.progress import Pace
from launcher.train.checkpointer import Checkpointer

GIB = 2**30


class FakeSaver:
    """Ends each save with `outcome`. If `is_saving` is False, the save ends before `save` returns."""

    def __init__(self, outcome: Saved | CheckpointError, is_saving: bool = True) -> None:
        self.is_saving = is_saving
        self.outcome: Saved | CheckpointError | None = None
        self._next = outcome
        self.wait_for_staging = self.close = lambda: None
        self.drain = lambda seconds: None

    def save(self, step: int, state: Mapping[str, Any], eval_loss: float | None, **more: Any) -> None:
        self.outcome = self._next

    def wait(self) -> Saved | CheckpointError | None:
        outcome, self.outcome = self.outcome, None
        return outcome


class FakeTracker:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.events: list[tuple[str, str]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged |= metrics

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self.events.append((kind, text))


def no_beat(phase: str, step: int) -> None:
    """Do nothing."""


def saved(tmp_path: Path, **more: Any) -> Saved:
    return Saved(step=5, path=tmp_path / "step-5", seconds=2.0, stall_s=0.1, bytes=4 * GIB, **more)


@pytest.mark.parametrize("free_gib, alerts", [(3, 1), (5, 0)])
def test_a_disk_without_room_for_the_next_checkpoint_raises_an_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int, alerts: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gib * GIB))
    tracker = FakeTracker()
    checkpointer = Checkpointer(FakeSaver(saved(tmp_path)), tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    assert tracker.logged["ckpt/disk_free_gib"] == free_gib
    assert checkpointer.saved_step == 5
    texts = [text for kind, text in tracker.events if kind == "alert"]
    assert len(texts) == alerts
    assert not texts or texts[0].endswith("3.00 GiB are free, and it needs 4.00 GiB")


def test_the_last_checkpoint_of_a_run_needs_no_room_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * GIB))
    tracker = FakeTracker()
    checkpointer = Checkpointer(FakeSaver(saved(tmp_path)), tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save_and_wait(5, {}, None, {}, is_run_complete=True)
    assert [kind for kind, _ in tracker.events] == ["checkpoint"]


def test_training_goes_on_where_free_space_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", stale)
    tracker = FakeTracker()
    checkpointer = Checkpointer(FakeSaver(saved(tmp_path)), tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    assert tracker.logged["ckpt/last_step"] == 5
    assert "ckpt/disk_free_gib" not in tracker.logged
    assert [kind for kind, _ in tracker.events] == ["checkpoint"]


def test_a_failed_save_raises_one_alert(tmp_path: Path) -> None:
    tracker = FakeTracker()
    checkpointer = Checkpointer(FakeSaver(CheckpointError("the disk is full", where="/runs")), tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    checkpointer.wait(6)
    assert tracker.events == [("alert", "step 5 was not saved: the disk is full (/runs)")]
    assert checkpointer.saved_step is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_outcome_of_a_blocking_save_is_reported_at_once(tmp_path: Path, fails: bool) -> None:
    """A save may fail on a full disk, or block for lack of memory for a background save; the next may be hours away."""
    tracker = FakeTracker()
    saver = FakeSaver(CheckpointError("the disk is full", where="/runs") if fails else saved(tmp_path), is_saving=False)
    checkpointer = Checkpointer(saver, tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    assert [kind for kind, _ in tracker.events if kind != "alert" or fails] == ["alert" if fails else "checkpoint"]
    assert checkpointer.stall_s == (0 if fails else 0.1)


def test_waiting_for_a_save_is_announced_before(tmp_path: Path) -> None:
    """The saving phase has its own time limit; in the training phase, the watchdog would report the wait as a hang."""
    texts: list[str] = []
    saver = FakeSaver(saved(tmp_path))
    saver.wait = lambda: texts.append("waits")  # type: ignore[method-assign, assignment, return-value]
    Checkpointer(saver, FakeTracker(), True, lambda phase, step: texts.append(f"{phase} {step}")).wait(7)  # type: ignore[arg-type]
    assert texts == ["saving 7", "waits"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_loss_that_was_computed_after_the_save_is_recorded_once(tmp_path: Path, is_there: bool) -> None:
    tracker = FakeTracker()
    checkpointer = Checkpointer(FakeSaver(saved(tmp_path)), tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.saved_step = 5
    path = checkpoint(RunDir(tmp_path), 5, None, attempt=1) if is_there else tmp_path / "step-5"
    checkpointer.record_evaluation(path, 1.5)
    ((kind, text),) = tracker.events
    assert kind == ("checkpoint" if is_there else "alert")
    assert text.startswith("evaluated " if is_there else "the loss of a checkpoint could not be recorded: ")
    assert not is_there or open_checkpoint(path).eval_loss == 1.5


def test_a_long_save_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.train.checkpointer.Pace", lambda: Pace(first_s=0.0))
    tracker, saver = FakeTracker(), FakeSaver(saved(tmp_path))
    wait = saver.wait
    saver.wait = lambda: [time.sleep(1.5), wait()][1]  # type: ignore[method-assign]
    checkpointer = Checkpointer(saver, tracker, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    assert any(kind == "progress" and text.startswith("saving step 5: ") for kind, text in tracker.events)
