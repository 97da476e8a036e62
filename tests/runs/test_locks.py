"""A lock names its holder, and a process that has ended holds no lock.

Files and directories are complete or absent after a crash.
"""

from __future__ import annotations

import getpass
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from steps import start_of_process

from launcher.clusters import detached_process
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files
from launcher.runs.locks import Holder, hold, is_same_start, pid_namespace, read_holder, read_start
from launcher.runs.run_records import Status
from launcher.runs.run_store import start_lock

REPO = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from launcher.security.redaction import redacted_command_line
from launcher.runs.locks import hold
with hold(Path(sys.argv[1]) / ".lock", 0, redacted_command_line()):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `folder`; it is killed at the end."""
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", HOLD, str(folder), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close() if process.stdout else None


def refusal(folder: Path) -> str:
    with pytest.raises(SubmitError) as error, start_lock(RunDir(folder)):
        pytest.fail("two processes hold the lock")
    (problem,) = error.value.problems
    assert problem.message == "another command is starting this run right now"
    assert problem.where == str(folder)
    assert problem.remedy
    return str(problem)


def test_the_error_names_the_process_that_starts_the_run(tmp_path: Path) -> None:
    before = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    with another(tmp_path, "resume", "run.name=a") as process:
        text = refusal(tmp_path)
        holder = read_holder(RunDir(tmp_path).lock)
    for part in (f"process {process.pid} on {os.uname().nodename}, of user {getpass.getuser()}", "resume run.name=a"):
        assert part in text
    assert f"kill {process.pid}" in text
    assert holder is not None
    after = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    assert f"since {before}" in text or f"since {after}" in text


def test_a_killed_holder_is_neither_an_obstacle_nor_named(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.kill()
        process.wait(timeout=10)
    assert (tmp_path / ".lock.json").is_file(), "a killed process does not clean up"
    assert read_holder(tmp_path / ".lock") is None
    with FileLock(tmp_path / ".lock", timeout=0):
        # The holder has published no identity, and the identity on disk is that of the dead process.
        text = refusal(tmp_path)
    assert "process" not in text
    with hold(tmp_path / ".lock", 0, "pytest"):
        holder = read_holder(tmp_path / ".lock")
        assert holder is not None
        assert holder.pid == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_a_reused_pid_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    holder = Holder.this_process("pytest")
    (tmp_path / ".lock.json").write_text(json.dumps(asdict(holder)))
    assert read_holder(tmp_path / ".lock") == holder
    earlier = replace(holder, started=holder.started - 100)
    (tmp_path / ".lock.json").write_text(json.dumps(asdict(earlier)))
    assert read_holder(tmp_path / ".lock") is None
    # Processes on another machine cannot be seen from here.
    elsewhere = replace(earlier, space="another boot or container, of a machine of the same name")
    (tmp_path / ".lock.json").write_text(json.dumps(asdict(elsewhere)))
    assert read_holder(tmp_path / ".lock") == elsewhere


@pytest.mark.skipif(os.geteuid() != 0, reason="root makes namespaces")
def test_containers_of_one_machine_have_different_pid_namespaces() -> None:
    """The PID of a holder in another container may belong to a different process here, or to none."""
    code = "import os; from launcher.runs.locks import pid_namespace; print(os.uname().nodename); print(pid_namespace())"
    there = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    name, space = there.stdout.splitlines()
    assert name == os.uname().nodename
    assert space != pid_namespace()
    assert space.split()[0] == pid_namespace().split()[0], "it is the same boot of the same machine"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_damaged_identity_names_no_holder(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock.json").write_text(content)
    assert read_holder(tmp_path / ".lock") is None


def test_credentials_on_the_command_line_are_redacted(tmp_path: Path) -> None:
    token = "hf_" + "Canary" * 5
    with another(tmp_path, token):
        assert token not in refusal(tmp_path)
        assert token not in (tmp_path / ".lock.json").read_text()


def test_hold_waits_until_the_holder_ends(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.terminate()
        with hold(tmp_path / ".lock", 10, "pytest"):
            assert read_holder(tmp_path / ".lock") is not None


@pytest.fixture
def set_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """After this, the machine's clock is an hour ahead, as far as psutil knows."""
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert psutil.boot_time() == booted + 3600


def test_a_process_is_known_by_its_start_after_the_clock_was_set(request: pytest.FixtureRequest) -> None:
    holder, job = Holder.this_process("pytest"), detached_process.describe_this_process()
    status = Status("running", 1, job=job)
    request.getfixturevalue("set_the_clock")
    assert psutil.Process().create_time() - job["started"] == pytest.approx(3600)
    assert not holder.has_ended
    found = detached_process.find_process(status)
    assert found is not None
    assert found.pid == os.getpid()
    # Another process with this pid:
    assert replace(holder, started=holder.started - 1).has_ended
    assert (
        detached_process.find_process(replace(status, job={**job, "started_after_boot": job["started_after_boot"] - 1})) is None
    )


def test_a_process_that_has_ended_has_no_start() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert read_start(process.pid) is None
    assert read_start(process.pid) is None


def test_starts_are_compared_with_a_tolerance_below_the_time_in_which_pids_are_reused() -> None:
    assert is_same_start(8.0, 8.02)
    assert not is_same_start(8.0, 8.6)


def test_the_start_of_a_process_in_time_of_day_is_exact() -> None:
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        after = time.time()
        started = start_of_process(process.pid)
        process.kill()
    # The kernel counts in ticks of 0.01 s.
    assert before - 0.02 <= started <= after + 0.02


def test_a_failed_write_leaves_the_previous_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    atomic_files.write_json(file, {"step": 1})

    def no_space(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="No space"):
            atomic_files.write_json(file, {"step": 2})
    assert json.loads(file.read_text()) == {"step": 1}
    with pytest.raises(TypeError):
        atomic_files.write_json(file, {"step": object()})
    assert json.loads(file.read_text()) == {"step": 1}
    atomic_files.write_json(file, {"step": 3})
    assert json.loads(file.read_text()) == {"step": 3}
    assert list(tmp_path.iterdir()) == [file]


def test_file_and_directory_are_fsynced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_files.write_text(tmp_path / "file", "text")
    assert calls == ["fsync file", "replace", "fsync directory"]


def test_permissions_are_those_asked_for(tmp_path: Path) -> None:
    atomic_files.write_bytes(tmp_path / "private", b"rows", mode=0o600)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    (tmp_path / "plain").write_bytes(b"")
    atomic_files.write_bytes(tmp_path / "public", b"")
    assert (tmp_path / "public").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_rename_refuses_a_directory_with_content(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        atomic_files.rename(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/file").read_text() == "target"


def test_replace_directory_removes_the_previous_one(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    atomic_files.replace_directory(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/file").read_text() == "source"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
