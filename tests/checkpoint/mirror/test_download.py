"""A run is restored from its mirror, on disk and on an S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mirror_tools import S3, commit, hooked, make_bucket, make_run, running_s3, tree

from launcher.checkpoint import remote_folder, store
from launcher.checkpoint.manifest import HELD_OUT, LaterEvaluation, record_evaluation
from launcher.checkpoint.mirror import (
    MARKER,
    Mirror,
    claim_run_dir,
    download_checkpoint,
    download_fixed_files,
    download_progress,
    read_complete_checkpoints,
    read_run,
    write_plans,
)
from launcher.checkpoint.remote_folder import RemoteFolder
from launcher.errors import CheckpointError, SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.progress import silent


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3") / "server.log") as s3:
        make_bucket(s3)
        yield s3


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    # A cached client of an earlier test would connect to that test's server.
    s3fs.S3FileSystem.clear_instance_cache()
    return s3_server


def mirrored(url: str, folder: Path, steps: tuple[int, ...] = (5, 10)) -> tuple[LaunchPlan, RunDir, RemoteFolder]:
    plan, run = make_run(folder, url)
    run.metrics.write_text("".join(f'{{"trainer/step": {step}}}\n' for step in steps))
    for step in steps:
        commit(run, step)
    there = RemoteFolder(f"{url}/a")
    mirror = Mirror(there, run, plan, 1)
    mirror.begin()
    for checkpoint in mirror.behind():
        mirror.send(checkpoint)
    return plan, run, there


def fetched(there: RemoteFolder, target: RunDir, step: int | None = None, said: list[str] | None = None) -> int:
    known = read_run(there)
    assert known is not None
    claim_run_dir(target, there.url)
    plans = download_fixed_files(there, known, target)
    download_progress(there, target)
    newest = download_checkpoint(there, target, step, (said if said is not None else []).append, silent)
    write_plans(target, plans)
    return newest


def require_same(run: RunDir, target: RunDir, step: int) -> None:
    assert target.plan.read_bytes() == run.plan.read_bytes()
    # Bytecode is not uploaded.
    assert tree(target.code) == {name: content for name, content in tree(run.code).items() if "__pycache__" not in name}
    assert target.metrics.read_bytes() == run.metrics.read_bytes()
    assert (target.attempt(1) / "attempt.json").read_bytes() == (run.attempt(1) / "attempt.json").read_bytes()
    name = store.step_name(step)
    assert [p.name for p in target.checkpoints.iterdir()] == [name]
    assert tree(target.checkpoints / name) == tree(run.checkpoints / name)
    assert store.verify(target.checkpoints / name) == []
    assert target.root.stat().st_mode & 0o777 == 0o700
    assert (target.checkpoints / name).stat().st_mode & 0o777 == 0o700


def test_a_run_is_downloaded_from_a_folder(tmp_path: Path) -> None:
    plan, run, there = mirrored(f"file://{tmp_path}/mirror", tmp_path)
    record_evaluation(run.checkpoints / store.step_name(10), LaterEvaluation(HELD_OUT, 1.5))
    mirror = Mirror(there, run, plan, 1)
    mirror.begin()
    mirror.send_evaluations()
    target = RunDir(tmp_path / "elsewhere" / "a")
    assert fetched(there, target) == 10
    assert store.get_latest(target.checkpoints).eval_loss == 1.5
    require_same(run, target, 10)
    assert not (target.root / MARKER).exists()


@pytest.mark.rest
def test_a_run_is_downloaded_from_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough that S3 files are uploaded in several parts.
    monkeypatch.setattr(remote_folder, "_BLOCK_BYTES", 5 * 2**20)
    plan, run = make_run(tmp_path, f"s3://{s3.bucket}/runs")
    remote_folder.require_writable(f"s3://{s3.bucket}/runs")
    checkpoints = [commit(run, 5, os.urandom(12 * 2**20), num_ranks=1), commit(run, 10)]
    there = RemoteFolder(f"s3://{s3.bucket}/runs/a")
    mirror = Mirror(there, run, plan, 1)
    mirror.begin()
    run.metrics.write_text('{"trainer/step": 10}\n')
    mirror.send(checkpoints[0])

    def torn() -> Iterator[bytes]:
        yield bytes(6 * 2**20)
        raise ConnectionResetError("by peer")

    with pytest.raises(ConnectionResetError):
        there._write_blocks(there._path("checkpoints/step-00000010/rank-00000.safetensors"), torn(), 1)
    assert there.names("checkpoints/step-00000010") == [], "an upload that was given up is no object"
    mirror.send(checkpoints[1])
    assert list(read_complete_checkpoints(there)) == [5, 10]
    require_fetched = RunDir(tmp_path / "elsewhere" / "a")
    assert fetched(there, require_fetched, step=5) == 5
    require_same(run, require_fetched, 5)
    store.prune(run.checkpoints, store.Retention(1))
    assert mirror.prune() == [5]
    assert list(read_complete_checkpoints(there)) == [10]


def test_missing_credentials_are_refused_at_once(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(SubmitError, match="AWS_ACCESS_KEY_ID"):
        remote_folder.require_writable(f"s3://{s3.bucket}/runs")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_downloaded(tmp_path: Path, damage: str) -> None:
    _, run, there = mirrored(f"file://{tmp_path}/mirror", tmp_path)
    folder = tmp_path / "mirror/a/checkpoints/step-00000010"
    file = folder / ("manifest.json" if damage == "manifest" else "rank-00001.safetensors")
    if damage == "flip":
        file.write_bytes(file.read_bytes()[::-1])
    elif damage == "remove":
        file.unlink()
    else:
        os.truncate(file, 4)
    target, said = RunDir(tmp_path / "elsewhere" / "a"), []
    assert fetched(there, target, said=said) == 5
    require_same(run, target, 5)
    # A checkpoint without a readable manifest does not exist.
    assert ("step 10 is damaged" in " ".join(said)) == (damage != "manifest")
    with pytest.raises(CheckpointError):
        download_checkpoint(there, RunDir(tmp_path / "third"), 10, said.append, silent)


def test_a_mirror_without_an_intact_checkpoint_creates_no_run(tmp_path: Path) -> None:
    _, _, there = mirrored(f"file://{tmp_path}/mirror", tmp_path, steps=(5,))
    (tmp_path / "mirror/a/checkpoints/step-00000005/state.json").write_text("{}")
    target = RunDir(tmp_path / "elsewhere" / "a")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        fetched(there, target)
    assert not target.plan.exists()
    assert not list(target.checkpoints.iterdir())


def test_an_interrupted_download_continues(tmp_path: Path) -> None:
    _, run, _ = mirrored(f"file://{tmp_path}/mirror", tmp_path)
    there = RemoteFolder(f"faulty://{tmp_path}/mirror/a")
    target = RunDir(tmp_path / "elsewhere" / "a")
    read: list[str] = []

    def fail(what: str, path: str) -> None:
        if path.endswith("rank-00002.safetensors"):
            raise PermissionError(path)

    with hooked(fail), pytest.raises(PermissionError):
        fetched(there, target)
    assert not target.plan.exists(), "what is not whole is no run"
    with hooked(lambda what, path: read.append(path)):
        assert fetched(there, target) == 10
    require_same(run, target, 10)
    shards = [Path(path).name for path in read if path.endswith(".safetensors")]
    assert shards == ["rank-00002.safetensors"], "what had arrived was not fetched again"


def test_an_existing_run_directory_is_not_touched(tmp_path: Path) -> None:
    _, run, there = mirrored(f"file://{tmp_path}/mirror", tmp_path)
    before = tree(run.root)
    with pytest.raises(SubmitError):
        fetched(there, run)
    assert tree(run.root) == before
    claim_run_dir(RunDir(tmp_path / "elsewhere"), "s3://another/a")
    with pytest.raises(SubmitError):
        fetched(there, RunDir(tmp_path / "elsewhere"))
