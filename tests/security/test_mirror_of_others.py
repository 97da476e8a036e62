"""A mirror on a disk where another user has created folders, or places files of any kind and size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from file_owners import MALLORY, as_root
from mirror_tools import commit, make_run

from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import Mirror, require_usable_mirror
from launcher.cli import mirror, runs
from launcher.errors import SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security.trust import VARIABLE

__all__ = ["as_root"]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A sticky folder: everyone can create folders, and nobody can change another user's."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def mirrored(tmp_path: Path, shared: Path) -> tuple[LaunchPlan, RunDir, RemoteFolder]:
    """A run with a checkpoint, both completely mirrored."""
    plan, run = make_run(tmp_path, f"file://{shared}")
    commit(run, 5)
    there = RemoteFolder(f"file://{shared}/a", waits_s=())
    sender = Mirror(there, run, plan, 1)
    sender.begin()
    sender.send(sender.behind()[0])
    return plan, run, there


@pytest.mark.usefixtures("as_root")
def test_a_folder_that_another_user_made_for_the_run_gets_nothing(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That user could replace the uploaded files, and a resume from the mirror runs the code in it."""
    plan, run = make_run(tmp_path, f"file://{shared}")
    folder = shared / "a"
    folder.mkdir()
    folder.chmod(0o777)
    os.chown(folder, MALLORY, -1)
    expected = f"the folder of this run in the mirror belongs to {MALLORY}, who can replace the uploaded files"
    for start in (
        lambda: require_usable_mirror(plan),
        Mirror(RemoteFolder(f"file://{folder}", waits_s=()), run, plan, 1).begin,
    ):
        with pytest.raises(SubmitError, match=expected):
            start()
    assert list(folder.iterdir()) == []
    monkeypatch.setenv(VARIABLE, str(MALLORY))
    require_usable_mirror(plan)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("name", ["", "code.zip", "checkpoints"])
def test_code_that_another_user_could_have_put_into_the_mirror_is_not_resumed(
    tmp_path: Path, shared: Path, mirrored: tuple[LaunchPlan, RunDir, RemoteFolder], name: str
) -> None:
    os.chown(shared / "a" / name, MALLORY, -1)
    with pytest.raises(SubmitError, match=rf"the mirror of a is not trusted: \S+ belongs to {MALLORY}"):
        runs.run("resume", [f"file://{shared}/a", "--root", str(tmp_path / "elsewhere")])
    assert not (tmp_path / "elsewhere").exists()


def test_one_run_of_another_user_does_not_hide_the_others(
    shared: Path, mirrored: tuple[LaunchPlan, RunDir, RemoteFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    (shared / "b").mkdir()
    (shared / "b/run.json").write_text("{}")
    assert mirror.ls(f"file://{shared}", as_json=False) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["run", "a"]
    assert "b: the mirror's run.json is damaged" in err
