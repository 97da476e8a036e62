"""Who holds a run while an attempt of it is started: told by the process itself, and forgotten when it is dead."""

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
from launcher.holder import Holder, held, holder_of, pid_space

REPO = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from launcher.holder import held
with held(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `folder`; killed at the end."""
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
    with pytest.raises(SubmitError) as error, held(folder, 0):
        pytest.fail("the lock is held twice")
    (problem,) = error.value.problems
    assert problem.what == "another command is starting this run at this moment"
    assert problem.where == str(folder)
    assert problem.remedy
    return str(problem)


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    before = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    with another(tmp_path, "resume", "run.name=a") as process:
        text = refusal(tmp_path)
        found = holder_of(tmp_path)
    for part in (f"process {process.pid} on {os.uname().nodename}, of user {getpass.getuser()}", "resume run.name=a"):
        assert part in text
    assert f"kill {process.pid}" in text
    assert found is not None
    after = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    assert f"since {before}" in text or f"since {after}" in text


def test_a_holder_that_was_killed_holds_nothing_and_is_not_named(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.kill()
        process.wait(timeout=10)
    assert (tmp_path / ".lock.json").is_file(), "it had no time to clear away"
    assert holder_of(tmp_path) is None
    with FileLock(tmp_path / ".lock", timeout=0):
        # Held by somebody who has not said who he is: the dead one is not blamed.
        text = refusal(tmp_path)
    assert "process" not in text
    with held(tmp_path, 0):
        found = holder_of(tmp_path)
        assert found is not None
        assert found.pid == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_the_number_of_a_dead_process_may_be_another_ones(tmp_path: Path) -> None:
    holder = Holder.this_process()
    (tmp_path / ".lock.json").write_text(json.dumps(asdict(holder)))
    assert holder_of(tmp_path) == holder
    earlier = replace(holder, started=holder.started - 100)
    (tmp_path / ".lock.json").write_text(json.dumps(asdict(earlier)))
    assert holder_of(tmp_path) is None
    # What runs on another machine cannot be seen from here.
    elsewhere = replace(earlier, space="another boot or container, of a machine of the same name")
    (tmp_path / ".lock.json").write_text(json.dumps(asdict(elsewhere)))
    assert holder_of(tmp_path) == elsewhere


@pytest.mark.skipif(os.geteuid() != 0, reason="root makes namespaces")
def test_a_container_of_this_machine_has_its_name_and_other_processes() -> None:
    """A dead holder there may have the number of a process here, and a living one none at all."""
    code = "import os; from launcher.holder import pid_space; print(os.uname().nodename); print(pid_space())"
    there = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    name, space = there.stdout.splitlines()
    assert name == os.uname().nodename
    assert space != pid_space()
    assert space.split()[0] == pid_space().split()[0], "it is the same boot of the same machine"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_damaged_name_is_no_name(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock.json").write_text(content)
    assert holder_of(tmp_path) is None


def test_no_credential_of_the_command_line_is_told(tmp_path: Path) -> None:
    token = "hf_" + "Canary" * 5
    with another(tmp_path, token):
        assert token not in refusal(tmp_path)
        assert token not in (tmp_path / ".lock.json").read_text()


def test_one_waits_for_the_other(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.terminate()
        with held(tmp_path, 10):
            assert holder_of(tmp_path) is not None
