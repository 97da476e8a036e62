"""Others exchange folders, files and links in the Hub's cache while huggingface_hub downloads a repository to it."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from file_owners import MALLORY, as_root
from huggingface_hub import _snapshot_download, constants, file_download
from huggingface_hub.utils import _detect_agent

from launcher.security.hub_answers import _REPLACED, write_through_no_links

__all__ = ["as_root"]

COMMIT = "1" * 40


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore huggingface_hub's functions after a test."""
    for name, functions in _REPLACED.items():
        for function in functions:
            module = importlib.import_module(name)
            monkeypatch.setattr(module, function, getattr(module, function))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a folder of this user, outside the cache."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("config.json", "etag"):
        (folder / name).write_text("mine")
    return folder


def exchange(folder: Path, mine: Path) -> None:
    """Put another user's link in place of a folder."""
    folder.rename(folder.with_name("old"))
    folder.symlink_to(mine)
    os.chown(folder, MALLORY, -1, follow_symlinks=False)


def download(blobs: Path, on_request: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(url: str, file: object, **_: object) -> None:
        on_request()
        file.write(b"of the Hub")  # type: ignore[attr-defined]

    monkeypatch.setattr(file_download, "http_get", answer)
    file_download._download_to_tmp_and_move(
        incomplete_path=blobs / "etag.incomplete",
        destination_path=blobs / "etag",
        **{"url_to_download": "", "headers": {}, "expected_size": 10, "filename": "config.json"},
        **{"force_download": True, "etag": "etag", "xet_file_data": None},
    )


@pytest.mark.usefixtures("as_root", "restored")
def test_a_folder_that_is_exchanged_during_a_download_takes_no_file_elsewhere(
    tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_through_no_links()
    blobs = tmp_path / "hub/models--owner--name/blobs"
    blobs.mkdir(parents=True)
    download(blobs, lambda: exchange(blobs, mine), monkeypatch)
    assert (blobs.with_name("old") / "etag").read_text() == "of the Hub"
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"config.json": "mine", "etag": "mine"}
    with pytest.raises(PermissionError, match="the link of another user is not followed"):
        download(blobs, lambda: None, monkeypatch)


@pytest.mark.usefixtures("as_root", "restored")
def test_a_link_to_a_downloaded_file_replaces_none_elsewhere(tmp_path: Path, mine: Path) -> None:
    """The client removes what is at the link's path before it creates the link."""
    write_through_no_links()
    blob, link = (tmp_path / "hub/models--owner--name" / part for part in ("blobs/etag", f"snapshots/{COMMIT}/config.json"))
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_text("of the Hub")
    # A dangling link of an earlier download.
    link.symlink_to("absent")
    file_download._create_symlink(str(blob), str(link), new_blob=True)
    assert os.readlink(link) == "../../blobs/etag"
    exchange(link.parent, mine)
    with pytest.raises(PermissionError, match="the link of another user is not followed"):
        file_download._create_symlink(str(blob), str(link), new_blob=True)
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"config.json": "mine", "etag": "mine"}


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_system_without_links_gets_the_downloaded_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    write_through_no_links()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blob").write_text("of the Hub")
    monkeypatch.setattr(os, "symlink", refuse)
    file_download._create_symlink(str(tmp_path / "blob"), str(tmp_path / "snapshot/config.json"), new_blob=is_new)
    assert (tmp_path / "snapshot/config.json").read_text() == "of the Hub"
    assert [path.name for path in (tmp_path / "snapshot").iterdir()] == ["config.json"]
    assert (tmp_path / "blob").exists() is not is_new


@pytest.mark.usefixtures("as_root", "restored")
def test_links_that_others_put_there_during_a_download_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    mine = tmp_path / "mine/main"
    mine.write_text("mine")
    mine.chmod(0o600)
    os.utime(mine, (0, 0))
    (tmp_path / ".agent_harnesses.json").symlink_to(mine)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / ".agent_harnesses.json"))
    monkeypatch.setattr(_detect_agent, "_fetch_registry", lambda: {"standardEnvVars": ["AGENT"], "harnesses": {}})
    monkeypatch.setattr(_detect_agent, "_registry", None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "chosen"))
    write_through_no_links()
    assert _detect_agent.detect_agent() is None
    assert mine.read_text() == "mine"
    note_commit = file_download._cache_commit_hash_for_specific_revision
    assert note_commit is _snapshot_download._cache_commit_hash_for_specific_revision
    for revision in ("main", "refs/pr/1", COMMIT):
        note_commit(str(tmp_path / "repo"), revision, COMMIT)
    assert (tmp_path / "repo/refs/main").read_text() == (tmp_path / "repo/refs/refs/pr/1").read_text() == COMMIT
    assert not (tmp_path / "repo/refs" / COMMIT).exists()
    (tmp_path / "chosen").symlink_to(tmp_path)
    os.chown(tmp_path / "chosen", MALLORY, -1, follow_symlinks=False)
    note_commit(str(tmp_path / "chosen/repo"), "v1", COMMIT)
    assert (tmp_path / "repo/refs/v1").read_text() == COMMIT, "a link above the cache is the user's choice"
    (tmp_path / "repo/refs").rename(tmp_path / "repo/old")
    (tmp_path / "repo/refs").symlink_to(mine.parent)
    os.chown(tmp_path / "repo/refs", MALLORY, -1, follow_symlinks=False)
    with pytest.raises(PermissionError, match="the link of another user is not followed"):
        note_commit(str(tmp_path / "repo"), "main", COMMIT)
    (tmp_path / "etag.incomplete").symlink_to(mine)
    file_download._chmod_and_move(tmp_path / "etag.incomplete", tmp_path / "etag")
    assert mine.read_text() == "mine"
    assert mine.stat().st_mode & 0o777 == 0o600
    # In a sticky folder of others, their link cannot be replaced.
    for exists in (True, False):
        (tmp_path / "etag").unlink()
        (tmp_path / "etag").symlink_to(mine if exists else tmp_path / "mine/absent")
        (tmp_path / "etag.incomplete").write_text("of the Hub")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            file_download._chmod_and_move(tmp_path / "etag.incomplete", tmp_path / "etag")
        assert not (tmp_path / "etag").is_symlink()
        assert (tmp_path / "etag").read_text() == "of the Hub"
    assert mine.read_text() == "mine"
    assert [path.name for path in mine.parent.iterdir()] == ["main"]


def refuse(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
