"""A run from an earlier launcher, with a plan of schema version 1, can be read and continued.

tests/golden/earlier_run.zip holds such a run: rank 1 was killed after step 9, and the newest checkpoint is of step 6.
`expected.json` has the losses that the earlier launcher computed when it continued the run, on another CPU. Sources, tokenizer
and run directory have relative paths, so that the folder works anywhere.
"""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import losses, metrics, status

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.migrations import SCHEMA_VERSION

Launch = Callable[..., subprocess.CompletedProcess[str]]
ARCHIVE = Path(__file__).parents[1] / "golden/earlier_run.zip"
CHECKPOINT_STEP, LAST_STEP = 6, 16

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture
def project(runs: Path) -> Path:
    """The working directory of the run, with runs/run, the tokenizer and the rows."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(runs.parent)
    runs.mkdir()
    (runs.parent / "run").rename(runs / "earlier")
    return runs.parent


def test_an_earlier_run_is_read_and_resumed_with_the_same_losses(train_here: Launch, launch_here: Launch, project: Path) -> None:
    run = project / "runs/earlier"
    first_plan = (run / "plan.json").read_bytes()
    first_code = (run / "code/launcher/__init__.py").read_bytes()
    assert json.loads(first_plan)["schema_version"] == 1

    shown = launch_here("status", "earlier", cwd=project)
    assert shown.returncode == 0, shown.stderr
    assert "rank 1: killed by SIGKILL" in shown.stdout
    report = launch_here("report", "earlier", cwd=project)
    assert report.returncode == 0, report.stderr
    assert launch_here("ls", cwd=project).stdout.count("earlier") == 1
    refused = launch_here("resume", "earlier", "train.keep_last=2", cwd=project)
    assert refused.returncode == 2
    assert "checkpoint.keep_last=2" in refused.stderr

    done = train_here("resume", "earlier", f"train.max_steps={LAST_STEP}", "--follow", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing earlier from step {CHECKPOINT_STEP} of {LAST_STEP}" in done.stdout
    assert status(run)["state"] == "completed"
    expected = json.loads((project / "expected.json").read_text())
    expected_losses = {int(step): loss for step, loss in expected["losses"].items()}
    trained = {step: loss for step, loss in losses(run).items() if step > CHECKPOINT_STEP}
    # On another CPU, kernels add in a different order.
    assert trained == pytest.approx(expected_losses, rel=1e-5)

    # The first attempt's files are unchanged; the second attempt has its own plan and code.
    assert (run / "plan.json").read_bytes() == first_plan
    assert (run / "code-until-attempt-001/launcher/__init__.py").read_bytes() == first_code
    assert (run / "code/launcher/plan/migrations.py").is_file()
    second = run / "attempts/002/plan.json"
    assert json.loads(second.read_text())["schema_version"] == SCHEMA_VERSION
    config = LaunchPlan.load(second).config
    assert (config.checkpoint.save_every, config.eval.every, config.export.enabled) == (3, 4, False)

    # Both attempts are shown, including in the file that the first attempt wrote.
    assert {line["attempt"] for line in metrics(run)} == {1, 2}
    report = launch_here("report", "earlier", cwd=project)
    assert report.returncode == 0, report.stderr
    assert "rank 1: killed by SIGKILL" in (run / "report.html").read_text()
    assert launch_here("status", "earlier", "--json", cwd=project).returncode == 0
