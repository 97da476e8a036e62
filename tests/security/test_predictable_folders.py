"""Folders and files with predictable names are created for this user alone, or refused if another user was first."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from missing_program import skip_or_fail
from testbed_cluster import Testbed, TestbedError

from launcher.cli.pages import html_page
from launcher.errors import ConfigError
from launcher.security.folders import make_private_folder

MALLORY, USER = 54321, 54322


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp. The test runs as a user other than root, and another user may have been there first."""
    if os.geteuid() != 0:
        skip_or_fail("only root can act as other users: run pytest as root")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


def as_user(uid: int) -> None:
    os.seteuid(0)
    os.seteuid(uid)


def test_the_folder_for_states_is_private_and_empty(shared: Path) -> None:
    folder = shared / "run-0123"
    as_user(USER)
    for _ in range(2):
        make_private_folder(folder, "deepspeed.nvme_path")
        assert (mode(folder), list(folder.iterdir()), folder.stat().st_uid) == (0o700, [], USER)
        (folder / "states").write_text("of an earlier attempt")


def test_agents_that_share_a_folder_make_it_at_the_same_time(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each agent removes and creates the folder; the test simulates the other agents' actions at the worst moments."""
    folder, remove, num_removed = shared / "run-0123", shutil.rmtree, 0

    def removed_by_several(path: Path, ignore_errors: bool) -> None:
        nonlocal num_removed
        remove(path, ignore_errors=ignore_errors)
        num_removed += 1
        path.mkdir(mode=0o700)
        if num_removed == 1:
            (path / "states").write_text("of an earlier attempt, in a folder that another agent is about to empty")

    as_user(USER)
    monkeypatch.setattr(shutil, "rmtree", removed_by_several)
    make_private_folder(folder, "deepspeed.nvme_path")
    assert (mode(folder), list(folder.iterdir()), num_removed) == (0o700, [], 2)


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_folder_for_states_that_another_user_made_first_is_refused(shared: Path, kind: str) -> None:
    folder = shared / "run-0123"
    as_user(MALLORY)
    if kind == "folder":
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "states").write_text("of mallory")
    elif kind == "link":
        (shared / "elsewhere").mkdir(mode=0o777)
        folder.symlink_to(shared / "elsewhere")
    else:
        folder.write_text("")
    as_user(USER)
    with pytest.raises(ConfigError) as error:
        make_private_folder(folder, "deepspeed.nvme_path")
    (problem,) = error.value.problems
    assert problem.where == "deepspeed.nvme_path"
    assert f"owner {MALLORY}" in problem.value


def test_the_testbed_uses_no_folder_of_another_user(shared: Path) -> None:
    root = shared / "testbed"
    root.mkdir(mode=0o755)
    os.chown(root, MALLORY, -1)
    (root / "conf").mkdir()
    (root / "conf/testbed.json").write_text("{}")
    with pytest.raises(TestbedError, match=f"owner {MALLORY}"):
        Testbed(root)
    os.chown(root, 0, -1)
    root.chmod(0o777)
    with pytest.raises(TestbedError, match="mode 0777"):
        Testbed(root)
    link = shared / "link"
    link.symlink_to(root)
    with pytest.raises(TestbedError):
        Testbed(link)


def test_a_page_is_for_this_user_alone(shared: Path) -> None:
    page = html_page._POLICY
    file = shared / "data.html"
    as_user(MALLORY)
    html_page.write(file, page)
    file.chmod(0o666)
    as_user(USER)
    with pytest.raises(ConfigError, match="cannot be written"):
        html_page.write(file, page)
    own = shared / "own.html"
    for _ in range(2):
        html_page.write(own, page)
        assert (mode(own), own.stat().st_uid) == (0o600, USER)
        own.chmod(0o644)


@pytest.mark.parametrize("target", ["new", "page"])
def test_a_page_is_not_written_through_a_link_of_another_user(shared: Path, target: str) -> None:
    """Their report.html could link to ~/.ssh/authorized_keys, and lines of the page could be keys."""
    home = shared / "home"
    as_user(USER)
    home.mkdir()
    if target == "page":
        html_page.write(home / "page", html_page._POLICY)
    as_user(MALLORY)
    link, chain, pipe = (shared / name for name in ("report.html", "chain.html", "pipe.html"))
    link.symlink_to(home / target)
    os.mkfifo(pipe, 0o666)
    pipe.chmod(0o666)
    as_user(USER)
    own = home / "own.html"
    own.symlink_to(link)
    chain.symlink_to(link)
    before = sorted(home.iterdir())
    for path in (link, chain, own):
        with pytest.raises(ConfigError, match=f"a link of {MALLORY}"):
            html_page.require_writable_page(path)
        with pytest.raises(ConfigError, match=f"a link of {MALLORY}"):
            html_page.write(path, "ssh-ed25519 AAAA mallory")
    with pytest.raises(ConfigError, match="of another user"):
        html_page.write(pipe, "rows")
    assert sorted(home.iterdir()) == before
    (home / "mine").symlink_to("renamed")
    html_page.write(home / "mine", html_page._POLICY)
    assert (home / "mine").is_symlink()
    assert (home / "renamed").read_text() == html_page._POLICY


def test_a_link_that_replaces_a_page_while_it_is_written_is_not_followed(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user creates the link after the last check, in their own folder that everyone can write to."""
    as_user(MALLORY)
    run = shared / "run"
    run.mkdir()
    run.chmod(0o777)
    as_user(USER)
    key, write_bytes = shared / "authorized_keys", html_page.atomic_files.write_bytes

    def write_after_the_swap(path: Path, content: bytes, mode: int) -> None:
        as_user(MALLORY)
        (run / "report.html").symlink_to(key)
        as_user(USER)
        write_bytes(path, content, mode)

    monkeypatch.setattr(html_page.atomic_files, "write_bytes", write_after_the_swap)
    html_page.write(run / "report.html", "ssh-ed25519 AAAA mallory")
    assert not key.exists()
    assert not (run / "report.html").is_symlink()
