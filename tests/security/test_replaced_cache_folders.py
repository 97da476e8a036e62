"""If another user replaces this user's cache folders, or puts links there, nothing in them is removed or written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # noqa: F401
import pytest
from missing_program import skip_or_fail

from launcher.cli import clean, completion
from launcher.cli.cleanup import run_folders
from launcher.cli.cleanup.cache_entries import list_entries
from launcher.cli.main import main
from launcher.errors import DataError
from launcher.security import library_caches
from launcher.security.ownership import require_cache

MALLORY, ALICE = 54321, 54322
LONG_AGO = 1e9


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like /tmp that contains alice's home; the test runs as alice."""
    if os.geteuid() != 0:
        skip_or_fail("only root can act as other users: run pytest as root")
    # Alice may be unable to read Python's folder, so the commands' imports are loaded first.
    completion._build_vocabulary()
    mask = os.umask(0o022)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.chdir(folder)
        home = Path(folder, "home")
        home.mkdir()
        os.chown(home, ALICE, ALICE)
        for variable in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "LAUNCHER_SHARED_CACHE", "LAUNCHER_TRUST_OWNERS"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("LAUNCHER_CACHE", str(home / "cache"))
        os.seteuid(ALICE)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)
            os.umask(mask)


@pytest.fixture
def precious(shared: Path) -> Path:
    """Alice's folder, which contains a folder that looks like a cache entry of any kind."""
    part = shared / "home/precious/cpu_adam"
    part.mkdir(parents=True)
    (part / "build.ninja").touch()
    (part.parent / "list.json").write_text("[]")
    for path in (part / "build.ninja", part, part.parent):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return part.parent


def as_mallory(action: Callable[[], object]) -> None:
    os.seteuid(0)
    os.seteuid(MALLORY)
    action()
    os.seteuid(0)
    os.seteuid(ALICE)


def is_whole(folder: Path) -> bool:
    return (folder / "cpu_adam/build.ninja").is_file() and (folder / "list.json").is_file()


def removed(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert main(["clean", "--yes", "--json", *flags]) == 0
    paths: list[str] = json.loads(capsys.readouterr().out)["removed"]
    return paths


@pytest.mark.parametrize("name", ["data-", "data-team"])
def test_a_link_named_as_the_folder_of_a_group(
    shared: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("LAUNCHER_SHARED_CACHE", str(shared))
    as_mallory(lambda: (shared / name).symlink_to(precious))
    assert removed(capsys, "--shared") == []
    assert is_whole(precious)


def test_a_folder_for_caches_of_nodes_that_another_user_made(
    shared: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared))

    folder = library_caches.node_cache_root()

    def squat() -> None:
        folder.mkdir()
        (folder / "torch_extensions_dir").symlink_to(precious)

    as_mallory(squat)
    assert removed(capsys) == []
    assert is_whole(precious)
    other = library_caches._private_folder()
    assert other != folder, "a rank uses another one"
    assert other.stat().st_mode & 0o777 == 0o700
    as_mallory(lambda: shutil.rmtree(folder))
    assert library_caches._private_folder() == folder
    own = folder / "torch_extensions_dir/cpu_adam"
    own.mkdir(parents=True)
    (own / "build.ninja").touch()
    for path in (own / "build.ninja", own):
        os.utime(path, (LONG_AGO, LONG_AGO))
    assert removed(capsys) == [str(own)]


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_cache_in_which_others_can_make_links(
    shared: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    cache = shared / "cache"
    cache.mkdir()
    cache.chmod(mode)
    monkeypatch.setenv("LAUNCHER_CACHE", str(cache))

    def link() -> None:
        for name in ("models", "completion", "sources", "run-folders", "data"):
            (cache / name).symlink_to(precious)

    as_mallory(link)
    assert removed(capsys) == []
    assert completion.vocabulary().keys
    run_folders.remember(shared)
    assert run_folders.recall() == []
    with pytest.raises(DataError, match=r"is not trusted: .*(can be written by everyone|belongs to 54321)"):
        require_cache(cache / "models/cpu_adam")
    assert is_whole(precious)
    assert len(list(precious.iterdir())) == 2


def test_what_was_replaced_after_it_was_listed_stays(shared: Path, precious: Path) -> None:
    part = shared / "home/cache/models/tiny-0123"
    part.mkdir(parents=True)
    os.utime(part, (LONG_AGO, LONG_AGO))
    (entry,) = list_entries([])
    part.rmdir()
    precious.rename(part)
    assert clean._remove([entry]) == ([], [f"{part}: it was replaced by something else after it was listed"])
    assert is_whole(part)


def test_a_run_of_another_user_stops_no_cleaning(shared: Path, precious: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def squat() -> None:
        run = shared / "runs/theirs"
        run.mkdir(parents=True)
        (run / "status.json").write_text("{")
        os.mkfifo(run / "plan.json")

    as_mallory(squat)
    part = shared / "home/cache/models/tiny-0123"
    part.mkdir(parents=True)
    os.utime(part, (LONG_AGO, LONG_AGO))
    assert removed(capsys, "--root", str(shared / "runs")) == [str(part)]
