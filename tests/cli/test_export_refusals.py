"""`export` refuses invalid requests before it writes anything, and reports what an existing folder contains."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from forked import Launch

from launcher.cli import export
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import EXPORT_RECORD, ExportRecord


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the worker commands instead of running them: an export needs a trained model and torch."""
    started: list[list[str]] = []

    def record(command: list[str]) -> tuple[int, str]:
        started.append(command)
        return 0, ""

    monkeypatch.setattr(export, "run_worker", record)
    return started


def hold_export(folder: Path, step: int, dtype: str) -> None:
    """Create the record of an export written two hours ago."""
    folder.mkdir()
    json_records.write(folder / EXPORT_RECORD, ExportRecord(step, "d", dtype))
    os.utime(folder / EXPORT_RECORD, (time.time() - 7230,) * 2)


def test_another_type_or_an_earlier_step_is_refused_with_what_the_folder_holds(
    launch_here: Launch, run: RunDir, commands: list[list[str]]
) -> None:
    hold_export(run.export, 10, "bf16")
    for words, value, beside in (
        (("--dtype", "fp32"), "asked for: step 10 in fp32", "export-step10-fp32"),
        (("--step", "5"), "asked for: step 5 in bf16", "export-step5-bf16"),
    ):
        refused = launch_here("export", str(run.root), *words)
        assert refused.returncode == 2
        assert "the export folder holds another export: step 10 in bf16, written 2h00m ago" in refused.stderr
        assert f"where:  {run.export}" in refused.stderr
        assert value in refused.stderr
        assert f"--out {run.root / beside}, or replace it with --replace" in refused.stderr
    assert commands == []
    assert launch_here("export", str(run.root), "--dtype", "fp32", "--out", str(run.root / "beside")).returncode == 0
    replaced = launch_here("export", str(run.root), "--dtype", "fp32", "--replace")
    assert replaced.stdout == "replacing the export of step 10 in bf16, written 2h00m ago\n"
    assert len(commands) == 2


def test_a_newer_step_replaces_the_export_in_its_type(launch_here: Launch, run: RunDir, commands: list[list[str]]) -> None:
    hold_export(run.export, 5, "fp32")
    done = launch_here("export", str(run.root))
    assert (done.returncode, done.stdout) == (0, "replacing the export of step 5 in fp32, written 2h00m ago\n")
    assert commands[0][-4:] == ["--step", "10", "--dtype", "fp32"]


def test_a_disk_without_room_is_refused(launch_here: Launch, run: RunDir, commands: list[list[str]]) -> None:
    plan = run_store.load_plan(run)
    larger = plan.model_copy(update={"model": plan.model.model_copy(update={"num_params": 10**15})})
    run.plan.write_text(larger.to_json())
    refused = launch_here("export", str(run.root), "--dtype", "fp32")
    assert refused.returncode == 2
    assert refused.stderr.startswith("the disk of the export folder has no room for its weights\n")
    assert "value:  needed 3,725,290.30 GiB, available " in refused.stderr
    assert commands == []


def test_a_folder_that_cannot_be_written_or_holds_other_files_is_refused(
    launch_here: Launch, run: RunDir, commands: list[list[str]], tmp_path: Path
) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.touch()
    other.mkdir()
    (other / "thesis.tex").touch()
    for out, message in (
        (file / "out", "the export folder cannot be written"),
        (file, "the export folder cannot be written"),
        (other, "the export folder holds files that are not an export"),
    ):
        refused = launch_here("export", str(run.root), "--out", str(out))
        assert refused.returncode == 2
        assert refused.stderr.startswith(message), out
        assert "remedy: name another folder with --out" in refused.stderr
    assert commands == []
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
