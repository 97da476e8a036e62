"""Folders that another user owns or can write to are refused, and a run's own Ray has folders that nobody else reaches.

Run as root, with real second users.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hand_made
import pytest
from forked import Launch
from unusual_files import MALLORY, TEAM, as_root, give

from launcher.config.sections.ray import RaySection
from launcher.data.cache_dir import cache_root
from launcher.errors import ConfigError, DataError
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.security import folders
from launcher.security.folders import TRUST_VARIABLE, folder_problem
from launcher.worker.ray import connection

__all__ = ["as_root"]
Change = Callable[[Path], object]
# The path that Ray creates below its folder, with the longest process id.
_SOCKET = f"session_2026-11-29_13-50-58_775902_{2**22}/sockets/plasma_store"
_MAX_SOCKET_CHARS = 107


@pytest.fixture(autouse=True)
def no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)


@pytest.fixture
def above() -> Iterator[Path]:
    """A folder that every user can reach: pytest's folders are inside private ones."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def own(above: Path) -> Path:
    folder = above / "runs/demo"
    folder.mkdir(parents=True)
    for one in (folder.parent, folder):
        one.chmod(0o755)
    return folder


# What makes a folder distrusted, and owners with which it is trusted again.
FOREIGN: dict[str, tuple[Change, str]] = {
    "the folder": (lambda own: os.chown(own, MALLORY, -1), str(MALLORY)),
    "a folder above": (lambda own: os.chown(own.parent, MALLORY, -1), str(MALLORY)),
    "a link": (lambda own: _replace_by_link(own), str(MALLORY)),
    "everyone": (lambda own: own.chmod(0o777), "anyone"),
    "everyone, sticky": (lambda own: own.chmod(0o1777), "anyone"),
    "everyone, above": (lambda own: own.parent.chmod(0o777), "anyone"),
    "a group": (lambda own: (os.chown(own, -1, TEAM), own.chmod(0o775)), f"group:{TEAM}"),
    "an access control list": (lambda own: _give_by_list(own), str(MALLORY)),
}
ACCEPTED: dict[str, Change] = {
    "own": lambda own: None,
    "missing": lambda own: own.rmdir(),
    "a sticky folder above": lambda own: own.parent.chmod(0o1777),
    "the private group": lambda own: own.chmod(0o775),
    "anything in a private folder": lambda own: (own.parent.chmod(0o700), own.chmod(0o777)),
    "an own link": lambda own: (own.rename(own.parent / "other"), own.symlink_to("other")),
}


def _replace_by_link(own: Path) -> None:
    own.rename(own.parent / "other")
    own.symlink_to("other")
    os.chown(own, MALLORY, -1, follow_symlinks=False)


