"""Caches that another user could have written: digests do not reveal the author; owner and permissions do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from missing_program import skip_or_fail

from launcher.config.sections.data import DataSection
from launcher.data.build import build
from launcher.data.cache import cache_store
from launcher.data.cache.cache_store import find
from launcher.data.cache.keys import cache_key
from launcher.data.sources.locate import _read_listing
from launcher.errors import DataError, Problem
from launcher.model_source import _finished
from launcher.plan.launch_plan import DataFacts
from launcher.security import folders, permissions
from launcher.security.folders import make_shared_folder
from launcher.security.ownership import require_cache

Section = Callable[..., DataSection]

# Users that exist on every Debian system: the first two share a group, the third is in another.
SYNC, NOBODY, DAEMON = 4, 65534, 1
GROUP, GROUP_ID = "nogroup", 65534


@pytest.fixture(autouse=True)
def _root() -> Iterator[None]:
    if os.geteuid() != 0:
        skip_or_fail("only root can act as other users: run pytest as root")
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@contextmanager
def user(uid: int) -> Iterator[None]:
    os.setegid(GROUP_ID if uid != DAEMON else DAEMON)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def give(path: Path, uid: int) -> None:
    for one in (path, *path.rglob("*")):
        os.chown(one, uid, -1)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        action()
    (problem,) = error.value.problems
    assert "set LAUNCHER_CACHE to a folder of your own" in problem.remedy
    return problem.message


@pytest.fixture
def built(section: Section, tokenizer_dir: Path) -> tuple[str, DataFacts]:
    data = section(eval_fraction=0.2)
    facts = build(data, str(tokenizer_dir))
    return cache_key(data, str(tokenizer_dir)), facts


def test_a_cache_of_another_user_is_refused(
    section: Section, tokenizer_dir: Path, built: tuple[str, DataFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could contain a loss mask of zeros with matching digests."""
    key, facts = built
    give(Path(facts.cache_dir), DAEMON)
    message = f"this part of the cache is not trusted: {facts.cache_dir} belongs to daemon"
    assert refusal(lambda: find(key)) == message
    assert refusal(lambda: build(section(eval_fraction=0.2), str(tokenizer_dir))) == message
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "daemon")
    assert find(key) == facts


def test_one_file_of_another_user_is_refused(built: tuple[str, DataFacts]) -> None:
    key, facts = built
    os.chown(Path(facts.cache_dir, "eval/trained.npy"), DAEMON, -1)
    assert refusal(lambda: find(key)) == "this part of the cache is not trusted: eval/trained.npy belongs to daemon"


def test_a_cache_that_everyone_can_write_is_refused(built: tuple[str, DataFacts], cache_home: Path) -> None:
    key, facts = built
    folder = Path(facts.cache_dir)
    for path in folder.rglob("*"):
        path.chmod(0o666 if path.is_file() else 0o777)
    assert find(key) == facts, "nobody else can enter the folder"
    for path in (folder, folder.parent, cache_home):
        path.chmod(0o755)
    assert "can be written by everyone" in refusal(lambda: find(key))


