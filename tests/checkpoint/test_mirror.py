"""What reaches a mirror, what failures leave there, and how a run is restored from it, on disk and on an S3 server."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import hand_made
import pytest
from mirror_tools import (
    S3,
    begun,
    commit,
    elsewhere,
    finished_files,
    hooked,
    make_bucket,
    make_run,
    running_s3,
    send_all,
    steps_in,
    tree,
)

from launcher.checkpoint import remote_folder, store
from launcher.checkpoint.manifest import HELD_OUT, LaterEvaluation, record_evaluation
from launcher.checkpoint.mirror import (
    MARKER,
    CheckpointGone,
    Mirror,
    MirrorTaken,
    claim_run_dir,
    download_checkpoint,
    download_fixed_files,
    download_progress,
    read_complete_checkpoints,
    read_run,
    require_usable_mirror,
    write_plans,
)
from launcher.checkpoint.remote_folder import RemoteFolder
from launcher.errors import CheckpointError, SubmitError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, run_store
from launcher.runs.run_records import Attempt
from launcher.tracking.progress import ignore_progress


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def place(tmp_path: Path) -> tuple[LaunchPlan, RunDir, Path]:
    """A run and the folder that is its mirror."""
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror")
    return plan, run, tmp_path / "mirror" / "a"


def test_the_oldest_checkpoint_is_sent_first_and_its_manifest_last(place) -> None:
    plan, run, folder = place
    run.metrics.write_text('{"trainer/step": 5}\n')
    for step in (10, 5, 15):
        commit(run, step)
    with finished_files() as finished:
        mirror = begun(plan, run)
        assert send_all(mirror) == sum(e.size for c in store.list_checkpoints(run.checkpoints) for e in c.manifest.files.values())
    names = [str(Path(path).relative_to(folder)) for path in finished]
    assert names.index("run.json") > max(names.index(n) for n in ("code.zip", "plan.json", "attempts/001/attempt.json"))
    # A complete checkpoint has its metrics in the mirror.
    assert names.index("metrics.jsonl") < names.index("checkpoints/step-00000005/manifest.json")
    for step in (5, 10, 15):
        own = [n.rpartition("/")[2] for n in names if f"step-{step:08d}/" in n]
        assert own[-1] == "manifest.json"
        assert set(own) == {"manifest.json", *store.list_checkpoints(run.checkpoints)[0].manifest.files}
    manifests = [n for n in names if n.endswith("manifest.json")]
    assert manifests == [f"checkpoints/step-{step:08d}/manifest.json" for step in (5, 10, 15)]
    assert tree(folder / "checkpoints") == tree(run.checkpoints)
    # A tokenizer's files are uploaded; weights are not.
    assert sorted(p.name for p in (folder / "tokenizer").iterdir()) == ["config.json", "tokenizer.json"]
    with finished_files() as finished:
        assert send_all(begun(plan, run)) == 0
    assert not [path for path in finished if "checkpoints" in path], "no checkpoint that is there is sent again"


def test_the_mirror_has_the_final_state_that_the_agent_has_not_written_yet(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    hand_made.record(run, 1, "TrainingEnded", state="completed", reason="completed", step=20, message="20 steps")
    mirror.send_progress()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("completed", 20, "20 steps")
    assert run_store.read_status(run).state == "running"


@pytest.mark.rest
def test_an_upload_that_was_killed_at_any_point_is_completed_by_another_process(place) -> None:
    """The upload is killed at every write, rename and removal of a whole round."""
    plan, run, folder = place
    commit(run, 5)
    commit(run, 10)
    killed_at, code = 0, 9
    while code:
        shutil.rmtree(folder, ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            left = [killed_at]

            def die(what: str, path: str, left: list[int] = left) -> None:
                left[0] -= what != "read"
                if left[0] < 0:
                    os._exit(9)

            with hooked(die):
                send_all(begun(plan, run))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        for step in steps_in(folder):
            name = store.step_name(step)
            assert tree(folder / "checkpoints" / name) == tree(run.checkpoints / name), "what has a manifest is whole"
        send_all(begun(plan, run))
        assert tree(folder / "checkpoints") == tree(run.checkpoints)
        killed_at += 1
    assert killed_at > 20


@pytest.mark.parametrize("is_read_later", [False, True])
def test_a_checkpoint_removed_during_its_upload_leaves_nothing(place, is_read_later: bool) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    old = commit(run, 5)

    def prune(what: str, path: str) -> None:
        if what == "finish" and path.endswith("rank-00000.safetensors") and old.path.exists():
            atomic_files.remove_directory(old.path)
            if is_read_later:
                # The error of a network file system when a file is removed during a read.
                raise PermissionError("stale file handle")

    with hooked(prune), pytest.raises(CheckpointGone):
        mirror.send(old)
    assert not (folder / "checkpoints" / old.path.name).exists()
    commit(run, 10)
    send_all(mirror)
    assert steps_in(folder) == [10]


def test_the_mirror_keeps_the_checkpoints_that_retention_keeps(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    commit(run, 5)
    send_all(mirror)
    commit(run, 10)
    store.prune(run.checkpoints, store.Retention(1))
    assert mirror.prune() == []
    assert steps_in(folder) == [5], "until a later one is there"

    def fail(what: str, path: str) -> None:
        if path.endswith("manifest.json") and what == "write":
            raise PermissionError(path)

    with hooked(fail), pytest.raises(PermissionError):
        send_all(mirror)
    mirror.prune()
    assert steps_in(folder) == [5]
    send_all(mirror)
    assert steps_in(folder) == [10]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_checkpoint_damaged_here_stays_after_later_checkpoints(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    broken = commit(run, 5)
    send_all(mirror)
    os.truncate(broken.path / "state.json", 1)
    commit(run, 10)
    send_all(mirror)
    assert steps_in(folder) == [5, 10]


def test_retention_applies_to_checkpoints_that_only_the_mirror_has(tmp_path: Path) -> None:
    settings = ("checkpoint.keep_last=2", "checkpoint.keep_every=10", "checkpoint.keep_best=1")
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=settings)
    folder = tmp_path / "mirror" / "a"
    for step, loss in ((5, 1.0), (10, 2.0), (15, 2.0), (22, 3.0), (25, 2.0)):
        commit(run, step, loss=loss)
    send_all(begun(plan, run))
    moved = elsewhere(tmp_path, run, 25)
    mirror = begun(plan, moved, attempt=2)
    assert mirror.prune() == [15]
    assert steps_in(folder) == [5, 10, 22, 25]
    commit(moved, 30, attempt=2)
    send_all(mirror)
    assert steps_in(folder) == [5, 10, 25, 30], "22 is none of the last two any more"


def test_going_back_on_another_machine_removes_later_checkpoints_from_the_mirror(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=["checkpoint.keep_last=9"])
    folder = tmp_path / "mirror" / "a"
    for step in (5, 10, 15):
        commit(run, step)
    send_all(begun(plan, run))
    moved = elsewhere(tmp_path, run, 5, pinned=True)
    own = commit(moved, 15, b"of attempt 2", attempt=2)
    assert begun(plan, moved, attempt=2).prune() == [10]
    mirror = begun(plan, moved, attempt=2)
    send_all(mirror)
    commit(moved, 20, attempt=2)
    send_all(mirror)
    assert steps_in(folder) == [5, 15, 20]
    assert tree(folder / "checkpoints" / "step-00000015") == tree(own.path)
    # A checkpoint that this attempt saved itself stays in the mirror even if it is gone here.
    shutil.rmtree(own.path)
    assert begun(plan, moved, attempt=2).prune() == []


def test_a_resume_from_the_newest_removes_nothing_from_the_mirror(tmp_path: Path) -> None:
    """The run found the later checkpoint damaged here, but the mirror's copy may be intact."""
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror")
    for step in (5, 10):
        commit(run, step)
    send_all(begun(plan, run))
    assert begun(plan, elsewhere(tmp_path, run, 5), attempt=2).prune() == []
    assert steps_in(tmp_path / "mirror" / "a") == [5, 10]


