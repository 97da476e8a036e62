"""A real multi-node Ray cluster on this machine, with its own processes, ports, folders and token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

_START_S = 90
_END_S = 30
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RayCluster:
    """Ray nodes by name; each is a `ray start --block` with one CPU in its own process group."""

    def __init__(self) -> None:
        # A short path: the path of a Unix socket is limited, and Ray puts its sockets here.
        self.folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
        self.token = self.folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.port, self.dashboard_port = free_port(), free_port()
        # Each node has its own address, none of them 127.0.0.1: Ray would replace that with a network address.
        self.address = f"127.0.0.2:{self.port}"
        self.http = f"http://127.0.0.1:{self.dashboard_port}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._num_cpus: dict[str, int] = {}
        self._num_started = 0
        self._start_head: Callable[[], None] = lambda: None

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that a user needs to use the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def start(self, name: str, *options: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Start a node; the first is the head. `prefix` is a command that runs `ray start`."""
        head = not self._nodes
        if head:
            self._start_head = partial(self.start, name, *options, prefix=prefix, env=env)
            self._num_started = 0
        mode_options = ["--head", f"--port={self.port}"] if head else [f"--address={self.address}"]
        dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        command = [
            *prefix,
            *RAY,
            "start",
            *mode_options,
            "--block",
            f"--node-name={name}",
            f"--node-ip-address={self._next_ip()}",
        ]
        # The default is a fixed port, which would be taken if a second cluster ran on this machine.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        # The log monitors of four nodes use a sixth of a core.
        command += ["--disable-usage-stats", "--include-log-monitor=False"]
        # No test adds nodes through the autoscaler.
        command += ["--no-monitor"] if head else []
        command += ["--object-store-memory=100000000", "--num-cpus=1", "--num-gpus=0"]
        command += [f"--temp-dir={self.folder / 'ray'}", *dashboard] if head else []
        own = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "8"}
        # Ray's agents scan all processes of this machine: do that less often than every 5 s.
        own["REPORTER_UPDATE_INTERVAL_MS"] = "60000"
        # No test reads metrics or the history of tasks.
        own |= {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
        # The first driver on a node would get a worker that its run, which sets variables, cannot use.
        own["RAY_prestart_worker_first_driver"] = "0"
        # Beside other tests Ray's control service may need longer than Ray's default of 20 s.
        own["RAY_gcs_server_port_wait_time_s"] = "120"
        # Overwrite the log of an earlier node of that name: `_await` searches this file.
        with open(self.folder / f"{name}.log", "wb") as log:
            self._nodes[name] = subprocess.Popen(
                [*command, *options],
                env={**os.environ, **self.env, **own, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await(name)

    def have_only(self, **num_cpus: int) -> None:
        """Keep exactly these nodes besides the head, each with this many CPUs; nodes that already match stay.

        If the head is gone, because of a test or a busy machine, all nodes are replaced.
        """
        head = next(iter(self._nodes), None)
        if head is None or not self._has_raylet(head):
            for name in [*self._nodes][::-1]:
                self.kill(name)
            self._start_head()
        for name in [*self._nodes][1:]:
            if self._num_cpus.get(name, 1) != num_cpus.get(name) or not self._has_raylet(name):
                self.remove(name)
        for name, number in num_cpus.items():
            if name not in self._nodes:
                self.start(name, f"--num-cpus={number}")
                self._num_cpus[name] = number

    def remove(self, name: str) -> None:
        """Stop a node as `ray stop` does, so that Ray notices immediately."""
        for raylet in self._raylets(name):
            raylet.terminate()
            psutil.wait_procs([raylet], timeout=_END_S)
        self.kill(name)

    def kill(self, name: str) -> None:
        """Kill all processes of a node at once, as if its machine were lost; do nothing if they are gone already."""
        if (process := self._nodes.pop(name, None)) is not None:
            _kill(process)

    def kill_raylet(self, name: str) -> None:
        """Kill only the raylet, the process that represents the node in Ray."""
        (raylet,) = self._raylets(name)
        raylet.kill()

    def drain(self, name: str, seconds: int = 60) -> None:
        """Tell Ray that a node is about to be preempted."""
        completed = self._run(
            "drain-node",
            f"--address={self.address}",
            f"--node-id={self.node_id(name)}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=taken",
            f"--deadline-remaining-seconds={seconds}",
        )
        assert completed.returncode == 0, completed.stdout + completed.stderr

    def node_id(self, name: str) -> str:
        """Ray's ID of a node, which is on the command line of its raylet."""
        (raylet,) = self._raylets(name)
        return next(word for word in raylet.cmdline() if word.startswith("--node_id=")).partition("=")[2]

    def stop(self) -> None:
        for process in reversed(self._nodes.values()):
            _kill(process)
        self._nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _raylets(self, name: str) -> list[psutil.Process]:
        try:
            return [p for p in psutil.Process(self._nodes[name].pid).children(recursive=True) if p.name() == "raylet"]
        except psutil.NoSuchProcess:
            return []

    def _has_raylet(self, name: str) -> bool:
        return any(raylet.status() != psutil.STATUS_ZOMBIE for raylet in self._raylets(name))

    def _next_ip(self) -> str:
        self._num_started += 1
        return f"127.0.0.{1 + self._num_started}"

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*RAY, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **self.env})

    def _await(self, name: str) -> None:
        end, log = time.monotonic() + _START_S, self.folder / f"{name}.log"
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert self._nodes[name].poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)


def hiding(*folders: Path, replaced: Mapping[Path, Path] | None = None) -> list[str]:
    """A command prefix for a node that sees these folders empty, and these files replaced by others."""
    mounts = [f"mount -t tmpfs tmpfs {folder}" for folder in folders]
    mounts += [f"mount --bind {other} {file}" for file, other in (replaced or {}).items()]
    return ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants, even those in other sessions."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=_END_S)
    process.wait(_END_S)
