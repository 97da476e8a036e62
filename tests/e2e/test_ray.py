"""Runs on their own Ray on this machine survive faults, kills and cancels with the losses of the same run on `cluster=local`."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from causes import assert_attempt_named_first
from e2e_tools import TINY, command_line, last_step, losses, metrics, slow_steps, status
from ray_cluster import RAY as RAY_COMMAND
from ray_tools import (
    DEADLINE_S,
    alerts,
    await_no_process,
    causes,
    kill_all,
    newest_saved,
    ranks_of,
    started_by,
    trained,
    wait_for,
)

Launch = Callable[..., subprocess.CompletedProcess[str]]

SAVE_EVERY = 4
SETTINGS = (
    *TINY,
    "train.max_steps=100000",
    # A constant learning rate does not depend on max_steps, so a shorter run has the same losses.
    "optim.schedule=constant",
    f"checkpoint.save_every={SAVE_EVERY}",
    "checkpoint.keep_last=3",
    "eval.at_start=false",
    "export.enabled=false",
)
RAY = (*SETTINGS, "+cluster=ray")
# Seed for the order of the faults and the steps at which they occur.
SEED = 1

pytestmark = [pytest.mark.ray, pytest.mark.rest, pytest.mark.timeout(3600)]


def assert_losses_of_a_local_run(launch: Launch, run: Path, *settings: str) -> None:
    """Check that an undisturbed run on cluster=local has bitwise the same losses."""
    alone = run.with_name("alone")
    steps = (f"train.max_steps={last_step(run)}", "checkpoint.save_every=0")
    done = launch(*SETTINGS, *steps, *settings, f"run.root={alone.parent}", f"run.name={alone.name}", timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(alone)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder for temporary files, with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs on Ray; their processes are killed at the end."""
    folder = tmp_path / "runs"
    yield folder
    kill_all(folder)


def test_a_run_survives_every_fault_of_its_processes_and_has_the_same_losses(
    launch: Launch, launch_here: Launch, start: Callable, root: Path, temporary: Path, tmp_path: Path
) -> None:
    """Each fault (kills, hangs, a Ray controller that gives up) hits an attempt that has saved; then the run is cancelled."""
    run, storage, chance = root / "faulty", tmp_path / "storage", random.Random(SEED)
    faults = [kill_worker, kill_rank, kill_coordinator, end_controller, hang_rank, hang_worker]
    chance.shuffle(faults)
    began = time.time()
    settings = ("cluster.stall_seconds=10", "cluster.dashboard=true", f"cluster.storage_path={storage}")
    env = {"TMPDIR": str(temporary), **slow_steps()}
    with ExitStack() as stack:
        process = stack.enter_context(start(*RAY, *settings, f"run.root={root}", "run.name=faulty", **env))
        for attempt, fault in enumerate(faults, 1):
            await_progress(run, attempt, chance.randrange(2, SAVE_EVERY))
            if attempt == 1:
                terminal = stack.enter_context(start("logs", str(run), "-f", "--rank", "1"))
            before, at = ranks_of(run), time.time()
            expected_alert = fault(run, before)
            if fault is hang_rank:
                # Check these while the launcher detects the hang.
                assert re.search(r"^faulty +running ", launch_here("ls", "--root", str(root)).stdout, re.MULTILINE)
                require_closed(run, temporary)
            following = run / f"attempts/{attempt + 1:03d}"
            wait_for(f"the attempt after {fault.__name__}", (following / "marker").exists)
            assert not any(rank.is_running() for rank in before.values()), "no rank of the attempt before is left"
            saved = json.loads((following / "attempt.json").read_text())["resume_step"]
            assert saved == newest_saved(run, attempt)
            assert saved > 0
            wait_for(f"a step after {fault.__name__}", lambda n=attempt + 1: trained(run, n))
            assert trained(run, attempt + 1)[0] == saved + 1, "no more is repeated than was done since the last checkpoint"
            assert re.search(expected_alert, alerts(run, attempt)), f"{fault.__name__}: {alerts(run, attempt)}"
            if fault in NAMED:
                assert_attempt_named_first(launch_here, run, attempt, NAMED[fault])
            if fault is kill_worker:
                firsts = {line["attempt"]: line["time"] for line in reversed(metrics(run)) if "train/loss" in line}
                # The target is 30 s on an idle machine.
                assert firsts[attempt + 1] - at < max(60, firsts[1] - began)
        assert launch_here("cancel", str(run)).returncode == 0
        output, _ = process.communicate(timeout=DEADLINE_S)
        shown, _ = terminal.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    assert causes(run) == [*["infrastructure"] * len(faults), "cancelled"]
    assert_saved(run)
    logs = [path.read_text(errors="replace") for path in sorted(run.glob("attempts/*/rank-00001.log"))]
    assert len(logs) == len(faults) + 1
    assert shown == "".join(logs), "of every attempt, to its end"
    await_no_process(run)
    assert_losses_of_a_local_run(launch, run)


