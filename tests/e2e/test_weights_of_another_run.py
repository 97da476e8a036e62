"""A run that starts from another run's weights has the parent's last loss at its start, and records its parent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import TINY, metrics, status
from forked import Launch, require_exit

pytestmark = pytest.mark.rest


SETTINGS = tuple(s for s in TINY if s != "tracking=none")
# Override the preset, which draws random weights and names its own tokenizer.
FROM_RUN = ("model.init=pretrained", "model.config=null", "model.tokenizer=null")
# Rounding weights to bf16 moves this loss of 10.8 in its fifth digit; three training steps move it a hundred times more.
SAME_LOSS = 1e-4


def held_out(run: Path) -> list[float]:
    return [m["eval/held_out/loss"] for m in metrics(run) if "eval/held_out/loss" in m]


def plan(run: Path) -> dict[str, Any]:
    return json.loads((run / "plan.json").read_text())


def manifest(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())


def wandb_lineage(run: Path) -> dict[str, Any]:
    """The lineage in the W&B run's config."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return next(r["run"]["config"]["update"]["lineage"] for r in records if r["type"] == "run")


@pytest.fixture(scope="module")
def parent(train_here: Launch, module_runs: Path) -> Path:
    """Three steps at a high learning rate, with checkpoints of steps 2 and 3 and an export."""
    settings = ("train.max_steps=3", "checkpoint.save_every=2", "checkpoint.keep_last=2", "optim.lr=1e-2", "tracking=none")
    done = train_here(*SETTINGS, *settings, f"run.root={module_runs}", "run.name=parent")
    require_exit(done)
    assert len(held_out(module_runs / "parent")) == 2
    return module_runs / "parent"


@pytest.fixture(scope="module")
def child(train_here: Launch, parent: Path) -> tuple[Path, str]:
    """A run from the newest checkpoint of `parent`, on other rows, with offline W&B files. Returns its directory and output."""
    settings = ("train.max_steps=2", "tracking.mode=offline", "export.enabled=false", "run.seed=7")
    done = train_here(*SETTINGS, *FROM_RUN, *settings, "model.path=run:parent", f"run.root={parent.parent}", "run.name=child")
    require_exit(done)
    return parent.parent / "child", done.stdout


def test_the_first_loss_equals_the_parents_last(parent: Path, child: tuple[Path, str]) -> None:
    before, after = held_out(parent)
    first = held_out(child[0])[0]
    assert abs(before - after) > 100 * SAME_LOSS, "the parent has learned something"
    assert first == pytest.approx(after, abs=SAME_LOSS)


def test_plan_output_and_wandb_name_the_parent(parent: Path, child: tuple[Path, str]) -> None:
    run, output = child
    recorded = plan(run)["lineage"]
    assert recorded == {
        "run_name": "parent",
        "run_dir": str(parent),
        "step": 3,
        "plan_digest": manifest(parent, 3)["plan_digest"],
        "wandb_id": plan(parent)["wandb_id"],
        "ancestors": [],
    }
    assert plan(parent)["lineage"] is None
    # The command names no step; the plan does.
    assert plan(run)["config"]["model"]["path"] == f"run:{parent}@3"
    assert "lineage    begins with run parent at step 3\n" in output
    logged = wandb_lineage(run)
    assert {name: logged.get(name) for name in recorded} == recorded


def test_a_child_keeps_its_own_copy_of_the_weights(parent: Path, child: tuple[Path, str]) -> None:
    """The parent may continue, replace its export and remove its checkpoint without affecting a queued job."""
    folder = Path(plan(child[0])["model"]["path"])
    assert parent not in folder.parents
    assert (folder / "model.safetensors").read_bytes() == (parent / "export/model.safetensors").read_bytes()
    assert plan(child[0])["model"]["tokenizer_path"] == str(folder)
    assert not list(folder.parent.glob(f".{folder.name}-*")), "nothing half made is left"


def test_a_run_starts_from_a_chosen_step_of_a_run_that_had_a_parent(
    train_here: Launch, parent: Path, child: tuple[Path, str]
) -> None:
    """`child` has no export, so the weights come from its checkpoint, here in fp32."""
    settings = ("train.max_steps=1", "tracking=none", "export.enabled=false", "model.dtype=fp32")
    from_child = (f"model.path=run:{child[0]}@2", f"run.root={parent.parent}", "run.name=third")
    done = train_here(*SETTINGS, *FROM_RUN, *settings, *from_child)
    require_exit(done)
    third = parent.parent / "third"
    recorded = plan(third)["lineage"]
    assert (recorded["run_name"], recorded["step"]) == ("child", 2)
    assert [(a["run_name"], a["step"]) for a in recorded["ancestors"]] == [("parent", 3)]
    assert "begins with run child at step 2, which began with run parent at step 3\n" in done.stdout
    assert held_out(third)[0] == pytest.approx(held_out(child[0])[-1], abs=1e-2)
    again = train_here("resume", str(third), "train.max_steps=2")
    require_exit(again)
    assert json.loads((third / "attempts/002/plan.json").read_text())["lineage"] == recorded


def test_weights_of_an_earlier_step_are_written_once(launch_here: Launch, parent: Path) -> None:
    overrides = ("data", *SETTINGS, *FROM_RUN, "model.path=run:parent@2", f"run.root={parent.parent}")
    first = launch_here(*overrides)
    require_exit(first)
    assert "copying the weights of run parent at step 2 (once)" in first.stderr
    assert "copying the weights" not in launch_here(*overrides).stderr
    planned = json.loads(launch_here("plan", "--json", *overrides[1:]).stdout)
    folder = Path(planned["model"]["path"])
    assert json.loads((folder / "export.json").read_text())["step"] == 2
    assert folder.stat().st_mode & 0o077 == 0, "what is copied from a run is its user's alone, as the run is"
    # One of the folders holds the tokenizer, converted from a GGUF file.
    folders = [path for path in folder.parent.iterdir() if path.is_dir()]
    assert any("Q4_1" in path.name for path in folders)
    assert {path.stat().st_mode & 0o077 for one in folders for path in (one, *one.rglob("*"))} == {0}
    assert (folder / "model.safetensors").read_bytes() != (parent / "export/model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_named_before_anything_starts(launch_here: Launch, parent: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "runs/damaged"
    shutil.copytree(parent, damaged)
    shard = damaged / "checkpoints/step-00000002/rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    # Change the high bits of the first weight; damage to the optimizer states would not matter here.
    content[8 + int.from_bytes(content[:8], "little") + 3] ^= 1
    shard.write_bytes(content)
    # With the parent's W&B ID, the cache would return the weights of the intact checkpoint.
    (damaged / "plan.json").write_text((parent / "plan.json").read_text().replace(plan(parent)["wandb_id"], "abcdef012345"))
    overrides = (*SETTINGS, *FROM_RUN, "tracking=none", f"run.root={damaged.parent}", "run.name=never")
    done = launch_here(*overrides, "model.path=run:damaged@2")
    require_exit(done, 2)
    assert "cannot be used: a weight of the checkpoint differs from the engine's" in done.stderr
    assert str(shard) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (damaged.parent / "never").exists()
    assert status(parent)["state"] == "completed"
