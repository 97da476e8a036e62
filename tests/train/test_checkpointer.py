"""Who is told how a save has ended."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.checkpoint.saver import Saved
from launcher.errors import CheckpointError
from launcher.train.checkpointer import Checkpointer

GIB = 2**30


class Saver:
    """Ends each save as the test says; without `is_saving` before `save` returns."""

    def __init__(self, outcome: Saved | CheckpointError, is_saving: bool = True) -> None:
        self.is_saving = is_saving
        self.outcome: Saved | CheckpointError | None = None
        self._next = outcome
        self.wait_for_staging = self.close = lambda: None
        self.drain = lambda seconds: None

    def save(self, step: int, state: Mapping[str, Any], eval_loss: float | None) -> None:
        self.outcome = self._next

    def wait(self) -> Saved | CheckpointError | None:
        found, self.outcome = self.outcome, None
        return found


class Heard:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.said: list[tuple[str, str]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged |= metrics

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        self.said.append((kind, text))


def no_beat(phase: str, step: int) -> None:
    """Nobody watches."""


def saved(tmp_path: Path, **more: Any) -> Saved:
    return Saved(step=5, path=tmp_path / "step-5", seconds=2.0, stall_s=0.1, bytes=4 * GIB, **more)


@pytest.mark.parametrize("free_gib, alerts", [(3, 1), (5, 0)])
def test_a_disk_without_room_for_the_next_checkpoint_raises_an_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int, alerts: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gib * GIB))
    heard = Heard()
    checkpointer = Checkpointer(Saver(saved(tmp_path)), heard, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    assert heard.logged["ckpt/disk_free_gib"] == free_gib
    assert checkpointer.saved_step == 5
    said = [text for kind, text in heard.said if kind == "alert"]
    assert len(said) == alerts
    assert not said or said[0].endswith("3.00 GiB are free, and it takes 4.00 GiB")


def test_training_goes_on_where_free_space_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", stale)
    heard = Heard()
    checkpointer = Checkpointer(Saver(saved(tmp_path)), heard, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    assert heard.logged["ckpt/last_step"] == 5
    assert "ckpt/disk_free_gib" not in heard.logged
    assert [kind for kind, _ in heard.said] == ["checkpoint"]


def test_a_failed_save_raises_one_alert(tmp_path: Path) -> None:
    heard = Heard()
    checkpointer = Checkpointer(Saver(CheckpointError("the disk is full", where="/runs")), heard, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    checkpointer.wait(5)
    checkpointer.wait(6)
    assert heard.said == [("alert", "step 5 was not saved: the disk is full (/runs)")]
    assert checkpointer.saved_step is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_outcome_of_a_blocking_save_is_reported_at_once(tmp_path: Path, fails: bool) -> None:
    """There is no room for it, or no memory for a copy to save behind training: the next save may be hours away."""
    heard = Heard()
    saver = Saver(CheckpointError("the disk is full", where="/runs") if fails else saved(tmp_path), is_saving=False)
    checkpointer = Checkpointer(saver, heard, True, no_beat)  # type: ignore[arg-type]
    checkpointer.save(5, {}, None)
    assert [kind for kind, _ in heard.said if kind != "alert" or fails] == ["alert" if fails else "checkpoint"]
    assert checkpointer.stall_s == (0 if fails else 0.1)


def test_waiting_for_a_save_is_announced_before(tmp_path: Path) -> None:
    """Saving has a limit of its own; in the phase of training the watchdog would take the wait for a hang."""
    said: list[str] = []
    saver = Saver(saved(tmp_path))
    saver.wait = lambda: said.append("waits")  # type: ignore[method-assign, assignment, return-value]
    Checkpointer(saver, Heard(), True, lambda phase, step: said.append(f"{phase} {step}")).wait(7)  # type: ignore[arg-type]
    assert said == ["saving 7", "waits"]
