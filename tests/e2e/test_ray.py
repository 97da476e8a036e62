"""Runs on a Ray of their own on this machine: the main road, kills, cancels; compared with the same run on `cluster=local`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from e2e_tools import TINY, command_line, last_step, losses, metrics, status, wait_for
from ray_cluster import RAY as RAY_COMMAND
from ray_tools import await_no_process, causes, kill_all, ranks_of, started_by

Launch = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 90
SETTINGS = (*TINY, f"train.max_steps={STEPS}", "train.save_every=5", "train.keep_last=3", "train.export=false")
RAY = (*SETTINGS, "+cluster=ray")

pytestmark = [pytest.mark.ray, pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, module_runs: Path) -> Path:
    """The run on cluster=local that every run on Ray must equal."""
    done = launch(*SETTINGS, f"run.root={module_runs}", "run.name=undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    return module_runs / "undisturbed"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder for temporary files, with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs on Ray, none of whose processes is left."""
    folder = tmp_path / "runs"
    yield folder
    kill_all(folder)


def test_a_run_equals_that_on_this_machine_step_by_step(launch: Launch, root: Path, temporary: Path, undisturbed: Path) -> None:
    run = root / "alone"
    done = launch(*RAY, f"run.root={root}", "run.name=alone", TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(run)["state"] == "completed"
    assert losses(run) == losses(undisturbed), "the same rows and bitwise the same losses"
    assert causes(run) == ["completed"]
    # Ray knows of each checkpoint, by a pointer alone.
    known = {path.parent.name: json.loads(path.read_text()) for path in (run / "ray").glob("*/*/checkpoint.json")}
    assert known["step-00000090"] == {"step": 90, "path": str(run / "checkpoints/step-00000090")}
    assert not list((run / "ray").rglob("*.safetensors"))
    assert stat.S_IMODE((run / "ray-token").stat().st_mode) == 0o600
    assert (run / "ray-token").read_text() not in "".join(
        path.read_text(errors="replace") for path in (run / "attempts").rglob("*") if path.is_file()
    )
    await_no_process(run)
    assert list(temporary.glob("ray-*")) == [], "a run that is completed leaves nothing of Ray's behind"


def test_after_the_kill_of_a_worker_and_of_a_rank_the_run_goes_on_by_itself(
    launch: Launch, start: Callable, root: Path, temporary: Path, undisturbed: Path
) -> None:
    run = root / "killed"
    with start(*RAY, f"run.root={root}", "run.name=killed", TMPDIR=str(temporary)) as process:
        wait_for("step 12", lambda: last_step(run) >= 12)
        before = ranks_of(run)
        worker = before[1].parent()
        assert "ray::" in " ".join(worker.cmdline())
        worker.kill()
        killed_at = time.time()
        wait_for("the next attempt", lambda: (run / "attempts/002/marker").exists())
        assert not any(rank.is_running() for rank in before.values()), "no rank of the attempt before is left"
        saved = json.loads((run / "attempts/002/attempt.json").read_text())["resume_step"]
        assert saved == newest_of_attempt(run, 1)
        wait_for("steps of the next attempt", lambda: last_step(run) >= saved + 10)
        ranks_of(run)[0].kill()
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(run) == losses(undisturbed), "the same rows and bitwise the same losses"
    assert causes(run) == ["infrastructure", "infrastructure", "completed"]
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in again if line["attempt"] == 2 and "train/loss" in line)
    assert first["time"] - killed_at < 60, "meant are 30 s, of a machine that does nothing else"
    assert first["trainer/step"] == saved + 1, "no more is repeated than was done since the last checkpoint"
    assert "rank 0: killed by SIGKILL" in (run / "events.jsonl").read_text()
    await_no_process(run)


