"""A run on its own Ray on this machine survives faults, kills and cancels with the losses of the same run on `cluster=local`."""

from __future__ import annotations

import json
import os
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
from e2e_tools import TINY, command_line, json_lines, last_step, losses, metrics, slow_steps, status
from forked import Launch, require_exit
from ray_tools import (
    DEADLINE_S,
    Fault,
    Ranks,
    alerts,
    assert_survived,
    await_no_process,
    causes,
    kill_all,
    newest_saved,
    ranks_of,
    started_by,
    wait_for,
)
from ray_tools import RAY as RAY_COMMAND

SETTINGS = (
    *TINY,
    "train.max_steps=100000",
    # A constant learning rate does not depend on max_steps, so a shorter run has the same losses.
    "optim.schedule=constant",
    "checkpoint.save_every=3",
    "checkpoint.keep_last=3",
    "eval.at_start=false",
    "export.enabled=false",
)
pytestmark = [pytest.mark.ray, pytest.mark.rest, pytest.mark.timeout(3600)]


def assert_losses_of_a_local_run(launch: Launch, run: Path) -> None:
    """Check that an undisturbed run on cluster=local has bitwise the same losses."""
    alone = run.with_name("alone")
    steps = (f"train.max_steps={last_step(run)}", "checkpoint.save_every=0", "cluster.ranks_per_node=1")
    done = launch(*SETTINGS, *steps, f"run.root={alone.parent}", f"run.name={alone.name}", timeout=DEADLINE_S)
    require_exit(done)
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


def test_a_run_survives_the_faults_of_its_processes_its_driver_and_ray_and_has_the_same_losses(
    launch: Launch, launch_here: Launch, start: Callable, root: Path, temporary: Path
) -> None:
    """Three faults hit the first driver, then it is killed; the second loses Ray.

    One node is enough here. test_ray_cluster.py has the faults that need several workers or nodes, and a driver that ends by a
    signal.
    """
    run, env = root / "faulty", {"TMPDIR": str(temporary), **slow_steps()}
    # Use as many threads as the run on cluster=local does.
    one = ("cluster.ranks_per_node=1", "cluster.env={OMP_NUM_THREADS: '1'}")
    own = (
        "+cluster=ray",
        *one,
        "cluster.stall_seconds=10",
        f"run.root={root}",
        f"run.name={run.name}",
        "--detach",
    )
    began = time.time()
    done = launch(*SETTINGS, *own, **env)
    require_exit(done)
    assert f"driver     {run}/attempts/001/agent.log" in done.stdout
    assert f"python -m launcher cancel {run}" in done.stdout
    wait_for("a step", lambda: last_step(run))
    # The target of a restart is 30 s on an idle machine.
    restart_s = max(60, min(step_times(run)) - began)
    assert re.search(r"^faulty +running ", launch_here("ls", "--root", str(root)).stdout, re.MULTILINE)
    require_closed(run, temporary)

    with start("logs", str(run), "-f", "--rank", "0") as terminal:
        for number, (fault, why) in enumerate(RESTARTS.items(), 1):
            assert_restarted(run, number, fault, why, restart_s)
        assert_survived(run, 1, kill_worker)
        assert_attempt_named_first(launch_here, run, 1, "ray_worker")
        before = logs_of_rank_0(run)
        os.kill(driver_of(run), signal.SIGKILL)
        await_no_process(run)
        shown, _ = terminal.communicate(timeout=DEADLINE_S)
    seen = json.loads(launch_here("status", str(run), "--json").stdout)
    assert seen["state"] == "failed"
    assert f"python -m launcher resume {run}" in seen["message"]
    assert causes(run) == ["infrastructure"]
    log, _, end = shown.rpartition("\nattempt 2 failed: ")
    # The rank outlives the driver for a moment, in which its log grows.
    assert log.startswith(before)
    assert logs_of_rank_0(run).startswith(log)
    assert end.endswith(f"{seen['message']}\n")

    # By default Ray needs 15 s to notice the loss; this run would train many steps meanwhile.
    quickly = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "8"}
    resume_and_close_the_terminal(start, run, **env, **quickly)
    require_few_processes(run)
    (raylet,) = [process for process in started_by(run) if process.name() == "raylet"]
    raylet.kill()

    def shown_status() -> dict:
        return json.loads(launch_here("status", str(run), "--json").stdout)

    # Ray may end the driver before it has recorded the loss.
    wait_for("its end", lambda: shown_status()["state"] == "failed")
    await_no_process(run)
    message = shown_status()["message"]
    assert message.startswith(("the raylet of ", "the driver ended without recording a result"))
    assert f"python -m launcher resume {run}" in message
    assert "rank-00000.log" in {path.name for path in (run / "attempts/003").iterdir()}
    assert launch_here("logs", str(run), "--rank", "0").returncode == 0
    assert_losses_of_a_local_run(launch, run)


