"""A local run ends on two Ctrl-C, a non-finite loss, a limit of cost or time, or a bad disk; and it resumes.

tests/e2e/test_resume_exact.py stops and kills ranks and compares what was trained; tests/e2e/test_causes.py has faults of the
machine; tests/e2e/test_finish.py has a run that completes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import (
    FIRST_RUN,
    FIRST_STEPS,
    TINY,
    alerts,
    committed,
    flip,
    last_step,
    losses,
    metrics,
    processes_of,
    ranks_of,
    slow_steps,
    status,
    truncate,
)
from forked import Launch, require_exit
from missing_program import skip_or_fail
from pace import slowness, wait_for

from launcher.checkpoint import store

pytestmark = pytest.mark.rest
SETTINGS = (*TINY, "eval.at_start=false", "export.enabled=false", "train.max_steps=100000")
# Starting and loading alone exceed these limits: the run stops after its first steps.
PRICE = 0.6
DISK_SETTINGS = (*FIRST_RUN, "checkpoint.save_every=3", "checkpoint.keep_last=1", "export.enabled=false")
NEWEST = f"step-{FIRST_STEPS:08d}"


def test_two_interrupts_and_a_non_finite_loss_end_a_run(train_here: Launch, start_here: Callable, runs: Path) -> None:
    """Two attempts of one run, each of which ends in a different way."""
    run = runs / "disturbed"
    with start_here(
        *SETTINGS, "checkpoint.save_every=1", "checkpoint.keep_last=3", f"run.root={runs}", "run.name=disturbed"
    ) as process:
        wait_for("three checkpoints", lambda: last_step(run) >= 4)
        # Files that a library writes into the working directory belong to the run.
        assert {rank.cwd() for rank in ranks_of(run)} == {str(run)}
        # A suspended rank never completes its step, so only the kill can end this run.
        ranks_of(run)[1].send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_for("the first signal to arrive", lambda: "saving" in (process.stdout.readline() if process.stdout else ""))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60 * slowness())
    assert process.returncode == 130
    assert "killed" in status(run)["message"]
    assert not processes_of(run)

    *_, before, dropped = (name for name in committed(run) if name.startswith("step-"))
    step = int(before.removeprefix("step-"))
    bad = train_here("resume", str(run), "--step", str(step), "checkpoint.save_every=0", "optim.lr=1e38")
    assert bad.returncode == 1
    assert "set aside" in bad.stdout
    assert "not finite" in bad.stderr or "the loss is nan" in bad.stderr
    assert "optim.lr" in bad.stderr
    assert "Traceback" not in bad.stderr
    good = [name for name in committed(run) if name.startswith("step-")]
    assert before in good
    assert dropped not in good
    assert all((run / "checkpoints" / name / "manifest.json").is_file() for name in good)
    assert status(run)["state"] == "failed"
    failed = [text for text in alerts(run) if re.match("the attempt failed: rank [01]: .*(the loss is nan|not finite)", text)]
    assert len(failed) == 1, alerts(run)
    trained = [line["trainer/step"] for line in metrics(run) if line["attempt"] == 2 and "train/loss" in line]
    assert trained == list(range(step + 1, step + 1 + len(trained)))


def test_a_refused_run_leaves_no_directory(launch_here: Launch, runs: Path) -> None:
    for override in ("train.global_batch_size=7", "data.sources=[{path: ./nowhere.jsonl}]", "cluster.nodes=2", "optim.lr=-1"):
        done = launch_here(*TINY, override, f"run.root={runs}", "run.name=refused")
        assert done.returncode == 2, override
        assert "Traceback" not in done.stderr
    assert not runs.exists()


def require_stopped(run: Path, done: subprocess.CompletedProcess[str], words: str) -> None:
    """Check the state, message, alert and exit code of a run stopped by a limit, and that its last step was saved."""
    require_exit(done, 130)
    final = status(run)
    assert final["state"] == "preempted"
    assert re.match(words, final["message"])
    assert f"saved at step {final['step']} of" in final["message"]
    assert any(text == final["message"] for text in alerts(run))
    assert (run / f"checkpoints/step-{final['step']:08d}/manifest.json").is_file()
    assert final["step"] >= last_step(run) > 0
    assert not processes_of(run)


def test_a_run_stops_at_its_budget_and_resumes_with_a_larger_one(train_here: Launch, launch_here: Launch, runs: Path) -> None:
    run, price = runs / "bounded", f"cluster.price_per_gpu_hour={PRICE}"
    done = train_here(*SETTINGS, price, "run.max_usd=0.001", f"run.root={runs}", "run.name=bounded")
    require_stopped(run, done, r"run\.max_usd=0\.001 is reached after \d+\.\d\d GPU hours; saved")
    assert re.search(r"continue with: .* resume \S+ run\.max_usd=\.\.\.$", done.stdout, re.MULTILINE)
    stopped_at = status(run)["step"]

    refused = launch_here("resume", str(run))
    assert refused.returncode == 2
    assert "the run has used up run.max_usd" in refused.stderr
    assert f"raise it: python -m launcher resume {run} run.max_usd=..." in refused.stderr
    assert len(list((run / "attempts").iterdir())) == 1, "nothing was started"

    done = train_here("resume", str(run), "run.max_usd=1000", f"train.max_steps={stopped_at + 10}")
    require_exit(done)
    assert status(run)["state"] == "completed"
    last_line = [line for line in metrics(run) if "train/loss" in line and "perf/goodput" in line][-1]
    assert set(losses(run)) == set(range(1, stopped_at + 11)), "each step once"
    lost = {name: seconds for name, seconds in last_line.items() if name.startswith("lost/")}
    assert last_line["run/lost_steps"] == 0
    assert last_line["perf/goodput"] == pytest.approx(last_line["time/kept_s"] / (last_line["time/kept_s"] + sum(lost.values())))
    assert lost["lost/start_s"] > 0 < lost["lost/load_s"]
    assert lost["lost/idle_s"] > 0, "the time between the two"


def test_the_limit_of_hours_stops_a_run_during_an_evaluation(train_here: Launch, runs: Path) -> None:
    """Loading alone exceeds the limit; the limit applies once a thread has read the time that the run has used so far.

    The evaluation before the first step takes far longer than that: most of the data is held out, in micro-batches of one row.
    """
    limited = ("train.max_steps=100000", "export.enabled=false", "run.max_hours=0.0001")
    settings = (*TINY, *limited, "data.eval_fraction=0.9", "train.micro_batch_size=1")
    done = train_here(*settings, f"run.root={runs}", "run.name=evaluating")
    require_stopped(runs / "evaluating", done, r"run\.max_hours=0\.0001 is reached; saved at step \d+ of")
    assert not [line for line in metrics(runs / "evaluating") if "eval/held_out/loss" in line]


@pytest.fixture
def mount(runs: Path) -> Iterator[Callable[[Path, str], None]]:
    """Mount a small disk: `mount(FOLDER, OPTIONS)`, again to change the options; unmounted after the test."""
    if os.geteuid():
        skip_or_fail("only root can mount a small disk")
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
    assert f"name the step to use instead: {', '.join(map(str, sorted(others)))}" in done.stderr
    assert committed(run) == lies, "the later ones are not set aside for nothing"
    assert not (run / "attempts/002").exists()


def test_a_damaged_newest_checkpoint_is_not_passed_over_in_silence(launch_here: Launch, run: Path, tmp_path: Path) -> None:
    *_, older, newest = committed(run)
    truncate(run / "checkpoints" / newest)
    step, before = (int(name.removeprefix("step-")) for name in (newest, older))
    done = launch_here("export", str(run), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"the checkpoint of step {step} is damaged" in done.stderr
    assert f"the newest intact one is {before}" in done.stderr
    assert not (tmp_path / "out").exists()
    for verb in ("status", "checkpoints"):
        assert "rank-00001.safetensors: a checkpoint file has the wrong size" in launch_here(verb, str(run)).stdout
    assert launch_here("export", str(run), "--out", str(tmp_path / "out"), "--step", str(before)).returncode == 0


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
    with start_here(*DISK_SETTINGS, f"run.root={runs}", "run.name=disturbed") as process:
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
    require_exit(done)
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