def test_a_controller_of_rays_that_gives_up_is_replaced(
    start: Callable, root: Path, temporary: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Ray Train ends itself where it cannot write its own state, which says nothing of the run."""
    run, storage = root / "replaced", tmp_path / "storage"
    settings = (f"cluster.storage_path={storage}", "train.max_steps=90")
    with start(*RAY, *settings, f"run.root={root}", "run.name=replaced", TMPDIR=str(temporary)) as process:
        wait_for("step 12", lambda: last_step(run) >= 12)
        storage.rename(tmp_path / "away")
        storage.touch()
        log = run / "attempts/001/agent.log"
        wait_for("Ray's controller to give up", lambda: "Traceback" in log.read_text())
        storage.unlink()
        (tmp_path / "away").rename(storage)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(run) == losses(undisturbed)
    assert causes(run) == ["infrastructure", "completed"]
    await_no_process(run)


def test_a_coordinator_that_is_killed_is_replaced_and_the_run_goes_on(
    start: Callable, root: Path, temporary: Path, undisturbed: Path
) -> None:
    """As where memory runs short on the driver's machine."""
    run = root / "orphaned"
    with start(*RAY, f"run.root={root}", "run.name=orphaned", TMPDIR=str(temporary)) as process:
        wait_for("step 12", lambda: last_step(run) >= 12)
        before = ranks_of(run)
        raylet = before[0].parent().parent()
        (coordinator,) = [child for child in raylet.children() if "ray::Coordinator" in command_line(child)]
        coordinator.kill()
        wait_for("the next attempt", lambda: (run / "attempts/002/marker").exists())
        assert not any(rank.is_running() for rank in before.values()), "no rank of the attempt before is left"
        saved = json.loads((run / "attempts/002/attempt.json").read_text())["resume_step"]
        assert saved == newest_of_attempt(run, 1)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(run) == losses(undisturbed), "the same rows and bitwise the same losses"
    assert causes(run) == ["infrastructure", "completed"]
    assert "the process that the workers agree by was killed or has ended" in (run / "events.jsonl").read_text()
    await_no_process(run)


def test_cancel_saves_a_killed_driver_is_told_and_resume_goes_on(
    launch: Launch, start: Callable, root: Path, temporary: Path, undisturbed: Path
) -> None:
    run, env = root / "stopped", {"TMPDIR": str(temporary)}
    done = launch(*RAY, f"run.root={root}", "run.name=stopped", "--detach", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"driver     {run}/attempts/001/agent.log" in done.stdout
    assert f"python -m launcher cancel {run}" in done.stdout
    wait_for("step 7", lambda: last_step(run) >= 7)
    assert launch("cancel", str(run)).returncode == 0
    wait_for("its end", lambda: json.loads(launch("status", str(run), "--json").stdout)["state"] == "cancelled")
    step = status(run)["step"]
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
    await_no_process(run)

    def signalled(number: signal.Signals) -> None:
        """Go on for some steps, of which the terminal sees no more than the first, and send the driver a signal."""
        begun = status(run)["step"]
        with ExitStack() as stack:
            # Who runs the tests may ignore it, as nohup does, and processes inherit that.
            before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
            try:
                terminal = stack.enter_context(start("resume", str(run), **env))
            finally:
                signal.signal(signal.SIGHUP, before)
            wait_for("further steps", lambda: last_step(run) >= begun + 5)
            terminal.send_signal(signal.SIGHUP)
            assert terminal.wait(30) == -signal.SIGHUP
        seen = last_step(run)
        wait_for("steps that nobody follows", lambda: last_step(run) >= seen + 2)
        driver = status(run)["job"]["pid"]
        assert os.getsid(driver) == driver, "nor does closing a terminal reach it"
        os.kill(driver, number)

    # As when a pod or a machine is shut down.
    signalled(signal.SIGTERM)
    wait_for("its end", lambda: status(run)["state"] == "cancelled")
    step = status(run)["step"]
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
    await_no_process(run)

    signalled(signal.SIGKILL)
    await_no_process(run)
    seen = json.loads(launch("status", str(run), "--json").stdout)
    assert seen["state"] == "failed"
    assert f"python -m launcher resume {run}" in seen["message"]

    done = launch("resume", str(run), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(undisturbed)
    assert "rank-00001.log" in {path.name for path in (run / "attempts/004").iterdir()}
    assert launch("logs", str(run), "--rank", "1").returncode == 0


def test_a_rank_and_a_worker_that_hang_are_named_and_the_run_goes_on(
    launch: Launch, start: Callable, root: Path, temporary: Path, undisturbed: Path
) -> None:
    run = root / "hung"
    settings = ("cluster.stall_seconds=20", "cluster.dashboard=true", f"run.root={root}", "run.name=hung")
    with ExitStack() as stack:
        process = stack.enter_context(start(*RAY, *settings, TMPDIR=str(temporary)))
        wait_for("step 12", lambda: last_step(run) >= 12)
        terminal = stack.enter_context(start("logs", str(run), "-f", "--rank", "1"))
        stopped = ranks_of(run)[1]
        stopped.suspend()
        # In the time that this takes.
        assert re.search(r"^hung +running ", launch("ls", "--root", str(root)).stdout, re.MULTILINE)
        require_closed(run, temporary)
        wait_for("the next attempt to train", lambda: last_of_attempt(run, 2) > 0, 200)
        said = (run / "events.jsonl").read_text()
        assert f"(pid {stopped.pid}) is stopped: no progress for" in said
        # As when its machine hangs: nobody says anything of the rank any more.
        worker = ranks_of(run)[1].parent()
        worker.suspend()
        ranks_of(run)[1].suspend()
        wait_for("a third attempt to train", lambda: last_of_attempt(run, 3) > 0, 240)
        output, _ = process.communicate(timeout=300)
        shown, _ = terminal.communicate(timeout=60)
    assert process.returncode == 0, output
    logs = [path.read_text(errors="replace") for path in sorted(run.glob("attempts/*/rank-00001.log"))]
    assert len(logs) == 3
    assert shown == "".join(logs), "of every attempt, to its end"
    assert re.search(r"the other ranks wait for the worker of rank 1 on \S+: the run goes on", (run / "events.jsonl").read_text())
    assert losses(run) == losses(undisturbed)
    assert causes(run) == ["infrastructure", "infrastructure", "completed"]
    await_no_process(run)


def require_closed(run: Path, folder: Path) -> None:
    """Its own Ray answers nobody without the run's token; this one and its dashboard nobody from elsewhere."""
    (raylet,) = [process for process in started_by(run) if process.name() == "raylet"]
    (address,) = set(re.findall(r"--gcs[-_]address=([\d.]+:\d+)", " ".join(raylet.cmdline())))
    (folder / "wrong").write_text("0" * 64)

    def answers(**variables: str) -> bool:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # As in the driver: without it Ray replaces loopback by the address of a network, where nobody answers.
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        command = [*RAY_COMMAND, "status", f"--address={address}"]
        return not subprocess.run(command, env={**env, **variables}, capture_output=True, timeout=60).returncode

    assert answers(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(run / "ray-token"))
    assert not answers(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "wrong"))
    assert not answers()
    listening: dict[str, set[str]] = {}
    for process in started_by(run):
        with suppress(psutil.NoSuchProcess):
            said = " ".join([process.name(), *process.cmdline()])
            # torch's store of rank 0 listens for the ranks of other nodes.
            if "launcher rank " in said:
                continue
            listening[said] = {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert any(ips for said, ips in listening.items() if "dashboard/dashboard.py" in said)
    assert any(ips for said, ips in listening.items() if said.startswith("gcs_server"))
    assert set().union(*listening.values()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def newest_of_attempt(run: Path, attempt: int) -> int:
    """The step of the newest checkpoint that an attempt has committed."""
    manifests = [json.loads(file.read_text()) for file in (run / "checkpoints").glob("step-*/manifest.json")]
    return max(manifest["step"] for manifest in manifests if manifest["attempt"] == attempt)


def last_of_attempt(run: Path, attempt: int) -> int:
    return max((line["trainer/step"] for line in metrics(run) if line["attempt"] == attempt and "train/loss" in line), default=0)


def test_what_would_repeat_itself_is_not_tried_again(launch: Launch, root: Path, temporary: Path) -> None:
    run = root / "diverged"
    done = launch(*RAY, "optim.lr=1e30", "optim.warmup_steps=0", f"run.root={root}", "run.name=diverged", TMPDIR=str(temporary))
    assert done.returncode == 1, done.stdout + done.stderr
    assert causes(run) == ["user_error"]
    assert status(run)["state"] == "failed"
    assert "not finite" in status(run)["message"] or "the loss is" in status(run)["message"]
    await_no_process(run)
