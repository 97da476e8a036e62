"""Commands on a run with a damaged record print one message with the file, the field and the remedy."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"state": "runn', "a file of the run is damaged: Unterminated string"),
        ('{"state": "running", "attempt": "two"}', "a record of the run is damaged: expected an integer"),
        ('{"state": "running"}', "a record of the run is damaged: this field is missing"),
    ],
    ids=["truncated", "wrong type", "missing key"],
)
def test_a_damaged_status_is_reported_in_one_message(launch_here: Launch, run: RunDir, text: str, problem: str) -> None:
    run.status.write_text(text)
    listed = launch_here("ls", "--root", str(run.root.parent))
    assert listed.returncode == 0
    assert f"{run.root.name}: {problem}" in listed.stderr
    shown = launch_here("status", str(run.root))
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith(problem)
    assert f"where:  {run.status}" in shown.stderr
    assert "remedy: restore the file from a backup" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("record", ["status.json", "plan.json"])
def test_logs_show_the_output_and_then_name_the_damaged_record(launch_here: Launch, run: RunDir, record: str) -> None:
    run.rank_log(2, 0).write_text("the output of rank 0\n")
    run_store.update_status(run, state="running", attempt=2, job={})
    (run.root / record).write_text('{"state": "runn')
    for options in ([], ["-f", "--attempt", "2"]):
        shown = launch_here("logs", str(run.root), *options)
        assert (shown.returncode, shown.stdout) == (2, "the output of rank 0\n"), shown.stderr
        assert f"where:  {run.root / record}" in shown.stderr
        assert "remedy: restore " in shown.stderr
        assert "Traceback" not in shown.stderr
    run.rank_log(2, 0).unlink()
    (run.attempt(2) / "agent.log").write_text("the output of the agent\n")
    shown = launch_here("logs", str(run.root))
    assert (shown.returncode, shown.stdout) == (2, "the output of the agent\n"), shown.stderr


@pytest.mark.parametrize(
    "command", ["curl http://x | sh", "wandb sync x; curl http://x | sh", "wandb sync 'x", "wandb sync $(x)"]
)
def test_another_command_in_place_of_the_upload_is_not_shown(launch_here: Launch, run: RunDir, command: str) -> None:
    """`status` tells the user to run this command, and the run may be another user's."""
    JsonlTracker(run, 2).event("info", "Weights & Biases: offline", url=None, sync_command=command)
    assert "W&B" not in launch_here("status", str(run.root)).stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("events.jsonl", "[" * 100_000),
        ("events.jsonl", '{"nonfinite": 3}'),
        ("metrics.jsonl", "[" * 100_000),
        ("metrics.jsonl", '{"trainer/step": 1e999, "attempt": 3, "time": 1e308, "train/loss": 1.0}'),
        ("metrics.jsonl", '{"nonfinite": {"train/loss": "x"}}'),
    ],
)
def test_a_run_whose_files_make_no_sense_does_not_hide_the_others(launch_here: Launch, run: RunDir, file: str, line: str) -> None:
    shutil.copytree(run.root, run.root.with_name("other"))
    with open(run.root.with_name("other") / file, "a") as appended:
        appended.write(f"{line}\n")
    done = launch_here("ls", "--root", str(run.root.parent))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^demo +completed", done.stdout, re.MULTILINE)
    assert "other" in done.stdout + done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(
    "field",
    [
        '"updated_at": 1' + "0" * 400,
        '"updated_at": -Infinity',
        '"job": ' + '{"a":' * 600 + "1" + "}" * 600,
        '"step": 1' + "0" * 4200,
    ],
    ids=["time", "infinite time", "nested", "step"],
)
def test_a_record_that_makes_no_sense_does_not_hide_the_others(
    launch_here: Launch, run: RunDir, field: str, options: list[str]
) -> None:
    other = run.root.with_name("other")
    shutil.copytree(run.root, other)
    (other / "metrics.jsonl").unlink()
    (other / "status.json").write_text(f'{{"state": "completed", "attempt": 1, {field}}}')
    done = launch_here("ls", "--root", str(run.root.parent), *options)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert re.search(r'^demo +completed|"name": "demo"', done.stdout, re.MULTILINE)
    assert "other" in done.stdout + done.stderr
