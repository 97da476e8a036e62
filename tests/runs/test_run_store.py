"""A run directory is created once, replaced atomically, and found by name and by path.

Its records are read as they were written, or a damaged one is named; its code is durable and checked against its digests.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hand_made
import pytest
from mirror_tools import tree
from unusual_files import stale

from launcher.clusters import detached_process
from launcher.clusters.local import LocalCluster
from launcher.errors import RunError, SubmitError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, locks, run_records, run_store
from launcher.runs.run_records import Attempt, CancelRequest, Status


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "runs/a")


@pytest.fixture
def submitted(run: RunDir) -> RunDir:
    """The run after its first attempt has been submitted."""
    run_store.create_attempt(run, Attempt(None))
    return run


def test_a_run_is_created_with_plan_status_and_code(tmp_path: Path, whole_code: None) -> None:
    expected = hand_made.plan(tmp_path / "runs/a", hand_made.SETTINGS)
    run = run_store.create(expected)
    assert run.root == tmp_path / "runs" / "a"
    assert run_store.load_plan(run) == expected
    status = run_store.read_status(run)
    assert (status.state, status.attempt, status.step, status.max_steps) == ("pending", 0, 0, 40)
    assert status.updated_at >= status.created_at > 0
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    # The code that a queued job will run: the package with its bytecode.
    package = Path(run_store.__file__).parents[1]
    paths = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    files = {path for path in paths if path.parts[0] != "conf" and ".pyc." not in path.name}
    assert {path.relative_to(run.code / "launcher") for path in (run.code / "launcher").rglob("*") if path.is_file()} == files
    assert {Path("train/loop.py"), Path("export/model_card.md.jinja")} <= files
    # No partially written file is left.
    assert {p.name for p in run.root.iterdir()} == {"plan.json", "plans", "status.json", "code", "attempts"}


def test_a_run_that_exists_is_refused_and_untouched(run: RunDir) -> None:
    before = tree(run.root)
    with pytest.raises(SubmitError) as error:
        hand_made.run(run.root)
    (problem,) = error.value.problems
    assert problem.message == "the run a exists already; nothing in it was touched"
    assert problem.where == str(run.root)
    assert f"python -m launcher resume {run.root}" in problem.remedy
    assert tree(run.root) == before


def test_concurrent_creations_make_one_run(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def create() -> None:
        try:
            hand_made.run(tmp_path / "runs/a")
            outcomes.append("made")
        except SubmitError:
            outcomes.append("refused")

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["made", "refused", "refused", "refused"]


def test_attempts_are_numbered(run: RunDir) -> None:
    assert [run_store.create_attempt(run, Attempt(step)) for step in (None, 100, 200)] == [1, 2, 3]
    assert [run_store.read_attempt(run, attempt).resume_step for attempt in (1, 2, 3)] == [None, 100, 200]
    for name in ("notes", "²", "\u0663"):
        (run.attempts / name).mkdir()
    run.attempt(7).mkdir()
    assert run_store.create_attempt(run, Attempt(None)) == 8
    assert run.attempt(8).name == "008"


def test_an_attempt_is_created_atomically(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a process dies in between, the next one finds nothing that it cannot read."""

    def killed(path: object, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(atomic_files, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run_store.create_attempt(run, Attempt(None))
    assert run_store.newest_attempt(run) == 0
    assert run_store.create_attempt(run, Attempt(20)) == 1
    attempt = run_store.read_attempt(run, 1)
    assert replace(attempt, submitted_at=None) == Attempt(20)
    assert attempt.submitted_at == pytest.approx(time.time(), abs=60)
    assert [path.name for path in run.attempts.iterdir()] == ["001"]
    assert stat.S_IMODE(run.attempt(1).stat().st_mode) == 0o700


def test_a_superseded_attempt_is_fenced(run: RunDir) -> None:
    run_store.create_attempt(run, Attempt(None))
    run_store.fence(run, 1)
    run_store.create_attempt(run, Attempt(None))
    run_store.fence(run, 2)
    with pytest.raises(Superseded) as error:
        run_store.fence(run, 1)
    (problem,) = error.value.problems
    assert "attempt 2 has taken over" in problem.message
    assert problem.where == str(run.attempt(2))


def test_a_refresh_finds_the_attempt_that_a_stale_view_of_the_directory_lacks(run: RunDir) -> None:
    run_store.create_attempt(run, Attempt(None))
    with stale(run.attempts):
        run_store.create_attempt(run, Attempt(None))
        run_store.fence(run, 1)
        with pytest.raises(Superseded, match="attempt 2 has taken over"):
            run_store.fence(run, 1, refresh=True)
    assert sorted(path.name for path in run.attempts.iterdir()) == ["001", "002"], "it leaves nothing behind"


def test_a_storage_error_fences_only_with_refresh(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run_store.create_attempt(run, Attempt(None))
    monkeypatch.setattr(Path, "exists", failing(errno.EIO))
    run_store.fence(run, 1)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_store.fence(run, 1, refresh=True)


def test_a_reader_never_sees_a_partial_status(run: RunDir) -> None:
    message = "x" * 100_000
    stop = threading.Event()

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            run_store.update_status(run, step=step, message=message)

    run_store.update_status(run, message=message)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        steps = [run_store.read_status(run) for _ in range(200)]
    finally:
        stop.set()
        writer.join(timeout=60)
    assert all(status.message == message for status in steps)
    assert [s.step for s in steps] == sorted(s.step for s in steps)


def test_a_run_is_found_by_name_and_by_path(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    for name in ("a", "runs/a", str(run.root), "./runs/a"):
        assert run_store.find_run(name, root) == RunDir(run.root)
    assert run_store.find_run(str(run.root), tmp_path / "elsewhere") == RunDir(run.root)
    with pytest.raises(SubmitError) as error:
        run_store.find_run("b", root)
    assert "choose one of: a" in error.value.problems[0].remedy
    with pytest.raises(SubmitError) as error:
        run_store.find_run("b", tmp_path / "elsewhere")
    assert "--root" in error.value.problems[0].remedy


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for age, name in ((30, "old"), (20, "middle"), (10, "latest")):
        run = hand_made.run(tmp_path / "runs" / name)
        os.utime(run.plan, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "runs" / "no_run").mkdir()
    assert [run.root.name for run in run_store.list_runs(tmp_path / "runs")] == ["latest", "middle", "old"]
    assert list(run_store.list_runs(tmp_path / "nowhere")) == []


def test_folders_closed_to_this_user_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "theirs"):
        hand_made.run(tmp_path / "runs" / name)
    monkeypatch.setattr(Path, "is_file", failing(errno.EACCES, "theirs"))
    assert [run.root.name for run in run_store.list_runs(tmp_path / "runs")] == ["mine"]
    with pytest.raises(SubmitError, match="there is no run named b"):
        run_store.find_run("b", tmp_path / "runs")
    with pytest.raises(SubmitError, match="the run theirs cannot be read: Permission denied"):
        run_store.find_run("theirs", tmp_path / "runs")


def test_a_file_replaced_during_a_read_is_read_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is how NFS reports the replacement; any other failure is reported with its reason."""
    read_bytes, failures = Path.read_bytes, [errno.ESTALE]

    def read_or_fail(path: Path) -> bytes:
        if path == run.status and failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_fail)
    assert run_store.read_status(run).state == "pending"
    assert not failures
    failures.append(errno.EIO)
    with pytest.raises(RunError, match=f"cannot be read: {os.strerror(errno.EIO)}"):
        run_store.read_status(run)


def failing(number: int, within: str = "") -> Callable[[Path], bool]:
    """A stand-in for is_file that fails with this error, within folders of that name or anywhere."""

    def look(path: Path) -> bool:
        if within and within not in path.parts:
            return os.path.isfile(path)
        raise OSError(number, os.strerror(number))

    return look


def test_deleted_attempts_are_made_again_with_the_next_number(run: RunDir) -> None:
    for _ in range(3):
        number = run_store.create_attempt(run, Attempt(None))
        run_store.update_status(run, attempt=number)
    shutil.rmtree(run.attempts)
    assert run_store.create_attempt(run, Attempt(20)) == 4
    assert run_store.attempt_numbers(run) == [4]


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel remounts storage read-only after an error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(atomic_files, "refresh_directory", refuse)
    monkeypatch.setattr(locks, "hold", refuse)


def test_read_only_storage_is_named_in_place_of_a_missing_record(run: RunDir, request: pytest.FixtureRequest) -> None:
    job = detached_process.describe_this_process() | {"pid": 1, "started_after_boot": 1e9}
    run_store.update_status(run, state="running", attempt=1, job=job)
    status = LocalCluster().status(run)
    assert (status.state, "cannot be written" in status.message) == ("failed", False)
    request.getfixturevalue("read_only")
    assert LocalCluster().status(run).message == (
        "the node agent ended without recording a result; the run directory cannot be written (Read-only file system): "
        "check its storage, then resume the run"
    )


@pytest.mark.usefixtures("read_only")
def test_a_run_directory_that_cannot_be_written_refuses_to_start(run: RunDir) -> None:
    with (
        pytest.raises(SubmitError, match="the run directory cannot be written: Read-only file system"),
        run_store.start_lock(run),
    ):
        raise AssertionError("it is not started")


def test_a_plan_without_a_section_is_damaged(run: RunDir) -> None:
    values = json.loads(run.plan.read_text())
    values["config"]["run"] = 1e308
    run.plan.write_text(json.dumps(values))
    with pytest.raises(RunError, match="settings are missing"):
        run_store.read_placement(run)


@pytest.mark.parametrize(
    "record",
    [
        Status("running", 2, 40, 100, {"id": "41"}, "saving", 1.0, 2.0),
        Attempt(20, job="41", nodes=("n1", "n2"), port=4000, begun_at=3.0, automatic=True),
        CancelRequest(1.0, save=False),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, record: Any) -> None:
    json_records.write(tmp_path / "record.json", record)
    assert json_records.read(type(record), tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("text", "message", "field", "value"),
    [
        ('{"state": "running", "att', "Unterminated string", "", ""),
        ("[]", "is not a JSON object", "", ""),
        ('{"state": "running"}', "this field is missing", "attempt", ""),
        ('{"state": "running", "attempt": "one"}', "expected an integer", "attempt", '"one"'),
        ('{"state": "running", "attempt": 1, "job": []}', "expected an object", "job", "[]"),
    ],
)
def test_a_damaged_record_names_file_field_value_and_remedy(
    submitted: RunDir, text: str, message: str, field: str, value: str
) -> None:
    submitted.status.write_text(text)
    # With its plan, the run's status comes from its journal.
    submitted.plan.unlink()
    with pytest.raises(RunError) as refused:
        run_store.read_status(submitted)
    (problem,) = refused.value.problems
    assert message in problem.message
    assert problem.where == (f"{submitted.status}: {field}" if field else str(submitted.status))
    assert problem.value == value
    assert "backup" in problem.remedy


def test_a_missing_record_is_none_and_a_missing_status_is_an_error(submitted: RunDir) -> None:
    assert run_records.read_cancel(submitted, 1) is None
    submitted.status.unlink()
    submitted.plan.unlink()
    with pytest.raises(RunError, match="a file of the run is missing"):
        run_store.read_status(submitted)


@pytest.mark.parametrize("content", [None, "", '{"state": "runn', '{"state": "weather", "attempt": "one"}'])
def test_a_status_file_that_is_lost_is_rebuilt_from_the_journal(submitted: RunDir, content: str | None) -> None:
    def lose() -> Status:
        submitted.status.unlink() if content is None else submitted.status.write_text(content)
        return run_store.read_status(submitted)

    created = run_store.read_status(submitted)
    before = replace(lose(), updated_at=0.0, created_at=0.0)
    assert before == replace(created, updated_at=0.0, created_at=0.0)
    job = {"pid": 7, "host": "n1"}
    running = run_store.update_status(submitted, state="running", attempt=1, job=job, message="starting")
    run_store.update_status(submitted, state="saving", step=20, message="")
    run_store.update_status(submitted, state="running", step=21)
    file = submitted.journal(1) / "attempt.jsonl"
    assert len(file.read_text().splitlines()) == 1, "steps and saves are not recorded"
    assert replace(lose(), updated_at=0.0) == replace(running, updated_at=0.0)
    ended = run_store.update_status(submitted, state="completed", step=40, message="40 steps")
    assert replace(lose(), updated_at=0.0) == replace(ended, updated_at=0.0)
    assert list(run_store.list_runs(submitted.root.parent)) == [submitted]
    assert run_store.find_run(str(submitted.root), submitted.root.parent) == submitted
    # Whoever changes the status next writes the file again.
    assert run_store.update_status(submitted, message="again").state == "completed"
    assert json_records.read(Status, submitted.status).message == "again"


@dataclass(frozen=True)
class _Pair:
    first: int | str
    second: tuple[int, str]
    third: dict[str, float]


def test_unions_fixed_tuples_and_dictionaries_are_decoded() -> None:
    values = {"first": "a", "second": [1, "b"], "third": {"c": 2}}
    assert json_records.decode(_Pair, values, "here") == _Pair("a", (1, "b"), {"c": 2})
    for wrong in ({"first": 1.5}, {"second": [1]}, {"second": 1}, {"third": {"c": "2"}}):
        with pytest.raises(RunError):
            json_records.decode(_Pair, values | wrong, "here")


@pytest.fixture
def coded(tmp_path: Path) -> RunDir:
    run_store.copy_code(RunDir(tmp_path).code)
    return RunDir(tmp_path)


def test_code_of_an_earlier_launcher_is_replaced_and_kept(coded: RunDir) -> None:
    assert run_store.is_code_current(coded)
    shutil.rmtree(coded.code)
    (coded.code / "launcher").mkdir(parents=True)
    (coded.code / "launcher/__init__.py").write_text("earlier")
    assert not run_store.is_code_current(coded)
    earlier = run_store.replace_code(coded, 1)
    assert earlier == coded.root / "code-until-attempt-001"
    assert (earlier / "launcher/__init__.py").read_text() == "earlier"
    assert run_store.is_code_current(coded)
    assert (coded.code / "launcher/runs/run_store.py").is_file()


def test_code_that_does_not_know_a_setting_of_today_is_replaced(coded: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(LaunchPlan):
        setting_of_today: int = 0

    monkeypatch.setattr("launcher.plan.launch_plan.LaunchPlan", Later)
    assert not run_store.is_code_current(coded)
    run_store.replace_code(coded, 1)
    assert run_store.is_code_current(coded)


def test_replacing_code_continues_after_an_interruption(coded: RunDir) -> None:
    coded.code.rename(coded.earlier_code(1))
    (coded.root / ".code").mkdir()
    assert not run_store.is_code_current(coded)
    run_store.replace_code(coded, 1)
    assert run_store.is_code_current(coded)
    assert (coded.earlier_code(1) / "launcher/runs/run_store.py").is_file()


def test_code_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    coded = RunDir(tmp_path)
    run_store.copy_code(coded.code)
    assert {str(path) for path in (coded.code, *coded.code.rglob("*"))} <= synced
