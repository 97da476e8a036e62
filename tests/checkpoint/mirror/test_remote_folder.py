"""Operations on a remote folder are retried only after transient failures, and do not follow links that another user plants."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mirror_tools import hooked, make_run
from missing_program import skip_or_fail

from launcher.checkpoint.mirror.layout import read_run
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import Mirror
from launcher.errors import CheckpointError


class Storage:
    """Fails with each of `errors` in turn, then returns."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.num_calls = list(errors), 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "content"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_transient_failures_are_retried_with_growing_waits(tmp_path: Path, slept: list[float]) -> None:
    storage = Storage(*(OSError("not now") for _ in range(4)))
    assert RemoteFolder(f"file://{tmp_path}")._retry(storage) == "content"
    assert slept == [1, 2, 4, 8]


def test_the_last_failure_is_raised(tmp_path: Path, slept: list[float]) -> None:
    storage = Storage(*(OSError(f"failure {number}") for number in range(1, 7)))
    with pytest.raises(OSError, match="failure 5"):
        RemoteFolder(f"file://{tmp_path}")._retry(storage)
    assert storage.num_calls == 5


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), ImportError(), KeyboardInterrupt()])
def test_permanent_failures_are_not_retried(tmp_path: Path, slept: list[float], error: BaseException) -> None:
    storage = Storage(error)
    with pytest.raises(type(error)):
        RemoteFolder(f"file://{tmp_path}")._retry(storage)
    assert (storage.num_calls, slept) == (1, [])


def test_without_waits_there_is_one_attempt(tmp_path: Path, slept: list[float]) -> None:
    storage = Storage(OSError("not now"))
    with pytest.raises(OSError, match="not now"):
        RemoteFolder(f"file://{tmp_path}", waits_s=())._retry(storage)
    assert (storage.num_calls, slept) == (1, [])


def test_another_writer_of_the_mirror_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer plants links under every name that it can guess, and paths in run.json that lead outside the mirror."""
    plan, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    folder = tmp_path / "mirror/a"
    mirror = Mirror(RemoteFolder(f"file://{folder}", waits_s=()), run, plan, 1)
    mirror.begin()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.json").write_text("years of work")
    (folder / ".unfinished-plan.json").symlink_to(mine / "thesis.json")
    known = read_run(RemoteFolder(f"file://{folder}"))
    assert known is not None
    planted = known.model_copy(update={"files": {"../../mine/thesis.json": known.files["plan.json"]}})
    (folder / "run.json").write_text(planted.model_dump_json())
    with pytest.raises(CheckpointError, match="damaged"):
        mirror.begin()
    (folder / "run.json").write_text(known.model_copy(update={"files": {}}).model_dump_json())
    mirror.begin()
    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda num_bytes: "0123456789abcdef")
        patch.setattr(RemoteFolder, "_remove_leftovers", lambda *_: None)
        (folder / ".unfinished-0123456789abcdef-run.json").symlink_to(mine / "thesis.json")
        with pytest.raises(FileExistsError):
            mirror.begin()
    assert (mine / "thesis.json").read_text() == "years of work"
    assert not (folder / "plan.json").is_symlink()


@pytest.mark.parametrize("is_last", [False, True])
def test_another_users_link_in_the_mirror_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_last: bool) -> None:
    if os.geteuid() != 0:
        skip_or_fail("only root can give files to another user: run pytest as root")
    mine = tmp_path / "mine"
    (mine / "step-00000005").mkdir(parents=True)
    (mine / "thesis.json").write_text("years of work")
    link = tmp_path / "a"
    link.symlink_to(mine)
    folder = RemoteFolder(f"file://{link}" if is_last else f"file://{tmp_path}", waits_s=())
    inside = "" if is_last else "a/"
    folder.write(f"{inside}mine.json", b"one's own links lead where one wants them to")
    os.chown(link, 54321, -1, follow_symlinks=False)
    for action in (
        lambda: folder.write(f"{inside}thesis.json", b""),
        lambda: folder.remove(f"{inside}thesis.json"),
        lambda: folder.remove_folder(f"{inside}step-00000005", "manifest.json"),
    ):
        with pytest.raises(PermissionError, match="the link of another user is not followed"):
            action()
    assert (mine / "thesis.json").read_text() == "years of work"
    assert (mine / "step-00000005").is_dir()
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "54321")
    folder.write(f"{inside}mine.json", b"of a user who is trusted")
    assert (mine / "mine.json").read_bytes() == b"of a user who is trusted"


def test_links_of_the_host_and_of_an_image_lead_to_a_mirror_in_a_rootless_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        skip_or_fail("only root can give files to another user: run pytest as root")
    (tmp_path / "data/mirror").mkdir(parents=True)
    (tmp_path / "host").mkdir()
    (tmp_path / "host/scratch").symlink_to(tmp_path / "data")
    for path in (tmp_path / "host", tmp_path / "host/scratch"):
        os.chown(path, 65534, -1, follow_symlinks=False)
    monkeypatch.setattr("launcher.security.path_steps.uid_of_unmapped_users", lambda: 65534)
    folder = RemoteFolder(f"file://{tmp_path}/host/scratch/mirror", waits_s=())
    folder.write("plan.json", b"{}")
    assert (tmp_path / "data/mirror/plan.json").read_bytes() == b"{}"
    # Another user of the host, who can write to the mirror, has put their own folder with a link in place of one.
    (tmp_path / "data/mirror/run").mkdir()
    (tmp_path / "data/mirror/run/model").symlink_to(tmp_path)
    for path in (tmp_path / "data/mirror/run", tmp_path / "data/mirror/run/model"):
        os.chown(path, 65534, -1, follow_symlinks=False)
    for writable in (tmp_path / "data/mirror", tmp_path / "host"):
        name = "run/model/config.json" if writable.name == "mirror" else "plan.json"
        writable.chmod(0o1777)
        with pytest.raises(PermissionError, match="if you trust nobody, add --trust-owner nobody"):
            folder.write(name, b"")
    assert not (tmp_path / "config.json").exists()


def test_a_client_that_keeps_one_connection_connects_again_when_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    """An ssh server that restarts during a run ends the connection of sftp's client."""
    folder, connections = RemoteFolder(f"file://{tmp_path}", waits_s=(0.1,)), [True]
    transport = SimpleNamespace(is_active=lambda: connections[-1])
    monkeypatch.setattr(folder._fs, "client", SimpleNamespace(get_transport=lambda: transport), raising=False)
    monkeypatch.setattr(folder._fs, "_connect", lambda: connections.append(True), raising=False)

    def write() -> int:
        if len(connections) == 1:
            connections[0] = False
            raise OSError("Socket is closed")
        return len(connections)

    assert folder._retry(write) == 2
    assert folder._retry(write) == 2, "a connection that works is kept"


