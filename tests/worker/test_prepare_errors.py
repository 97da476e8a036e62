"""If storage refuses a file while a run is prepared, the user sees an error instead of a traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, DataError
from launcher.model_folders import _download, hub_reason
from launcher.worker.prepare import _find_storage_error


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=["full", "read-only", "closed"])
def test_a_cache_that_cannot_be_written_is_named(cache: Path, number: int) -> None:
    for folder in (cache / "models", cache.parent):
        found = _find_storage_error(OSError(number, os.strerror(number), str(folder)))
        assert isinstance(found, DataError)
        assert found.problems[0].message == f"the launcher's cache cannot be used: {os.strerror(number)}"
        assert "set LAUNCHER_CACHE to a folder on another disk" in found.problems[0].remedy


def test_another_file_is_named() -> None:
    found = _find_storage_error(PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl"))
    assert found is not None
    assert (found.problems[0].message, found.problems[0].where) == (
        "a file cannot be used: Permission denied",
        "/data/rows.jsonl",
    )


@pytest.mark.parametrize("error", [ValueError("no"), OSError("the model has no file named config.json")])
def test_other_exceptions_keep_their_traceback(error: Exception) -> None:
    assert _find_storage_error(error) is None


def test_a_hub_that_cannot_be_reached_is_told_from_a_client_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        _download("owner/name", ModelSection(path="owner/name"))
    assert caught.value.problems[0].message == "owner/name cannot be fetched from the hub: the Hub cannot be reached"
    assert hub_reason(KeyError("x")) == "the Hub's client failed (KeyError)"