def assert_saved(run: Path) -> None:
    """Check that the last step was saved."""
    step = status(run)["step"]
    assert step == last_step(run)
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()


Ranks = dict[int, psutil.Process]


def kill_worker(run: Path, ranks: Ranks) -> str:
    worker = ranks[1].parent()
    assert "ray::" in " ".join(worker.cmdline())
    worker.kill()
    return ""


def kill_rank(run: Path, ranks: Ranks) -> str:
    ranks[0].kill()
    return ""


def kill_coordinator(run: Path, ranks: Ranks) -> str:
    """Kill the run's coordinator, as the kernel may do when the driver's machine runs out of memory."""
    raylet = ranks[0].parent().parent()
    (coordinator,) = [child for child in raylet.children() if "ray::Coordinator" in command_line(child)]
    coordinator.kill()
    return "the run's coordinator was killed or has ended: another replaces it"


def end_controller(run: Path, ranks: Ranks) -> str:
    """Ray Train's controller exits if it cannot write its own state, although nothing is wrong with the run."""
    storage, log = Path(json.loads((run / "plan.json").read_text())["config"]["cluster"]["storage_path"]), agent_log(run)
    num_before = log.read_text().count("Traceback")
    away = storage.with_name("away")
    storage.rename(away)
    storage.touch()
    wait_for("Ray's controller to give up", lambda: log.read_text().count("Traceback") > num_before)
    storage.unlink()
    away.rename(storage)
    return ""


def hang_rank(run: Path, ranks: Ranks) -> str:
    ranks[1].suspend()
    return rf"\(pid {ranks[1].pid}\) is stopped by a signal \(SIGSTOP\): no progress for"


def hang_worker(run: Path, ranks: Ranks) -> str:
    """Suspend a rank and its worker, as if their machine hung: nothing reports about the rank any more."""
    ranks[1].parent().suspend()
    ranks[1].suspend()
    return r"the other ranks wait for the worker of rank 1 on \S+: the attempt ends"


# The faults whose message causes.py checks.
NAMED: dict[Callable[[Path, Ranks], str], str] = {kill_rank: "ray_rank", kill_coordinator: "ray_coordinator"}


def agent_log(run: Path) -> Path:
    return run / "attempts/001/agent.log"


def await_progress(run: Path, attempt: int, num_steps: int) -> None:
    """Wait until an attempt has saved and has then trained more steps."""

    def is_there() -> bool:
        saved = newest_saved(run, attempt)
        return saved > 0 and max(trained(run, attempt), default=0) >= saved + num_steps

    wait_for(f"a checkpoint of attempt {attempt} and some more steps", is_there)


