"""Files and directories are complete or absent after a crash."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from launcher import atomic_files


def test_a_failed_write_leaves_the_previous_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    atomic_files.write_json(file, {"step": 1})

    def no_space(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="No space"):
            atomic_files.write_json(file, {"step": 2})
    assert json.loads(file.read_text()) == {"step": 1}
    with pytest.raises(TypeError):
        atomic_files.write_json(file, {"step": object()})
    assert json.loads(file.read_text()) == {"step": 1}
    atomic_files.write_json(file, {"step": 3})
    assert json.loads(file.read_text()) == {"step": 3}
    assert list(tmp_path.iterdir()) == [file]


def test_file_and_directory_are_fsynced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_files.write_text(tmp_path / "file", "text")
    assert calls == ["fsync file", "replace", "fsync directory"]


def test_permissions_are_those_asked_for(tmp_path: Path) -> None:
    atomic_files.write_bytes(tmp_path / "private", b"rows", mode=0o600)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    (tmp_path / "plain").write_bytes(b"")
    atomic_files.write_bytes(tmp_path / "public", b"")
    assert (tmp_path / "public").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_rename_refuses_a_directory_with_content(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        atomic_files.rename(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/file").read_text() == "target"


def test_replace_directory_removes_the_previous_one(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    atomic_files.replace_directory(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/file").read_text() == "source"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