@pytest.mark.parametrize(("action", "step"), [("write", "makedirs"), ("remove", "rm_file"), ("remove_folder", "rm")])
def test_a_link_that_takes_the_place_of_a_folder_after_its_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, step: str
) -> None:
    """Whoever can write to the folder above exchanges them thousands of times a second, and some write meets the link."""
    mine, mirror = tmp_path / "mine", tmp_path / "mirror"
    (mine / "step-00000005").mkdir(parents=True)
    (mine / "thesis.json").write_text("years of work")
    (mirror / "model/step-00000005").mkdir(parents=True)
    (mirror / "model/thesis.json").touch()
    folder = RemoteFolder(f"file://{mirror}", waits_s=())

    method = getattr(folder._fs, step)

    def exchange_and_act(*args: Any, **options: Any) -> None:
        if not (mirror / "moved").exists():
            (mirror / "model").rename(mirror / "moved")
            (mirror / "model").symlink_to(mine)
        method(*args, **options)

    monkeypatch.setattr(folder._fs, step, exchange_and_act)
    if action == "write":
        folder.write("model/thesis.json", b"from the upload")
        assert (mirror / "moved/thesis.json").read_bytes() == b"from the upload"
    elif action == "remove":
        folder.remove("model/thesis.json")
    else:
        folder.remove_folder("model/step-00000005", "manifest.json")
        assert not (mirror / "moved/step-00000005").exists()
    assert (mirror / "moved").is_dir()
    assert (mine / "thesis.json").read_text() == "years of work"
    assert [path.name for path in sorted(mine.iterdir())] == ["step-00000005", "thesis.json"]


def test_a_file_replaces_a_link_to_a_folder(tmp_path: Path) -> None:
    """Moved to such a link, it would leave the mirror, and fill another disk with weights."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/plan.json").symlink_to(tmp_path / "mine")
    RemoteFolder(f"file://{tmp_path}/mirror", waits_s=()).write("plan.json", b"{}")
    assert not any((tmp_path / "mine").iterdir())
    assert [path.name for path in (tmp_path / "mirror").iterdir() if path.read_bytes() == b"{}"] == ["plan.json"]


def test_errors_of_a_mirror_on_a_disk_name_the_whole_path(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("in the way")
    (tmp_path / "run/plan.json/full").mkdir(parents=True)
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/mirror/a"):
        RemoteFolder(f"file://{tmp_path}/mirror/a", waits_s=()).write("plan.json", b"")
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}/run/plan.json"):
        RemoteFolder(f"file://{tmp_path}/run", waits_s=()).remove("plan.json")


def test_model_files_that_become_links_after_the_check_are_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise, anyone who can write to the model's folder could make the mirror upload a private file of this machine."""
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror")
    folder, model, secret = tmp_path / "mirror/a", tmp_path / "tokenizer", tmp_path / "secret"
    secret.write_text("the key")
    original = (model / "config.json").read_bytes()
    replaced: list[str] = []

    def replace_by_links(operation: str, path: str) -> None:
        if operation == "write" and path.endswith("-config.json") and not replaced:
            for name in ("config.json", "tokenizer.json"):
                (model / name).unlink()
                (model / name).symlink_to(secret)
                replaced.append(name)

    with hooked(replace_by_links):
        Mirror(RemoteFolder(f"faulty://{folder}"), run, plan, 1).begin()
    assert replaced == ["config.json", "tokenizer.json"]
    assert (folder / "tokenizer/config.json").read_bytes() == original, "what was opened is what is sent"
    assert not (folder / "tokenizer/tokenizer.json").exists()
    assert (
        "not sent to the mirror: the file tokenizer.json was replaced by a link to a file outside the folder"
        in capsys.readouterr().err
    )
    known = read_run(RemoteFolder(f"file://{folder}"))
    assert known is not None
    assert "tokenizer/config.json" in known.files
    assert "tokenizer/tokenizer.json" not in known.files
