"""Disk problems and checkpoints: damage between two attempts, and a full or read-only disk during a run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import FIRST_RUN, FIRST_STEPS, committed, flip, losses, processes_of, slow_steps, status, truncate
from pace import wait_for

from launcher.checkpoint import store

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = (*FIRST_RUN, "checkpoint.save_every=3", "checkpoint.keep_last=1", "export.enabled=false")
NEWEST = f"step-{FIRST_STEPS:08d}"


@pytest.fixture
def mount(runs: Path) -> Iterator[Callable[[Path, str], None]]:
    """Mount a small disk: `mount(FOLDER, OPTIONS)`, again to change the options; unmounted after the test."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can mount a small disk")
    mounted: list[Path] = []

    def mounting(folder: Path, options: str) -> None:
        if folder in mounted:
            subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True, capture_output=True, timeout=10)
        else:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True, timeout=10)
            mounted.append(folder)

    try:
        yield mounting
    finally:
        for process in processes_of(runs):
            process.kill()
        for folder in mounted:
            subprocess.run(["umount", "--lazy", folder], check=True, timeout=10)


@pytest.fixture
def run(first_run: Path, runs: Path) -> Path:
    """A copy of a finished run, for the test to damage."""
    shutil.copytree(first_run, runs / "damaged")
    return runs / "damaged"


@pytest.mark.parametrize("damage", [flip, truncate])
def test_resuming_from_a_damaged_step_is_refused(launch_here: Launch, run: Path, damage: Callable[[Path], None]) -> None:
    lies = committed(run)
    *others, step = (int(name.removeprefix("step-")) for name in reversed(lies))
    damage(run / "checkpoints" / lies[0])
    done = launch_here("resume", str(run), "--step", str(step))
    assert done.returncode == 2
    assert f"the checkpoint of step {step} is damaged" in done.stderr
    assert "rank-00001.safetensors" in done.stderr
    assert f"choose one of the other steps: {', '.join(map(str, sorted(others)))}" in done.stderr
    assert committed(run) == lies, "the later ones are not set aside for nothing"
    assert not (run / "attempts/002").exists()


def on_a_small_disk(run: Path, mount: Callable[[Path, str], None], options: str) -> None:
    """Mount a disk for the checkpoints of a run that is just starting, long before it saves."""
    wait_for("the run directory", (run / "status.json").exists)
    (run / "checkpoints").mkdir(mode=0o700)
    mount(run / "checkpoints", f"mode=0700,{options}")


def assert_kept_and_whole(run: Path) -> None:
    """Check that exactly one committed checkpoint exists and is intact."""
    (name,) = committed(run)
    assert store.verify(run / "checkpoints" / name) == []
    assert status(run)["state"] == "failed"


def test_a_run_resumes_after_a_full_and_after_a_read_only_disk_failed_its_save(
    train_here: Launch, start_here: Callable, runs: Path, first_run: Path, mount: Callable[[Path, str], None]
) -> None:
    """The disk holds one checkpoint but not two: keep_last=1 deletes the old one only after the new one is committed."""
    run = runs / "disturbed"
    with start_here(*SETTINGS, f"run.root={runs}", "run.name=disturbed") as process:
        on_a_small_disk(run, mount, "size=20m")
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "there is not enough free disk space for a checkpoint" in output
    numbers = re.search(r"needed ([\d.]+) MiB, available ([\d.]+) MiB", output)
    assert numbers is not None
    needed, available = map(float, numbers.groups())
    assert available < needed < 20
    assert "remedy: free " in output
    assert "Traceback" not in output
    assert_kept_and_whole(run)
    assert committed(run) == ["step-00000003"]

    mount(run / "checkpoints", "size=80m")
    with start_here("resume", str(run), **slow_steps()) as process:
        wait_for("a later checkpoint", lambda: (store.newest_step(run / "checkpoints") or 0) > 3)
        remount_read_only(run / "checkpoints", mount)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "continuing disturbed from step 3 of" in output
    assert re.search(r"the checkpoint could not be .*\n.*\n.*Read-only file system", output)
    assert "Traceback" not in output
    assert store.newest_step(run / "checkpoints") is not None

    mount(run / "checkpoints", "rw")
    step = store.get_latest(run / "checkpoints").step
    assert 3 < step < FIRST_STEPS
    assert store.verify(store.get_latest(run / "checkpoints").path) == []
    done = train_here("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing disturbed from step {step} of" in done.stdout
    assert losses(run) == losses(first_run)
    assert committed(run) == [NEWEST]


def remount_read_only(folder: Path, mount: Callable[[Path, str], None]) -> None:
    """Remount read-only; the kernel refuses while a save has files open for writing."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return mount(folder, "ro")
        except subprocess.CalledProcessError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
