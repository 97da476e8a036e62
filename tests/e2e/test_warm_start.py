"""A run that begins with another run's weights: the same loss before its first step, and its origin on record."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import TINY, metrics, status

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = tuple(s for s in TINY if s != "tracking=none")
# The preset draws random weights and names its own tokenizer.
WARM = ("model.init=pretrained", "model.config=null", "model.tokenizer=null")
# The rounding of a bf16 weight moves this loss of 10.8 in its fifth digit; three steps of training by a hundred times that.
SAME_LOSS = 1e-4


def held_out(run: Path) -> list[float]:
    return [m["eval/held_out/loss"] for m in metrics(run) if "eval/held_out/loss" in m]


def plan(run: Path) -> dict[str, Any]:
    return json.loads((run / "plan.json").read_text())


def manifest(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())


def wandb_lineage(run: Path) -> dict[str, Any]:
    """What W&B was told of the run's origin."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return next(r["run"]["config"]["update"]["lineage"] for r in records if r["type"] == "run")


@pytest.fixture(scope="module")
def source(launch: Launch, module_runs: Path) -> Path:
    """Three steps at a rate that shows, with checkpoints of the steps 2 and 3 and an export."""
    settings = ("train.max_steps=3", "checkpoint.save_every=2", "checkpoint.keep_last=2", "optim.lr=1e-2", "tracking=none")
    done = launch(*SETTINGS, *settings, f"run.root={module_runs}", "run.name=source")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(held_out(module_runs / "source")) == 2
    return module_runs / "source"


@pytest.fixture(scope="module")
def warm(launch: Launch, source: Path) -> tuple[Path, str]:
    """Begun with the newest checkpoint of `source`, on other rows, with W&B's files; its output."""
    settings = ("train.max_steps=2", "tracking.mode=offline", "export.enabled=false", "run.seed=7")
    done = launch(*SETTINGS, *WARM, *settings, "model.path=run:source", f"run.root={source.parent}", "run.name=warm")
    assert done.returncode == 0, done.stdout + done.stderr
    return source.parent / "warm", done.stdout


def test_the_first_loss_is_the_sources_last(source: Path, warm: tuple[Path, str]) -> None:
    before, after = held_out(source)
    first = held_out(warm[0])[0]
    assert abs(before - after) > 100 * SAME_LOSS, "the source has learned something"
    assert first == pytest.approx(after, abs=SAME_LOSS)


def test_the_origin_stands_in_the_plan_on_the_screen_and_in_wandb(source: Path, warm: tuple[Path, str]) -> None:
    run, output = warm
    recorded = plan(run)["lineage"]
    assert recorded == {
        "run_name": "source",
        "run_dir": str(source),
        "step": 3,
        "plan_digest": manifest(source, 3)["plan_digest"],
        "wandb_id": plan(source)["wandb_id"],
        "ancestors": [],
    }
    assert plan(source)["lineage"] is None
    # The step was open on the command line and is not in the plan.
    assert plan(run)["config"]["model"]["path"] == f"run:{source}@3"
    assert "lineage    begins with run source at step 3\n" in output
    told = wandb_lineage(run)
    assert {name: told.get(name) for name in recorded} == recorded


def test_the_weights_are_the_plans_own(source: Path, warm: tuple[Path, str]) -> None:
    """The source may go on, replace its export and remove its checkpoint: what a queued job will read stays."""
    folder = Path(plan(warm[0])["model"]["path"])
    assert source not in folder.parents
    assert (folder / "model.safetensors").read_bytes() == (source / "export/model.safetensors").read_bytes()
    assert plan(warm[0])["model"]["tokenizer_path"] == str(folder)
    assert not list(folder.parent.glob(f".{folder.name}-*")), "nothing half made is left"


def test_a_second_generation_from_a_chosen_step_and_a_path(launch: Launch, source: Path, warm: tuple[Path, str]) -> None:
    """`warm` has no export: the weights come from its checkpoint, in fp32 here."""
    settings = ("train.max_steps=1", "tracking=none", "export.enabled=false", "model.dtype=fp32")
    done = launch(*SETTINGS, *WARM, *settings, f"model.path=run:{warm[0]}@2", f"run.root={source.parent}", "run.name=third")
    assert done.returncode == 0, done.stdout + done.stderr
    third = source.parent / "third"
    recorded = plan(third)["lineage"]
    assert (recorded["run_name"], recorded["step"]) == ("warm", 2)
    assert [(a["run_name"], a["step"]) for a in recorded["ancestors"]] == [("source", 3)]
    assert "begins with run warm at step 2, which began with run source at step 3\n" in done.stdout
    assert held_out(third)[0] == pytest.approx(held_out(warm[0])[-1], abs=1e-2)
    again = launch("resume", str(third), "train.max_steps=2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((third / "attempts/002/plan.json").read_text())["lineage"] == recorded


def test_an_earlier_step_is_made_from_its_checkpoint_once(launch_here: Launch, source: Path) -> None:
    asked = ("data", *SETTINGS, *WARM, "model.path=run:source@2", f"run.root={source.parent}")
    first = launch_here(*asked)
    assert first.returncode == 0, first.stderr
    assert "taking the weights of run source at step 2 (once)" in first.stderr
    assert "taking the weights" not in launch_here(*asked).stderr
    planned = json.loads(launch_here("plan", "--json", *asked[1:]).stdout)
    folder = Path(planned["model"]["path"])
    assert json.loads((folder / "export.json").read_text())["step"] == 2
    assert (folder / "model.safetensors").read_bytes() != (source / "export/model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_named_before_anything_starts(launch_here: Launch, source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "runs/damaged"
    shutil.copytree(source, damaged)
    shard = damaged / "checkpoints/step-00000002/rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    # The highest bits of the first weight; what no weight needs, such as the moments, may be damaged.
    content[8 + int.from_bytes(content[:8], "little") + 3] ^= 1
    shard.write_bytes(content)
    # Another id, or the weights of the whole checkpoint would be found in the cache.
    (damaged / "plan.json").write_text((source / "plan.json").read_text().replace(plan(source)["wandb_id"], "abcdef012345"))
    asked = (*SETTINGS, *WARM, "tracking=none", f"run.root={damaged.parent}", "run.name=never")
    done = launch_here(*asked, "model.path=run:damaged@2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the weights of run source at step 2 cannot be used: a weight of the checkpoint is not the one" in done.stderr
    assert str(shard) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (damaged.parent / "never").exists()
    assert status(source)["state"] == "completed"
