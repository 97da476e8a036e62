"""A run with optimizer states and weights on disk trains, saves, resumes and exports.

tests/checkpoint/test_shards.py compares each state with those of an uninterrupted run.
"""

from __future__ import annotations

import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, held, last_step, losses, ranks_of, status
from forked import Launch, require_exit

pytestmark = pytest.mark.rest


@pytest.mark.timeout(1500)
def test_a_run_on_nvme_is_saved_resumed_and_exported(
    launch: Launch, launch_here: Launch, start: Callable, runs: Path, tmp_path: Path, extensions: None
) -> None:
    disk = tmp_path / "disk"
    overrides = (
        "deepspeed=zero3_nvme",
        f"deepspeed.nvme_path={disk}",
        "checkpoint.save_every=2",
        "train.max_steps=8",
        f"run.root={runs}",
    )
    settings = (*TINY, *overrides)
    refused = launch_here(*settings, "run.name=early")
    assert refused.returncode == 2
    assert "the folder for NVMe offload does not exist on this machine" in refused.stdout + refused.stderr
    assert not runs.exists()
    disk.mkdir()

    run = runs / "killed"
    with start(*settings, "run.name=killed") as process:
        with held(run, 3):
            assert [stat.S_IMODE(folder.stat().st_mode) for folder in disk.iterdir()] == [0o700]
            ranks_of(run)[1].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "training waits while a checkpoint is written" in output
    assert list(disk.iterdir()) == [], "a failed run leaves nothing on the disk"
    assert last_step(run) < 8
    before = losses(run)

    resumed = launch("resume", str(run))
    require_exit(resumed)
    assert "continuing" in resumed.stdout
    assert (status(run)["state"], status(run)["step"]) == ("completed", 8)
    assert sorted(losses(run)) == list(range(1, 9))
    assert {step: losses(run)[step] for step in before} == before, "a step after the checkpoint is computed again"
    assert (run / "export/model.safetensors").is_file()
    for attempt in ("001", "002"):
        log = (run / "attempts" / attempt / "rank-00001.log").read_text()
        assert "Offloading to NVMe" in log, "DeepSpeed says so at its first write; tensors of less than 1 MiB stay in memory"
    assert list(disk.iterdir()) == [], "nor does a completed one"
