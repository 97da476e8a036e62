"""The `export` command on a run, and the model card that it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plan_fixtures import DATA
from safetensors.torch import load_file
from shard_tools import engine_metadata, flip_bit, plan_of, with_metadata

from launcher.checkpoint import store
from launcher.worker import export as command


@pytest.fixture
def run(runs, tmp_path: Path) -> Path:
    """A run directory with checkpoints of the bf16 engine; the newest has the engine's digests."""
    path = tmp_path / "run"
    shutil.copytree(store.get_at_step(runs.checkpoints("bf16"), 0).path, path / "checkpoints" / "step-00000000")
    newest = store.get_at_step(runs.checkpoints("bf16"), 2).path
    with_metadata(newest, path / "checkpoints", engine_metadata(runs.dump("bf16", "saved"), "bf16", 2))
    (path / "plan.json").write_text(plan_of(path).to_json())
    return path


def test_the_command(runs, run, tmp_path, capsys):
    command_line = [sys.executable, "-m", "launcher.worker.export", str(run / "plan.json")]
    result = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert f"exported step 2 to {run / 'export'}" in result.stdout
    assert "over 24 tokens: mean KL" in result.stdout
    weights = load_file(run / "export" / "model.safetensors")
    assert f"all {len(weights)} tensors equal the engine's" in result.stdout
    trained = load_file(runs.dump("bf16", "saved"))
    assert all((tensor == trained[f"{name}|compute"]).all() for name, tensor in weights.items())

    plan = str(run / "plan.json")
    assert command.main([plan, "--step", "3"]) == 1
    assert "choose one of: 0, 2" in capsys.readouterr().err
    assert command.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_skipped_checks_are_reported(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step-00000002"
    plain = with_metadata(checkpoint, tmp_path)
    shutil.rmtree(checkpoint)
    plain.rename(checkpoint)
    assert command.main([str(run / "plan.json"), "--no-check"]) == 0
    said = capsys.readouterr().out
    assert "digests: not compared" in said
    assert "not loaded by transformers: not asked for" in said


def test_an_export_elsewhere_is_readable_for_its_user_alone(run, tmp_path):
    mask = os.umask(0o022)
    try:
        assert command.main([str(run / "plan.json"), "--no-check", "--out", str(tmp_path / "elsewhere")]) == 0
    finally:
        assert os.umask(mask) == 0o022
    folder = tmp_path / "elsewhere"
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert (folder.stat().st_mode & 0o777, modes) == (0o700, {0o600})


def test_a_damaged_checkpoint_is_refused_before_writing(run, tmp_path, capsys):
    flip_bit(run / "checkpoints" / "step-00000002", 1, "model.norm.weight|exp_avg", bit=3)
    arguments = [str(run / "plan.json"), "--no-check", "--out", str(tmp_path / "elsewhere")]
    assert command.main([*arguments, "--dtype", "fp32"]) == 1
    assert "digest differs" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_the_exported_template_is_the_one_that_rendered_the_data(run, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("of the file")
    plan = plan_of(run)
    config = plan.config.model_copy(update={"data": plan.config.data.model_copy(update={"chat_template": str(file)})})
    data = DATA.model_copy(update={"chat_template": "of the plan"})
    (run / "plan.json").write_text(plan.model_copy(update={"config": config, "data": data}).to_json())
    made = command.export_run(run / "plan.json", step=2, dtype="bf16", out=None, check=False)
    assert (made.path / "chat_template.jinja").read_text() == "of the plan"


def test_the_card_describes_the_attempt_that_saved(run):
    attempt = run / "attempts" / "001"
    attempt.mkdir(parents=True)
    plan = plan_of(run)
    changed = plan.config.model_copy(update={"optim": plan.config.optim.model_copy(update={"lr": 7e-6})})
    (attempt / "plan.json").write_text(plan.model_copy(update={"config": changed}).to_json())
    lines = [{"trainer/step": step, "attempt": 1, "train/loss": 3.0 - step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = command.export_run(run / "plan.json", step=2, dtype="bf16", out=None, check=False)
    card = (made.path / "README.md").read_text()
    assert "7e-06 at its peak" in card
    assert "settings of optim differed in earlier attempts" in card
    assert "| training, step 2 | 1.0000 |" in card
