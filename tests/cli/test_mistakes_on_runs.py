"""Mistakes in commands on runs: one message with place, value and remedy, exit code 2, and no files left behind."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest

from launcher import atomic_files, run_store
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir

Launch = Callable[..., subprocess.CompletedProcess[str]]
Refuse = Callable[..., str]


@pytest.fixture
def refuse(launch_here: Launch, run: RunDir) -> Refuse:
    """Run a command in the folder above the runs; check that it refuses and changes nothing. Returns standard error."""

    def files() -> dict[Path, int]:
        # Lock files stay after the lock is released.
        paths = (path for path in run.root.parent.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in paths}

    def refused(*arguments: str) -> str:
        before = files()
        done = launch_here(*arguments, cwd=run.root.parent.parent)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert "where:  " in done.stderr
        assert "remedy: " in done.stderr
        assert files() == before
        return done.stderr

    return refused


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("status", ["RUN"]),
        ("status dem", ["did you mean demo?"]),
        ("status demo --root elsewhere", ["--root"]),
        ("logs runs/demo/attempts/001", ["/runs/demo"]),
        ("status demo --wach", ["--wach", "--watch"]),
        ("resume demo --step x", ["--step", "'x'"]),
        ("resume demo --step 7", ["choose one of: 5, 10"]),
        ("export demo --dtype bf61", ["--dtype", "bf16"]),
        ("export demo --step 7", ["choose one of: 5, 10"]),
        ("logs demo --attempt 3 -f", ["choose one of: 1, 2"]),
        ("logs demo --rank 2 -f", ["--rank"]),
        ("cancel demo", ["completed"]),
        ("drill --fault hnag", ["--fault", "hang"]),
        ("ls --root elsewhere", ["value:  elsewhere"]),
        ("ls --root runs/demo", ["python -m launcher status runs/demo"]),
        ("ls oci://bucket/runs", ["command line", "ocifs"]),
    ],
)
def test_a_mistyped_command_is_answered_with_what_exists(refuse: Refuse, command: str, parts: list[str]) -> None:
    text = refuse(*shlex.split(command))
    for part in parts:
        assert part in text


@pytest.mark.parametrize("verb", ["logs", "resume", "export"])
@pytest.mark.parametrize("content", [None, '{"run_na'], ids=["missing", "half"])
def test_a_plan_that_is_missing_or_damaged_is_restored_by_the_command_that_is_named(
    refuse: Refuse, launch_here: Launch, run: RunDir, verb: str, content: str | None
) -> None:
    text = run.plan.read_text()
    run.plan.unlink() if content is None else run.plan.write_text(content)
    message = refuse(verb, "demo")
    assert ("has no plan.json" if content is None else f"where:  {run.plan}") in message
    command = re.search(r"remedy: restore it with: (cp .*)", message)
    assert command is not None
    subprocess.run(shlex.split(command[1]), check=True, timeout=10)
    assert run.plan.read_text() == text


@pytest.mark.parametrize("verb", ["status", "resume"])
@pytest.mark.parametrize("content", [None, '{"state": "runn'], ids=["missing", "half"])
def test_a_status_that_is_missing_or_half_written_is_named(refuse: Refuse, run: RunDir, verb: str, content: str | None) -> None:
    run.status.unlink() if content is None else run.status.write_text(content)
    run.rank_log(2, 0).touch()
    text = refuse(verb, "demo")
    assert "status.json" in text
    assert f"python -m launcher model.path=run:{run.root} ..." in text


def test_an_export_without_a_checkpoint_names_what_to_do(refuse: Refuse, run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)
    assert "python -m launcher resume runs/demo" in refuse("export", "demo")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_a_run_directory_that_cannot_be_completed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """An incomplete run directory would keep its name in use."""

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(atomic_files, "write_text", fail)
    plan = hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS)
    with pytest.raises((SubmitError, KeyboardInterrupt)) as raised:
        run_store.create(plan)
    if isinstance(error, OSError):
        assert "the run directory cannot be written: No space left on device" in str(raised.value)
        assert "set run.root to a folder on another disk" in str(raised.value)
    assert [*(tmp_path / "runs").iterdir()] == []
