"""A lock names its holder, and a process that has ended holds no lock."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from filelock import FileLock

from launcher.errors import SubmitError
from launcher.locks import Holder, hold, pid_namespace, read_holder
from launcher.plan.run_dir import RunDir
from launcher.run_store import start_lock, start_lock_holder

REPO = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from launcher.security.redaction import redacted_command_line
from launcher.locks import hold
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
        holder = start_lock_holder(RunDir(tmp_path))
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
    code = "import os; from launcher.locks import pid_namespace; print(os.uname().nodename); print(pid_namespace())"
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