def test_storage_that_gives_new_files_to_nobody_refuses_a_cache_before_it_is_built(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NFS and root_squash, files are created as a different user from the one the process runs as."""
    monkeypatch.setenv("LAUNCHER_CACHE", str(shared))

    def build_one() -> None:
        with cache_store.building("a-key") as folder:
            assert folder is not None
            pytest.fail("it would have been built")

    with user(DAEMON):
        monkeypatch.setattr(os, "geteuid", lambda: SYNC)
        assert "data belongs to daemon" in refusal(build_one)
        assert not (shared / "data/a-key.partial").exists()
        monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "daemon")
        with pytest.raises(pytest.fail.Exception, match="it would have been built"):
            build_one()


@pytest.mark.parametrize("folder", ["weight-checks", "isolation-checks", "sources", "models"])
def test_other_parts_of_the_cache_are_refused_as_well(cache_home: Path, folder: str) -> None:
    path = cache_home / folder / "one"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "listing.json").write_text('{"commit": "c", "files": []}')
    use = {"models": lambda: _finished(path), "sources": lambda: _read_listing(path / "listing.json")}.get(
        folder, lambda: require_cache(path / "config.json")
    )
    use()
    give(path, DAEMON)
    assert "belongs to daemon" in refusal(use)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where every user can create files, set as the shared cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.setenv("LAUNCHER_SHARED_CACHE", folder)
        yield Path(folder)


@pytest.fixture
def of_group(shared: Path) -> Path:
    """The group's folder in the shared cache, created by the owner of the shared folder."""
    make_shared_folder(shared / f"data-{GROUP}", GROUP)
    return shared / f"data-{GROUP}"


def write(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "eval").mkdir(mode=0o700)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read_files(facts: DataFacts) -> dict[str, bytes]:
    folder = Path(facts.cache_dir)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_members_of_a_group_share_a_cache(of_group: Path, built: tuple[str, DataFacts]) -> None:
    key, facts = built
    files = read_files(facts)
    with user(SYNC):
        with cache_store.building(key, GROUP) as folder:
            assert folder is not None
            write(folder, files)
        made = find(key, GROUP)
    assert made is not None
    assert made.contents() == facts.contents()
    folder = Path(made.cache_dir)
    assert folder == of_group / key
    assert {(path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) for path in folder.rglob("*.npy")} == {
        (SYNC, GROUP_ID, 0o640)
    }
    with user(NOBODY):
        assert find(key, GROUP) == made
        with cache_store.building(key, GROUP) as again:
            assert again is None, "it is not built a second time"
        with pytest.raises(PermissionError):
            (folder / "trained.npy").write_bytes(b"")
        with pytest.raises(PermissionError):
            folder.rename(folder.with_name("away"))
    with user(DAEMON):
        with pytest.raises(DataError, match="cannot be used: Permission denied"):
            find(key, GROUP)
        with pytest.raises(DataError, match="does not belong to the group"), cache_store.building(key, GROUP):
            pass
    with user(NOBODY):
        assert "belongs to sync" in refusal(lambda: cache_store.read(folder)), "without the setting"


def test_a_group_without_a_shared_folder_is_refused(
    section: Section, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path
) -> None:
    """Group members cannot enter this user's own cache: nothing would be shared, without any notice."""
    monkeypatch.delenv("LAUNCHER_SHARED_CACHE", raising=False)
    data = section(cache_group=GROUP)
    for use in (lambda: find("a-key", GROUP), lambda: build(data, str(tokenizer_dir))):
        with pytest.raises(DataError, match="needs a shared folder, and LAUNCHER_SHARED_CACHE is not set") as error:
            use()
        (problem,) = error.value.problems
        assert (problem.where, problem.value) == ("data.cache_group", GROUP)
        assert "set LAUNCHER_SHARED_CACHE to a folder that the group can write to" in problem.remedy


def test_who_is_no_member_cannot_give_a_group_a_cache(shared: Path, built: tuple[str, DataFacts]) -> None:
    key, facts = built
    folder = shared / f"data-{GROUP}" / key
    with user(DAEMON):
        folder.mkdir(parents=True)
        write(folder, read_files_as_root(facts))
        for path in (folder.parent, folder, *folder.rglob("*")):
            path.chmod(0o777)
    with user(NOBODY):
        assert "belongs to daemon" in refusal(lambda: find(key, GROUP))
        with pytest.raises(DataError, match="belongs to daemon"), cache_store.building("another", GROUP):
            pass


def test_only_the_owner_of_the_shared_folder_makes_the_folder_of_a_group(shared: Path) -> None:
    """The owner of a group's folder can replace what another member builds there with a link."""
    by_owner = f"ask root to run: mkdir {shared}/data-{GROUP} && chgrp {GROUP}"

    def build_as_nobody() -> Problem:
        with user(NOBODY), pytest.raises(DataError) as error, cache_store.building("a-key", GROUP):
            pass
        (problem,) = error.value.problems
        assert by_owner in problem.remedy
        return problem

    assert build_as_nobody().message == f"only root, who owns {shared}, can create the folder of a group there"
    folder = shared / f"data-{GROUP}"
    with user(SYNC):
        folder.mkdir()
        folder.chmod(0o3770)
    os.chown(folder, -1, GROUP_ID)
    assert build_as_nobody().message == f"this part of the cache is not trusted: {folder} belongs to sync"
    folder.rmdir()
    for uid, message in ((SYNC, "belongs to sync"), (0, "is a link, and the folder of a group must not be one")):
        with user(uid):
            folder.symlink_to(shared)
        assert message in build_as_nobody().message
        folder.unlink()
    make_shared_folder(folder, GROUP)
    folder.chmod(0o2770)
    with (
        user(NOBODY),
        pytest.raises(DataError, match="can be written by the group nogroup"),
        cache_store.building("a-key", GROUP),
    ):
        pass


def test_a_link_in_place_of_what_is_built_shares_nothing_behind_it(shared: Path, of_group: Path) -> None:
    """The owner of the shared folder can replace its contents; granting the group access must not follow their links."""
    for folder in (shared, of_group):
        os.chown(folder, SYNC, -1)
    of_group.chmod(0o3770)
    with tempfile.TemporaryDirectory() as home:
        private = Path(home, "private")
        private.mkdir(mode=0o700)
        (private / "id_ed25519").touch(mode=0o600)
        give(Path(home), NOBODY)

        def build_and_replace() -> None:
            with user(NOBODY), cache_store.building("a-key", GROUP) as folder:
                assert folder is not None
                (folder / "meta.json").write_text("{}")
                os.seteuid(0)
                with user(SYNC):
                    folder.rename(folder.with_name("away"))
                    folder.symlink_to(home)
                os.setegid(GROUP_ID)
                os.seteuid(NOBODY)

        with pytest.raises(DataError, match="another user has replaced the folder"):
            build_and_replace()
        paths = [Path(home), private, private / "id_ed25519"]
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o700, 0o600]
        assert not (of_group / "a-key").exists()


