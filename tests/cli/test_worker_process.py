"""The processes of commands: what they may not open to others, and a failure without a message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hand_made
import pytest

from launcher.cli import schema
from launcher.cli.main import main
from launcher.cli.worker_process import run_worker, run_worker_module
from launcher.config.schema import RunConfig
from launcher.errors import RunError


def test_the_message_names_the_process_that_failed() -> None:
    config = RunConfig.model_validate(hand_made.SETTINGS)
    with pytest.raises(RunError, match=r"python -m launcher\.worker\.absent ended with exit code 1; its messages are above"):
        run_worker_module("launcher.worker.absent", config)


def test_the_umask_does_not_open_what_a_command_creates_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With umask 002, a group's members could put links into the Hub's cache during a download, which a command begins too."""
    code = "import os; print(os.umask(0))"

    def run(verb: str, tokens: list[str]) -> int:
        mask = os.umask(0o777)
        os.umask(mask)
        assert run_worker([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)[1].strip() == str(mask)
        return mask

    def umask_of_command(umask: int, trusted: str) -> str:
        monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", trusted)
        mask = os.umask(umask)
        try:
            return oct(main(["schema"]))
        finally:
            assert os.umask(mask) == umask, "it is restored at the end"

    monkeypatch.setattr(schema, "run", run)
    assert umask_of_command(0o002, "") == "0o22"
    assert umask_of_command(0o002, f"group:{os.getgid()}") == "0o2"
    assert umask_of_command(0o077, "") == "0o77"
    assert umask_of_command(0o000, "anyone") == "0o0"


def test_an_unknown_owner_stops_no_command_that_needs_no_owners(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shell settings may be used on another machine; there, `--help` and `config` still work."""
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "no-such-user")
    mask = os.umask(0o002)
    try:
        monkeypatch.setattr(schema, "run", lambda *_: os.umask(0o077))
        assert main(["schema"]) == 0o022
    finally:
        os.umask(mask)
    assert capsys.readouterr().err == ""


def test_relative_paths_in_variables_start_from_the_working_directory_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks work in the run directory: there, a relative HF_HOME would have no token when the run ends with a push."""
    given = {"HF_HOME": "./hf", "PYTHONPATH": "/packages:own::../src", "NETRC": "~/netrc", "LAUNCHER_CACHE": "/cache:a/../b"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schema, "run", lambda *_: 0)
    assert main(["schema"]) == 0
    changed = {"HF_HOME": f"{tmp_path}/hf", "PYTHONPATH": f"/packages:{tmp_path}/own::{tmp_path.parent}/src"}
    assert {name: os.environ[name] for name in given} == {**given, **changed}
