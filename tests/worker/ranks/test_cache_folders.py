"""Where the home directory cannot be written, caches of libraries go to a folder of this user."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from launcher.worker.ranks.cache_folders import find_writable_caches

ALL = {
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_MODULES_CACHE"),
    *("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A home directory that nobody can write in, root included."""
    file = tmp_path / "home"
    file.write_text("no folder")
    return file


def test_nothing_is_set_where_the_home_directory_can_be_written(tmp_path: Path) -> None:
    assert find_writable_caches({"HOME": str(tmp_path)}) == {}


def test_caches_leave_a_home_directory_that_cannot_be_written(closed: Path, temporary: Path) -> None:
    caches = find_writable_caches({"HOME": str(closed)})
    assert caches.keys() == ALL
    (folder,) = {Path(path).parent for path in caches.values()}
    assert folder.parent == temporary
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert find_writable_caches({"HOME": str(closed)}) == caches, "a later attempt finds what was compiled"


def test_a_folder_that_is_set_is_left_alone(closed: Path, tmp_path: Path) -> None:
    environ = {"HOME": str(closed), "TORCH_EXTENSIONS_DIR": "/mine", "XDG_CACHE_HOME": str(tmp_path)}
    assert find_writable_caches(environ).keys() == ALL - {"TORCH_EXTENSIONS_DIR", "WANDB_CACHE_DIR"}


@pytest.mark.parametrize("mode", [0o777, 0o750])
def test_a_folder_that_others_can_enter_is_not_used(closed: Path, temporary: Path, mode: int) -> None:
    """Another user could have put code there that the ranks would load."""
    theirs = temporary / f"launcher-caches-{os.getuid()}"
    theirs.mkdir()
    theirs.chmod(mode)
    assert not any(path.startswith(f"{theirs}/") for path in find_writable_caches({"HOME": str(closed)}).values())