def assert_restarted(run: Path, number: int, fault: Fault, why: str, restart_s: float) -> None:
    """Cause a fault in the first attempt: the node's agent restarts the ranks for the `number`-th time."""
    saved, step = newest_saved(run, 1), last_step(run)
    wait_for("a newer checkpoint and another step", lambda: saved < newest_saved(run, 1) and last_step(run) > step)
    before = ranks_of(run)
    fault(run, before)
    wait_for("a restart", lambda: f"(restart {number}): " in alerts(run, 1))
    restarted_at = next(line["time"] for line in json_lines(run / "events.jsonl") if f"(restart {number}): " in line["text"])
    assert re.search(rf"\(restart {number}\): rank 0: {why.replace('PID', str(before[0].pid))}", alerts(run, 1))
    step = last_step(run)
    wait_for("a step after it", lambda: last_step(run) > step)
    assert min(at for at in step_times(run) if at > restarted_at) - restarted_at < restart_s
    assert not any(rank.is_running() for rank in before.values())
    assert not (run / "attempts/002").exists()


def logs_of_rank_0(run: Path) -> str:
    """The logs of both attempts."""
    first, second = (run / f"attempts/{number:03d}/rank-00000.log" for number in (1, 2))
    return first.read_text(errors="replace") + second.read_text(errors="replace")


def step_times(run: Path) -> list[float]:
    return [line["time"] for line in metrics(run) if "train/loss" in line]


def resume_and_close_the_terminal(start: Callable, run: Path, **env: str) -> None:
    """Resume, and train some steps, most of them after the terminal has closed."""
    # The status may show an older step if the driver was killed.
    first_step = last_step(run)
    with ExitStack() as stack:
        # The tests may run with SIGHUP ignored (as under nohup), and child processes inherit that.
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        try:
            terminal = stack.enter_context(start("resume", str(run), **env))
        finally:
            signal.signal(signal.SIGHUP, before)
        wait_for("further steps", lambda: last_step(run) >= first_step + 2)
        terminal.send_signal(signal.SIGHUP)
        assert terminal.wait(DEADLINE_S) == -signal.SIGHUP
    seen = last_step(run)
    wait_for("steps that nobody follows", lambda: last_step(run) >= seen + 2)
    assert os.getsid(driver_of(run)) == driver_of(run), "nor does closing a terminal reach it"


def driver_of(run: Path) -> int:
    return int(status(run)["job"]["pid"])


def kill_rank(run: Path, ranks: Ranks) -> None:
    ranks[0].kill()


def hang_rank(run: Path, ranks: Ranks) -> None:
    ranks[0].suspend()


def kill_worker(run: Path, ranks: Ranks) -> None:
    """Kill Ray's worker on the node, as the kernel may do when its memory is used up; the agent and its ranks end with it."""
    (worker,) = [parent for parent in ranks[0].parents() if "ray::" in command_line(parent)]
    worker.kill()


# The faults that end ranks within an attempt, with how they are named; PID stands for the rank's.
RESTARTS: dict[Fault, str] = {
    kill_rank: "killed by SIGKILL",
    hang_rank: r"\(pid PID\) is stopped by a signal \(SIGSTOP\): no progress for",
}


def require_few_processes(run: Path) -> None:
    """Check that a Ray of its own without a dashboard starts no process that the run does not use."""
    titles = [command_line(process) for process in started_by(run)]
    assert any("dashboard/agent.py" in title for title in titles)
    assert not [title for title in titles for name in ("PlacementGroupCleaner", "ray::IDLE") if name in title]


def require_closed(run: Path, folder: Path) -> None:
    """Check that the run's own Ray requires its token, and that Ray listens only on loopback."""
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
    assert any(ips for title, ips in listening.items() if title.startswith("gcs_server"))
    assert set().union(*listening.values()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