def _give_by_list(own: Path) -> None:
    own.chmod(0o770)
    entries = [(1, 7, -1), (2, 7, MALLORY), (4, 5, -1), (16, 7, -1), (32, 5, -1)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + (one & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, mode, one in entries
    )
    try:
        os.setxattr(own, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("this file system has no access control lists")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_others_can_change_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, trusted = FOREIGN[case]
    change(own)
    problem = folder_problem("it", own)
    assert problem is not None
    assert Path(problem.where) in (own, own.parent)
    assert trusted in problem.remedy
    monkeypatch.setenv(TRUST_VARIABLE, trusted)
    assert folder_problem("it", own) is None


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("case", ACCEPTED)
def test_an_own_folder_is_accepted(own: Path, case: str) -> None:
    ACCEPTED[case](own)
    assert folder_problem("it", own) is None


@pytest.mark.usefixtures("as_root")
def test_folders_outside_a_rootless_container_are_accepted_above_an_own_one(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(own.parent, MALLORY, -1)
    monkeypatch.setattr(folders, "uid_of_unmapped_users", lambda: MALLORY)
    assert folder_problem("it", own) is None
    os.chown(own, MALLORY, -1)
    assert folder_problem("it", own) is not None


@pytest.mark.usefixtures("as_root")
def test_an_unknown_owner_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "root")
    with pytest.raises(ConfigError) as refused:
        folders.add_to_environ(["nobody-of-this-name"])
    assert refused.value.problems[0].value == "nobody-of-this-name"


@pytest.mark.usefixtures("as_root")
def test_another_users_run_is_shown_but_nothing_of_it_is_run(above: Path, launch_here: Launch) -> None:
    run = hand_made.run(above / "runs/demo")
    give(run.root)
    for verb in ("status", "checkpoints"):
        assert launch_here(verb, str(run.root)).returncode == 0
    for words in (
        ("resume",),
        ("cancel",),
        ("export",),
        ("checkpoints", "--prune"),
        ("evaluate",),
        ("why", "1"),
        ("rm", "--yes"),
    ):
        refused = launch_here(words[0], str(run.root), *words[1:])
        assert refused.returncode == 2, words
        assert f"belongs to {MALLORY}" in refused.stderr, words


@pytest.mark.usefixtures("as_root")
def test_a_run_is_not_started_where_others_could_replace_it(above: Path, launch_here: Launch) -> None:
    above.chmod(0o777)
    refused = launch_here("train", "model=tiny", "tracking=none", f"run.root={above}/runs")
    assert refused.returncode == 2
    assert str(above) in refused.stderr
    assert list(above.iterdir()) == []


@pytest.mark.usefixtures("as_root")
def test_a_cache_of_another_user_is_refused(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(above / "cache"))
    assert cache_root() == above / "cache"
    (above / "cache").mkdir()
    give(above)
    with pytest.raises(DataError) as refused:
        cache_root()
    assert refused.value.problems[0].where == str(above)


@pytest.mark.usefixtures("as_root")
def test_the_members_of_a_group_share_a_cache(above: Path) -> None:
    shared = above / "data-team"
    folders.make_shared_folder(shared, str(TEAM))
    status = shared.stat()
    assert (status.st_gid, status.st_mode & 0o7777) == (TEAM, 0o3770)
    (shared / "built").mkdir(mode=0o700)
    (shared / "built/meta.json").write_text("{}")
    folders.share(shared / "built", str(TEAM))
    read = ["/bin/cat", str(shared / "built/meta.json")]
    assert subprocess.run(read, user=MALLORY, group=TEAM, extra_groups=[], capture_output=True).returncode == 0
    assert subprocess.run(read, user=MALLORY, group=MALLORY, extra_groups=[], capture_output=True).returncode == 1
    shared.chmod(0o777)
    folders._cache_problem.cache_clear()
    with pytest.raises(DataError):
        folders.require_cache(shared, str(TEAM))


@pytest.mark.usefixtures("as_root")
def test_temporary_files_are_in_a_folder_of_this_user_alone(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(above))
    above.chmod(0o1777)
    monkeypatch.setattr(folders, "temporary_folder", folders.temporary_folder.__wrapped__)
    own = folders.private_variables({"HOME": "/root"})["TMPDIR"]
    assert (Path(own).parent, Path(own).stat().st_mode & 0o777) == (above, 0o700)
    assert folders.temporary_folder() == Path(own), "later processes find it again"
    os.chown(own, MALLORY, -1)
    other = folders.temporary_folder()
    assert other != Path(own)
    assert folders.is_private_folder(other)
    without_home = folders.private_variables({"HOME": "/dev/null"})
    assert Path(without_home["TRITON_CACHE_DIR"]).is_relative_to(without_home["TMPDIR"])


@pytest.mark.usefixtures("as_root")
def test_a_private_folder_replaces_an_own_one_only(above: Path) -> None:
    above.chmod(0o1777)
    folder = above / "nvme"
    folder.mkdir()
    (folder / "old").touch()
    folders.make_private_folder(folder, "deepspeed.nvme_path")
    assert (list(folder.iterdir()), folder.stat().st_mode & 0o777) == ([], 0o700)


@pytest.mark.usefixtures("as_root")
def test_nobody_puts_a_socket_in_place_of_the_one_of_the_raylet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray._common.utils import try_to_create_directory

    monkeypatch.setattr(run_store, "read_status", lambda run: SimpleNamespace(state="completed"))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with connection._own_folder(RunDir(tmp_path)) as folder:
        sockets = folder / "session" / "sockets"
        for made in (folder, sockets.parent, sockets):
            try_to_create_directory(str(made))
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o777, "Ray does not do that any more"
        attempt = ["/usr/bin/env", "touch", str(sockets / "raylet")]
        done = subprocess.run(attempt, user=MALLORY, group=MALLORY, extra_groups=[], capture_output=True, text=True, cwd="/")
        assert done.returncode != 0
        assert not os.listdir(sockets)
    assert not folder.parent.exists()


def test_socket_names_fit_below_the_longest_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_store, "read_status", lambda run: SimpleNamespace(state="completed"))
    names = []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix, dir: names.append(dir) or str(tmp_path / "none"))
    for length in (connection._MAX_FOLDER_CHARS, connection._MAX_FOLDER_CHARS + 1):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        with connection._own_folder(RunDir(tmp_path)) as folder:
            inner = folder.name
    assert [len(name) for name in names] == [connection._MAX_FOLDER_CHARS, len("/tmp")]
    assert len(f"{names[0]}/ray-12345678/{inner}/{_SOCKET}") <= _MAX_SOCKET_CHARS


def test_the_token_is_not_in_the_run_which_a_group_may_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """docs/security.md suggests chmod -R g+rX RUN, and anyone with the token can run code as the run's user."""
    import ray

    plan = SimpleNamespace(config=SimpleNamespace(cluster=RaySection()), topology=SimpleNamespace(device="cpu", ranks_per_node=1))
    monkeypatch.setattr(run_store, "read_status", lambda run: SimpleNamespace(state="completed"))
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(ray, "init", lambda **options: None)
    with connection._own_folder(RunDir(tmp_path)) as folder:
        connection._start_private_ray(plan, tmp_path, folder)
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert len(token.read_text()) == 64
        assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert not token.exists()
    assert list(tmp_path.iterdir()) == []