def test_another_checkpoint_of_the_same_step_replaces_the_first(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    commit(run, 5)
    send_all(mirror)
    record_evaluation(run.checkpoints / "step-00000005", LaterEvaluation(HELD_OUT, 1.0))
    mirror.send_evaluations()
    shutil.rmtree(run.checkpoints / "step-00000005")
    other = commit(run, 5, b"other weights", attempt=2)

    def fail(what: str, path: str) -> None:
        if what == "write" and path.endswith("rank-00001.safetensors"):
            raise PermissionError(path)

    with hooked(fail), pytest.raises(PermissionError):
        send_all(mirror)
    assert steps_in(folder) == [], "files of two checkpoints are none"
    send_all(begun(plan, run))
    assert tree(folder / "checkpoints" / "step-00000005") == tree(other.path)


def test_a_damaged_file_is_not_committed_in_the_mirror(place) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    broken = commit(run, 5)
    file = broken.path / store.shard_name(1)
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        mirror.send(broken)
    assert steps_in(folder) == []


def test_a_mirror_belongs_to_one_run_and_its_newest_attempt(place, tmp_path: Path) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    other_plan, other = make_run(tmp_path / "other", plan.config.checkpoint.mirror or "", created_at="2026-02-01T00:00:00Z")
    with pytest.raises(MirrorTaken, match="another run"):
        begun(other_plan, other)
    with pytest.raises(SubmitError, match="another run"):
        require_usable_mirror(other_plan)
    require_usable_mirror(plan)
    # The run continues elsewhere while this machine still runs it.
    shutil.copytree(run.root, tmp_path / "elsewhere")
    moved = RunDir(tmp_path / "elsewhere")
    run_store.create_attempt(moved, Attempt(resume_step=None))
    later = begun(plan, moved, attempt=2)
    assert [(folder / f"attempts/{number:03d}/attempt.json").is_file() for number in (1, 2)] == [True, True]
    with pytest.raises(MirrorTaken, match="attempt 2"):
        mirror.send(commit(run, 5))
    with pytest.raises(MirrorTaken, match="attempt 2"):
        begun(plan, run)
    commit(moved, 5, b"of attempt 2")
    send_all(later)
    assert tree(folder / "checkpoints") == tree(moved.checkpoints)
    run_store.create_attempt(moved, Attempt(resume_step=None))
    with pytest.raises(Superseded):
        later.send(commit(moved, 10))


def test_large_files_are_sent_block_by_block(place, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run, folder = place
    mirror = begun(plan, run)
    monkeypatch.setattr(remote_folder, "_BLOCK_BYTES", 2**20)
    large = commit(run, 5, bytes(48 * 2**20), num_ranks=2)
    tracemalloc.start()
    mirror.send(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert (
        atomic_files.digest_file(folder / "checkpoints/step-00000005" / store.shard_name(0))
        == large.manifest.files["rank-00000.safetensors"]
    )


def test_a_file_in_the_mirror_is_replaced_atomically(tmp_path: Path) -> None:
    place = RemoteFolder(f"faulty://{tmp_path}")
    place.write("file", b"old")
    seen = []
    with hooked(lambda what, path: seen.append(Path(path).read_bytes()) if what == "finish" else None):
        place.write("file", b"new")
    assert (seen, place.read("file")) == ([b"old"], b"new")
    assert place.names() == ["file"]


def test_the_address_is_checked_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SubmitError, match="NotADirectoryError"):
        remote_folder.require_writable(f"file://{tmp_path}/file/runs")
    with pytest.raises(SubmitError, match="nowhere"):
        remote_folder.require_writable("nowhere://runs")
    with pytest.raises(SubmitError, match="adlfs"):
        remote_folder.require_writable("abfs://container/runs")
    remote_folder.require_writable(f"file://{tmp_path}/runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_loss_that_was_computed_after_the_save_counts_where_only_the_mirror_has_the_checkpoint(tmp_path: Path) -> None:
    settings = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")
    plan, run = make_run(tmp_path, f"faulty://{tmp_path}/mirror", settings=settings)
    folder = tmp_path / "mirror" / "a"
    for step, loss in ((5, 2.0), (10, None), (15, 3.0)):
        commit(run, step, loss=loss)
    mirror = begun(plan, run)
    # Saved without a loss, as when a preemption skips the evaluation.
    later = run.checkpoints / store.step_name(10)
    assert record_evaluation(later, LaterEvaluation(HELD_OUT, 1.0))
    for checkpoint in mirror.list_missing_checkpoints():
        mirror.send(checkpoint)
    for _ in range(2):
        with finished_files() as names:
            mirror.send_evaluations()
    assert names == [], "it is sent once"
    assert tree(folder / "checkpoints" / later.name) == tree(later)
    # The next machine has fetched only the newest checkpoint.
    assert begun(plan, elsewhere(tmp_path, run, 15), attempt=2).prune() == [5]
    assert steps_in(folder) == [10, 15]


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
    for checkpoint in mirror.list_missing_checkpoints():
        mirror.send(checkpoint)
    return plan, run, there


def fetched(there: RemoteFolder, target: RunDir, step: int | None = None, said: list[str] | None = None) -> int:
    known = read_run(there)
    assert known is not None
    claim_run_dir(target, there.url)
    plans = download_fixed_files(there, known, target)
    download_progress(there, target)
    newest = download_checkpoint(there, target, step, (said if said is not None else []).append, ignore_progress)
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
        download_checkpoint(there, RunDir(tmp_path / "third"), 10, said.append, ignore_progress)


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


def test_transient_failures_are_retried_over_a_fresh_connection(tmp_path: Path, slept: list[float]) -> None:
    storage = Storage(*(OSError("not now") for _ in range(4)))
    folder = RemoteFolder(f"file://{tmp_path}")
    before = folder._fs
    assert folder._retry(storage) == "content"
    assert slept == [1, 2, 4, 8]
    # An ssh server that restarts during a run ends the connection of sftp's client.
    assert folder._fs is not before


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