def test_the_folder_of_a_group_of_an_unknown_user_outside_of_a_container_is_refused(
    of_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ID of unmapped users, the owner of the shared folder and the group's members look like the same user."""
    for module in (permissions, folders):
        monkeypatch.setattr(module, "uid_of_unmapped_users", lambda: SYNC)
    for folder in (of_group.parent, of_group):
        os.chown(folder, SYNC, -1)
    of_group.chmod(0o3770)
    with user(NOBODY):
        with (
            pytest.raises(DataError, match="belongs to a user outside this container") as error,
            cache_store.building("a-key", GROUP),
        ):
            pass
        assert "LAUNCHER_TRUST_OWNERS=sync" in error.value.problems[0].remedy
        monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "sync")
        with cache_store.building("a-key", GROUP) as building:
            assert building is not None
            (building / "meta.json").write_text("{}")


def read_files_as_root(facts: DataFacts) -> dict[str, bytes]:
    uid = os.geteuid()
    os.seteuid(0)
    try:
        return read_files(facts)
    finally:
        os.seteuid(uid)


def test_the_group_does_not_change_the_key(section: Section, tokenizer_dir: Path) -> None:
    assert cache_key(section(cache_group=GROUP), str(tokenizer_dir)) == cache_key(section(), str(tokenizer_dir))


def test_a_build_with_a_group_is_found_again(section: Section, tokenizer_dir: Path, shared: Path) -> None:
    data = section(cache_group=GROUP)
    facts = build(data, str(tokenizer_dir))
    assert build(data, str(tokenizer_dir), lambda *_: pytest.fail("built again")) == facts
    assert Path(facts.cache_dir).is_relative_to(shared)
    assert np.load(Path(facts.cache_dir, "trained.npy")).any()
    with pytest.raises(DataError, match="there is no such group"):
        build(section(cache_group="no-such-group"), str(tokenizer_dir))
