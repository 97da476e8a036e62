"""A disk too small for the checkpoints is refused or reported before the run directory exists."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hand_made
import pytest

from launcher import run_store
from launcher.checkpoint import store
from launcher.plan.launch_plan import LaunchPlan

Run = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = (
    "model=tiny",
    "model.dtype=fp32",
    "tracking=none",
    "train.max_steps=20",
    "checkpoint.save_every=5",
    "checkpoint.keep_last=2",
    "run.name=room",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty disk of a given size, such as `disk("8m")`."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True, timeout=10)
        return folder

    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True, timeout=10)


def test_a_disk_without_room_for_one_checkpoint_is_refused(launch_here: Run, disk: Callable[[str], Path]) -> None:
    root = disk("8m") / "not" / "there"
    done = launch_here("train", *SETTINGS, f"run.root={root}")
    assert done.returncode == 2
    assert "no room for a single checkpoint" in done.stderr
    assert "MiB, available 8.00 MiB" in done.stderr
    assert "remedy: " in done.stderr
    assert not root.parent.exists()


def test_a_run_root_that_cannot_be_made_is_refused_before_anything_that_takes_time(
    launch_here: Run, tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    (tmp_path / "file").touch()
    closed = disk("8m")
    subprocess.run(["mount", "-o", "remount,ro", closed], check=True, timeout=10)
    for above, reason in ((tmp_path / "file", "is not a folder"), (closed, "cannot be written")):
        message = f"the run directory cannot be created: {above} {reason}"
        done = launch_here("train", *SETTINGS, f"run.root={above}/runs")
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        done = launch_here("plan", *SETTINGS, f"run.root={above}/runs")
        assert done.returncode == 0, done.stderr
        assert f"train will be refused: {message}; choose another run.root" in " ".join(done.stdout.split())


def test_a_disk_too_small_for_all_kept_checkpoints_is_noted(launch_here: Run, disk: Callable[[str], Path]) -> None:
    root = disk("40m")
    done = launch_here("plan", *SETTINGS, f"run.root={root}")
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note")]
    assert "has 40.00 MiB free and needs 46.85 MiB for 3 checkpoints" in note
    assert "note" not in launch_here("plan", *SETTINGS, "checkpoint.keep_last=1", f"run.root={root}").stdout


@pytest.mark.rest
def test_resume_refuses_a_disk_without_room_for_a_save(launch_here: Run, disk: Callable[[str], Path], tmp_path: Path) -> None:
    """The checkpoints folder is on another disk, which is nearly full."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n' * 3)
    settings = (*SETTINGS, "data=jsonl", f"data.path={tmp_path}/rows.jsonl", "data.eval_fraction=0")
    assert launch_here("data", *settings).returncode == 0  # `train` prepares the data before it plans
    printed = json.loads(launch_here("plan", "--json", *settings, f"run.root={tmp_path}").stdout)
    plan = LaunchPlan.model_validate({key: value for key, value in printed.items() if key in LaunchPlan.model_fields})
    run = hand_made.run(plan, state="failed")
    run.checkpoints.symlink_to(disk("9m"))
    hand_made.checkpoint(run, 5, files={store.shard_name(0): b"x" * 2**20}, digest=plan.digest())
    done = launch_here("resume", str(run.root))
    assert done.returncode == 2
    assert "no room for a single checkpoint" in done.stderr
    assert run_store.newest_attempt(run) == 0
