"""An evaluation's verdict in W&B: offline files, read back with W&B's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import fake_wandb
import hand_made
import pytest
from hand_made import TOKEN, made_verdict
from plan_fixtures import PlanOf

from launcher.cli.follow import wandb_page
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events
from launcher.tracking.wandb import tracker


def evaluated(plan: LaunchPlan, state: str) -> RunDir:
    """A run in this state with a verdict for step 40."""
    run = hand_made.run(plan, state=state)
    folder = run.root / "evaluations/step-00000040/support"
    folder.mkdir(parents=True)
    made_verdict().write(folder)
    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_summary_and_answers(make_plan: PlanOf, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = evaluated(make_plan(mode="offline"), "completed")
    earlier = run.root / "evaluations/step-00000020/support"
    earlier.mkdir(parents=True)
    made_verdict().write(earlier)
    assert tracker.main(str(run.root), "40") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"W&B: the verdict is in the summary of the files in {run_dir}/wandb/offline-run-")
    assert told.strip().endswith(f"; python -m launcher status {run_dir} shows the command that uploads them")
    command = wandb_page(read_events(run.events))["sync_command"]
    assert command.startswith(f"wandb sync --include-online {run_dir}/wandb/offline-run-")
    summary: dict[str, object] = {}
    for record in fake_wandb.records(run_dir):
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    assert str(summary["verdict/support"]).startswith("Fine-tuning helped: exact match 0.31 against 0.12 (0-shot)")
    assert (summary["verdict/support/outcome"], summary["verdict/step"], summary["state"]) == ("better", 40, "completed")
    assert summary["eval/support/exact_match"] == pytest.approx(0.31)
    assert summary["eval/support/exact_match/8-shot"] == pytest.approx(0.19)
    (file,) = run_dir.glob("wandb/offline-run-*/files/media/table/verdict/support/answers_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["comparison", "prompt", "reference", "0-shot", "8-shot", "tuned"]
    assert [row[0] for row in table["data"][:3]] == ["win, 0-shot"] * 3
    assert TOKEN not in file.read_text()
    (file,) = run_dir.glob("wandb/offline-run-*/files/media/table/verdict/support/steps_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["step", "exact_match, 0-shot", "exact_match, 8-shot", "exact_match, tuned", "outcome"]
    assert table["data"] == [[step, "0.120", "0.190", "0.310", "better"] for step in ("20", "40")]


@pytest.mark.parametrize(
    ("tracking", "state", "line"),
    [
        ({"mode": "disabled"}, "completed", ""),
        ({"kind": "none"}, "completed", ""),
        ({"mode": "offline"}, "running", "W&B: the verdict is not sent because the run is running"),
    ],
)
def test_where_nothing_is_sent(
    make_plan: PlanOf, tracking: dict[str, str], state: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(make_plan(**tracking), state)
    assert tracker.main(str(run.root), "40") == 0
    out = capsys.readouterr().out
    assert out.startswith(line)
    assert bool(out) == bool(line)
    assert not (run.root / "wandb").exists()


def test_a_refusing_server_is_one_line(make_plan: PlanOf, capsys: pytest.CaptureFixture[str]) -> None:
    """W&B is online but not logged in."""
    run = evaluated(make_plan(mode="online"), "completed")
    assert tracker.main(str(run.root), "40") == 0
    out = capsys.readouterr().out
    assert out.startswith("W&B: the verdict is not sent: ")
    assert len(out.splitlines()) == 1
