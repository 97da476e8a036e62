"""A run whose states lie on a disk, from its start to its export, and resumed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, last_step, losses, ranks_of, status, wait_for

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.timeout(1500)
def test_a_run_on_nvme_is_saved_resumed_and_exported(
    launch: Launch, start: Callable, runs: Path, tmp_path: Path, extensions: None
) -> None:
    disk = tmp_path / "disk"
    settings = (*TINY, "deepspeed=zero3_nvme", f"deepspeed.nvme_path={disk}", "train.save_every=2", f"run.root={runs}")
    refused = launch(*settings, "run.name=early", "train.max_steps=2")
    assert refused.returncode == 2
    assert "no such folder for states on NVMe" in refused.stdout + refused.stderr
    assert not runs.exists()
    disk.mkdir()

    done = launch(*settings, "run.name=undisturbed", "train.max_steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training waits while a checkpoint is written" in done.stdout
    assert (runs / "undisturbed/export/model.safetensors").is_file()
    assert sorted(losses(runs / "undisturbed")) == [1, 2, 3, 4]

    constant = "optim.schedule=constant"
    whole = launch(*settings, constant, "run.name=whole", "train.max_steps=4", "train.export=false")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    halves = launch(*settings, constant, "run.name=halves", "train.max_steps=2", "train.export=false")
    assert halves.returncode == 0, halves.stdout + halves.stderr
    resumed = launch("resume", str(runs / "halves"), "train.max_steps=4")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert status(runs / "halves")["step"] == 4
    assert losses(runs / "halves") == losses(runs / "whole")
    for attempt in ("001", "002"):
        log = (runs / "halves/attempts" / attempt / "rank-00001.log").read_text()
        assert "Offloading to NVMe" in log, "DeepSpeed says so at its first write; tensors of less than 1 MiB stay in memory"
    assert list(disk.iterdir()) == [], "a run leaves nothing on the disk"

    run = runs / "killed"
    with start(*settings, constant, "run.name=killed", "train.max_steps=400", "train.export=false") as process:
        wait_for("step 1", lambda: last_step(run) >= 1)
        assert list(disk.iterdir()) != []
        ranks_of(run)[1].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert list(disk.iterdir()) == [], "nor does one that fails"
