"""Commands on a run with a damaged record print one message with the file, the field and the remedy."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from launcher.plan.run_dir import RunDir

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
