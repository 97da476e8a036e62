"""A mirror on a disk where another user has created folders, or places files of any kind and size."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from file_owners import MALLORY, as_root
from mirror_tools import commit, make_run
from special_files import link_to_device, make_pipe

from launcher.atomic_files import FileEntry
from launcher.checkpoint.mirror import download
from launcher.checkpoint.mirror.layout import MirroredRun, read_complete_checkpoints, read_run
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import Mirror, require_usable_mirror
from launcher.cli import mirror, runs
from launcher.errors import CheckpointError, SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security.trust import VARIABLE

__all__ = ["as_root"]


def _make_huge(file: Path) -> None:
    file.touch()
    os.truncate(file, 2**40)


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


@pytest.mark.timeout(300)
@pytest.mark.parametrize("replace", [make_pipe, link_to_device, _make_huge])
def test_what_is_no_small_file_of_a_mirror_is_not_read(
    shared: Path, mirrored: tuple[LaunchPlan, RunDir, RemoteFolder], replace: Callable[[Path], None]
) -> None:
    """The upload process runs next to the ranks: if it ran out of memory, they would end too."""
    _, _, there = mirrored
    reads: dict[str, Callable[[RemoteFolder], object]] = {
        "checkpoints/step-00000005/manifest.json": read_complete_checkpoints,
        "run.json": read_run,
    }
    for name, read in reads.items():
        (shared / "a" / name).unlink()
        replace(shared / "a" / name)
        with pytest.raises(CheckpointError, match=r"not a regular file|more than 64 MiB"):
            read(there)


@pytest.mark.timeout(300)
def test_no_more_of_a_file_is_fetched_than_the_manifest_says(
    tmp_path: Path, shared: Path, mirrored: tuple[LaunchPlan, RunDir, RemoteFolder]
) -> None:
    _, _, there = mirrored
    os.truncate(shared / "a/checkpoints/step-00000005/rank-00001.safetensors", 2**40)
    (target := RunDir(tmp_path / "elsewhere")).root.mkdir()
    fetched: list[int] = []
    with pytest.raises(CheckpointError, match="a file differs from the manifest's digest"):
        download.download_checkpoint(there, target, 5, lambda line: None, lambda activity, total: fetched.append)
    assert sum(fetched) < 2**26


def test_an_archive_of_code_that_expands_out_of_proportion_is_not_unpacked(
    tmp_path: Path, mirrored: tuple[LaunchPlan, RunDir, RemoteFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, there = mirrored
    known, archive = read_run(there), io.BytesIO()
    assert known is not None
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("launcher/zeros", bytes(2**24))
    there.write("code.zip", archive.getvalue())
    entry = FileEntry(size=len(archive.getvalue()), xxh3_128=xxhash.xxh3_128_hexdigest(archive.getvalue()))
    planted = MirroredRun(run_name="a", owner=known.owner, files={"code.zip": entry})
    (target := RunDir(tmp_path / "elsewhere")).root.mkdir()
    monkeypatch.setattr(download, "_MAX_FILE_BYTES", 2**20)
    with pytest.raises(CheckpointError, match="the code in the mirror unpacks to more than 1 MiB"):
        download.download_fixed_files(there, planted, target)
    assert list(target.root.rglob("*")) == []


def test_one_run_of_another_user_does_not_hide_the_others(
    shared: Path, mirrored: tuple[LaunchPlan, RunDir, RemoteFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("b", "{}"), ("c", None)):
        (shared / name).mkdir()
        if content is None:
            os.mkfifo(shared / name / "run.json")
        else:
            (shared / name / "run.json").write_text(content)
    assert mirror.ls(f"file://{shared}", as_json=False) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["run", "a"]
    assert "b: the mirror's run.json is damaged" in err
    assert "c: a file of the mirror is not a regular file" in err
