"""The processes of commands: a failure without a message."""

from __future__ import annotations

import os
from pathlib import Path

import hand_made
import pytest

from launcher.cli import config
from launcher.cli.main import main
from launcher.cli.worker_process import run_worker_module
from launcher.config.schema import RunConfig
from launcher.errors import RunError


def test_the_message_names_the_process_that_failed() -> None:
    settings = RunConfig.model_validate(hand_made.SETTINGS)
    with pytest.raises(RunError, match=r"python -m launcher\.worker\.absent ended with exit code 1; its messages are above"):
        run_worker_module("launcher.worker.absent", settings)


def test_relative_paths_in_variables_start_from_the_working_directory_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks work in the run directory: there, a relative HF_HOME would have no token when the run ends with a push."""
    given = {"HF_HOME": "./hf", "PYTHONPATH": "/packages:own::../src", "NETRC": "~/netrc", "LAUNCHER_CACHE": "/cache:a/../b"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "print_schema", lambda _: 0)
    assert main(["schema"]) == 0
    changed = {"HF_HOME": f"{tmp_path}/hf", "PYTHONPATH": f"/packages:{tmp_path}/own::{tmp_path.parent}/src"}
    assert {name: os.environ[name] for name in given} == {**given, **changed}