def test_a_run_resumes_after_its_driver_was_ended_or_its_driver_or_raylet_was_killed(
    launch: Launch, launch_here: Launch, start: Callable, root: Path, temporary: Path
) -> None:
    """One worker is enough to test the driver and Ray; the other test has two."""
    run, env = root / "stopped", {"TMPDIR": str(temporary), **slow_steps(0.2)}
    # Use as many threads as the run on cluster=local does.
    one = ("cluster.workers=1", "cluster.env={OMP_NUM_THREADS: '1'}")
    done = launch(*RAY, *one, f"run.root={root}", "run.name=stopped", "--detach", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"driver     {run}/attempts/001/agent.log" in done.stdout
    assert f"python -m launcher cancel {run}" in done.stdout
    wait_for("step 7", lambda: last_step(run) >= 7)

    def go_on(**variables: str) -> None:
        """Resume, and train some steps, most of them after the terminal has closed."""
        # The status may show an older step if the driver or Ray was killed.
        first_step = last_step(run)
        with ExitStack() as stack:
            # The tests may run with SIGHUP ignored (as under nohup), and child processes inherit that.
            before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
            try:
                terminal = stack.enter_context(start("resume", str(run), **env, **variables))
            finally:
                signal.signal(signal.SIGHUP, before)
            wait_for("further steps", lambda: last_step(run) >= first_step + 5)
            terminal.send_signal(signal.SIGHUP)
            assert terminal.wait(DEADLINE_S) == -signal.SIGHUP
        seen = last_step(run)
        wait_for("steps that nobody follows", lambda: last_step(run) >= seen + 2)
        assert os.getsid(driver()) == driver(), "nor does closing a terminal reach it"

    def driver() -> int:
        return int(status(run)["job"]["pid"])

    # As when a pod or a machine shuts down.
    os.kill(driver(), signal.SIGTERM)
    wait_for("its end", lambda: status(run)["state"] == "cancelled")
    assert json.loads(launch_here("status", str(run), "--json").stdout)["state"] == "cancelled"
    assert_saved(run)
    await_no_process(run)

    go_on()
    os.kill(driver(), signal.SIGKILL)
    await_no_process(run)
    seen = json.loads(launch_here("status", str(run), "--json").stdout)
    assert seen["state"] == "failed"
    assert f"python -m launcher resume {run}" in seen["message"]

    # By default Ray needs 15 s to notice the loss; this run would end before.
    go_on(RAY_health_check_period_ms="500", RAY_health_check_failure_threshold="8")
    (raylet,) = [process for process in started_by(run) if process.name() == "raylet"]
    raylet.kill()
    wait_for("its end", lambda: status(run)["state"] == "failed")
    await_no_process(run)
    message = status(run)["message"]
    assert re.match("(the run's driver or )?the raylet of ", message)
    assert f"python -m launcher resume {run}" in message

    end = f"train.max_steps={last_step(run) + 2}"
    done = launch("resume", str(run), end, timeout=DEADLINE_S, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(run)["state"] == "completed"
    assert_losses_of_a_local_run(launch, run, "cluster.ranks_per_node=1")
    assert "rank-00000.log" in {path.name for path in (run / "attempts/004").iterdir()}
    assert launch_here("logs", str(run), "--rank", "0").returncode == 0


def require_closed(run: Path, folder: Path) -> None:
    """Check that the run's own Ray requires its token, and that Ray and its dashboard listen only on loopback."""
    (raylet,) = [process for process in started_by(run) if process.name() == "raylet"]
    (address,) = set(re.findall(r"--gcs[-_]address=([\d.]+:\d+)", " ".join(raylet.cmdline())))
    (folder / "wrong").write_text("0" * 64)

    def answers(**variables: str) -> bool:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # The driver sets this too: otherwise Ray replaces loopback with a network address, where nothing listens.
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        command = [*RAY_COMMAND, "status", f"--address={address}"]
        return not subprocess.run(command, env={**env, **variables}, capture_output=True, timeout=60).returncode

    assert answers(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=raylet.environ()["RAY_AUTH_TOKEN_PATH"])
    assert not answers(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "wrong"))
    assert not answers()
    listening: dict[str, set[str]] = {}
    for process in started_by(run):
        with suppress(psutil.NoSuchProcess):
            title = " ".join([process.name(), *process.cmdline()])
            # The TCPStore of rank 0 must accept connections from other nodes.
            if "launcher rank " in title:
                continue
            listening[title] = {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert any(ips for title, ips in listening.items() if "dashboard/dashboard.py" in title)
    assert any(ips for title, ips in listening.items() if title.startswith("gcs_server"))
    assert set().union(*listening.values()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
