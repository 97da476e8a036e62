"""With cluster=static, the same command runs on two machines: here two local processes with different NODE_RANK.

Only this file starts the machines; they share the runs folder and connect over loopback.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_tools import FIRST_RUN, FIRST_STEPS, alerts, command_line, committed, json_lines, last_step, losses, slow_steps, status
from forked import ForkServer, Launch, require_exit
from pace import slowness, wait_for

from launcher.clusters.network import free_port

DEADLINE_S = 240
LOST_S = 12
SETTINGS = (*FIRST_RUN, "export.enabled=false")
# Seconds per step: all attempts but the last together train fewer steps than FIRST_RUN has.
SLOW_S = 3.0
ONE_RANK = ("cluster.ranks_per_node=1",)


class Machine:
    """The launcher command of one machine."""

    def __init__(
        self,
        server: ForkServer,
        node: int,
        port: int,
        words: tuple[str, ...],
        env: Mapping[str, str],
        wrapper: tuple[str, ...],
        step_s: float,
        address: str,
    ) -> None:
        variables = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        variables["LAUNCHER_LOST_NODE_SECONDS"] = str(LOST_S)
        options |= {"env": {**env, **slow_steps(step_s), **variables}, "cwd": env["PYTHONPATH"]}
        if wrapper:
            self.process: Any = subprocess.Popen([*wrapper, sys.executable, "-m", "launcher", *words], **options)
        else:
            self.process = server.popen("forked_stack", "launcher", *words, **options)

    def end(self) -> tuple[int, str]:
        """Wait for the command to end; return its exit code and output."""
        output, _ = self.process.communicate(timeout=DEADLINE_S * slowness())
        return self.process.returncode, output

    @property
    def agent(self) -> psutil.Process:
        (agent,) = [
            child for child in psutil.Process(self.process.pid).children() if "launcher.worker.static" in command_line(child)
        ]
        return agent


@pytest.fixture
def machines(
    launcher_env: Mapping[str, str], torch_server: Callable[[], ForkServer], runs: Path
) -> Iterator[Callable[..., Machine]]:
    """`machines(NODE, *WORDS)` starts the command of a machine; all machines use the same port. See forked_stack.py."""
    port, started = free_port("127.0.0.1"), []

    def begin(node: int, *words: str, wrapper: tuple[str, ...] = (), step_s: float = 0.3, address: str = "127.0.0.1") -> Machine:
        started.append(Machine(torch_server(), node, port, words, launcher_env, wrapper, step_s, address))
        return started[-1]

    yield begin
    for machine in started:
        if machine.process.poll() is None:
            machine.process.kill()
        machine.process.communicate(timeout=60)


def train(runs: Path, name: str, *more: str) -> tuple[str, ...]:
    return ("+cluster=static", *SETTINGS, *ONE_RANK, f"run.root={runs}", f"run.name={name}", *more)


@pytest.mark.rest
def test_two_machines_train_as_two_ranks_here_through_a_killed_agent_a_preemption_and_a_cancel(
    machines: Callable[..., Machine], launch_here: Launch, runs: Path, first_run: Path
) -> None:
    """Several attempts of one run, each of which ends in a different way; the same command continues the run."""
    words, run = train(runs, "disturbed", "checkpoint.save_every=2", "checkpoint.keep_last=2"), runs / "disturbed"

    def both() -> tuple[Machine, Machine]:
        return machines(0, *words, step_s=SLOW_S), machines(1, *words, step_s=SLOW_S)

    def trains(attempt: int) -> None:
        wait_for(f"steps of attempt {attempt}", lambda: attempt in attempts_with_steps(run), DEADLINE_S)

    # Start the second machine before the first, and its processes as a user does.
    other = machines(1, *words, wrapper=("env",), step_s=SLOW_S)
    time.sleep(2)
    head = machines(0, *words, step_s=SLOW_S)
    trains(1)
    wait_for("a checkpoint", lambda: has_checkpoint(run), DEADLINE_S)
    shown = launch_here("status", str(run)).stdout
    assert "running" in shown
    other.agent.kill()
    began = time.monotonic()
    ends = head.end(), other.end()
    for code, output in ends:
        assert code == 1, output
        assert "the agent of " in output
        assert "-1 was killed by SIGKILL" in output
        assert "repeat the command on every machine to continue" in output
    assert "waiting for node 0 at 127.0.0.1:" in ends[1][1]
    # The ranks notice the loss at once; they get ten more seconds to report their own errors.
    assert time.monotonic() - began < 60 * slowness()
    assert status(run)["state"] == "failed"
    assert any("the attempt ended (infrastructure)" in text for text in alerts(run))

    head, other = both()
    trains(2)
    other.process.send_signal(signal.SIGTERM)
    for machine in (head, other):
        code, output = machine.end()
        assert code == 130, output
    assert status(run)["state"] == "preempted"
    saved = status(run)["step"]
    assert f"step-{saved:08d}" in committed(run)
    resumed_at = min(step for step in attempts_with_steps(run)[2])
    assert resumed_at > 1
    # A step trained in both attempts has the same loss in both.
    first, second = attempts_with_steps(run)[1], attempts_with_steps(run)[2]
    assert all(first[step] == second[step] for step in first.keys() & second.keys())

    head, other = both()
    trains(3)
    assert min(attempts_with_steps(run)[3]) == saved + 1
    cancelled = launch_here("cancel", str(run))
    require_exit(cancelled)
    for machine in (head, other):
        code, output = machine.end()
        assert code == 130, output
    assert status(run)["state"] == "cancelled"

    # The user resumes the cancelled run: the same command on both machines, with settings that a resume may change.
    assert last_step(run) < FIRST_STEPS
    ends = [machine.end() for machine in [machines(node, "resume", str(run), "checkpoint.keep_last=3") for node in (0, 1)]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert re.search(rf"step +{FIRST_STEPS}/{FIRST_STEPS}\b", ends[0][1])
    assert status(run)["state"] == "completed"
    assert not (runs / ".disturbed.start").exists()
    assert "completed" in launch_here("status", str(run)).stdout
    assert losses(run) == losses(first_run)

    # Neither the same command nor a different one starts a completed run again.
    num_attempts = len([*run.glob("attempts/*")])
    for machine in both():
        code, output = machine.end()
        assert code == 0, output
        assert f"disturbed is completed: {FIRST_STEPS} steps; nothing is left to do" in output
    for machine in [machines(node, *words, "optim.weight_decay=0.5") for node in (0, 1)]:
        code, output = machine.end()
        assert code == 2, output
        assert "the command differs from the one that began the run" in output
    assert len([*run.glob("attempts/*")]) == num_attempts


def has_checkpoint(run: Path) -> bool:
    """Whether a checkpoint is complete; until then it has another name."""
    return (run / "checkpoints").is_dir() and any(name.startswith("step-") for name in committed(run))


def attempts_with_steps(run: Path) -> dict[int, dict[int, float]]:
    """The loss of each step, by attempt."""
    by_attempt: dict[int, dict[int, float]] = {}
    for line in json_lines(run / "metrics.jsonl"):
        if "train/loss" in line:
            by_attempt.setdefault(line["attempt"], {})[line["trainer/step"]] = line["train/loss"]
    return by_attempt


@pytest.mark.rest
def test_a_lost_machine_and_a_run_root_of_its_own_are_named(machines: Callable[..., Machine], runs: Path) -> None:
    """First the second machine has its own file system at run.root; then it loses its network."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system and make a network")
    words, run = train(runs, "apart", "train.max_steps=100000", "checkpoint.save_every=2"), runs / "apart"
    runs.mkdir(exist_ok=True)
    own = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(runs))
    for machine in (machines(0, *words), machines(1, *words, wrapper=own)):
        code, output = machine.end()
        assert code == 2, output
        assert "run.root is not shared: " in output
        assert "every machine mounts under the same path" in output
    assert not run.exists()

    # Cut off before it is killed, as a machine that loses power: nothing of it reaches node 0.
    with network_of_its_own() as (namespace, address):
        head = machines(0, *words, wrapper=("env",), address=address)
        other = machines(1, *words, wrapper=("ip", "netns", "exec", namespace), address=address)
        wait_for("a checkpoint", lambda: has_checkpoint(run), DEADLINE_S)
        ip("-n", namespace, "link", "set", "eth0", "down")
        other.process.kill()
        code, output = head.end()
    assert code == 1, output
    assert re.search("-1 was lost: (Connection timed out|No route to host)", output), output
    assert "repeat the command on every machine to continue" in output


@contextmanager
def network_of_its_own() -> Iterator[tuple[str, str]]:
    """A network namespace with a link to this machine, by name, and this machine's address on the link."""
    name, address = f"static{os.getpid() % 100000}", "198.18.8.1"
    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{address}/30", "dev", name)
        ip("link", "set", name, "up")
        for words in (
            ("addr", "add", "198.18.8.2/30", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", name, *words)
        yield name, address
    finally:
        ip("netns", "delete", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


def test_a_run_without_a_name_or_a_shared_folder_is_refused(launch_here: Launch, tmp_path: Path) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = launch_here("+cluster=static", *SETTINGS, "run.root=runs", cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert "run.name is needed" in done.stderr
    assert "run.root must be on storage that all machines share" in done.stderr
    assert not [*tmp_path.iterdir()]
    done = launch_here("+cluster=static", *SETTINGS, "cluster.node_rank=2", "run.name=x", f"run.root={tmp_path}", **variables)
    assert done.returncode == 2
    assert "there is no node 2 among 2" in done.stderr
