"""A real multi-node Ray cluster on this machine, with its own processes, ports and token; runs on Ray seen from outside."""

from __future__ import annotations

import json
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
from contextlib import suppress
from functools import partial
from pathlib import Path

import pace
import psutil
from e2e_tools import by_rank, command_line, json_lines, metrics
from forked import require_exit
from hand_made import causes_of

from launcher.plan.run_dir import RunDir
from launcher.runs import run_store

# For a run, or for any event in it, on a machine that is busy with other tests: starting Ray's processes alone can take minutes.
DEADLINE_S = 500.0
Ranks = dict[int, psutil.Process]
Fault = Callable[[Path, Ranks], None]
_START_S = 90
_END_S = 30
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def wait_for(what: str, condition: Callable[[], object]) -> None:
    pace.wait_for(what, condition, DEADLINE_S)


def started_by(run: Path) -> list[psutil.Process]:
    """Every process with the run's folder in its PYTHONPATH (Ray's own) or on its command line (the title of ranks)."""
    processes = []
    for process in psutil.process_iter():
        try:
            text = " ".join([*process.cmdline(), process.environ().get("PYTHONPATH", "")])
            if str(run) in text and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def kill_all(folder: Path) -> None:
    """Kill drivers and ranks that still run from a runs folder; the rest of a run's own Ray ends with its driver."""
    for process in launcher_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def launcher_processes(run: Path) -> list[psutil.Process]:
    return [process for process in started_by(run) if "launcher" in command_line(process)]


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The rank processes of a run, by rank."""
    return by_rank(started_by(run))


def await_no_process(run: Path) -> None:
    wait_for("every process of the run to end", lambda: not started_by(run))


def await_no_launcher(run: Path) -> None:
    """Wait only for the launcher's processes: on a shared cluster, Ray keeps idle workers for the next job."""
    wait_for("driver and ranks to end", lambda: not launcher_processes(run))


def causes(run: Path) -> list[str]:
    return causes_of(run)


def environments_of(folder: Path, attempt: int) -> list[dict[str, str | None]]:
    """Selected environment variables of each rank of an attempt, see rows_seen/."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{attempt:03d}-*.environ"))]


def alerts(run: Path, attempt: int) -> str:
    """The alerts of an attempt, one per line."""
    lines = json_lines(run / "events.jsonl")
    return "\n".join(line["text"] for line in lines if line["attempt"] == attempt)


def newest_saved(run: Path, attempt: int) -> int:
    """The step of the newest checkpoint that an attempt committed, 0 if there is none."""
    manifests = [json.loads(file.read_text()) for file in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((manifest["step"] for manifest in manifests if manifest["attempt"] == attempt), default=0)


def trained(run: Path, attempt: int) -> list[int]:
    """The steps that an attempt has logged."""
    return [line["trainer/step"] for line in metrics(run) if line["attempt"] == attempt and "train/loss" in line]


def rows_of(run: Path, folder: Path) -> dict[int, list[tuple[int, list[int]]]]:
    """The rows of each step, once per time it was trained: the number of ranks, and the sorted rows of all ranks.

    Batches prepared for a step that the attempt never reached are left out.
    """
    rows: dict[int, list[tuple[int, list[int]]]] = {}
    trained = {(line["attempt"], int(line["trainer/step"])) for line in metrics(run) if "train/loss" in line}
    for attempt in sorted({number for number, _ in trained}):
        record = run_store.read_attempt(RunDir(run), attempt)
        batches = [
            [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob(f"{attempt:03d}-*.jsonl"))
        ]
        assert len(batches) == run_store.load_plans_until(RunDir(run), attempt)[-1].topology.world_size
        for step in sorted(step for number, step in trained if number == attempt):
            parts = [rank[step - (record.resume_step or 0) - 1] for rank in batches]
            own = sorted(row for part in parts for row in part["own"])
            assert all(sorted(part["all"]) == own for part in parts), "together the ranks have the whole batch, once"
            rows.setdefault(step, []).append((len(parts), own))
    return rows


def await_training(run: Path, num_nodes: int) -> None:
    """Wait until an attempt on this many nodes has logged a step."""

    def training() -> bool:
        attempts = {line["attempt"] for line in metrics(run) if "train/loss" in line}
        newest = max(attempts, default=0)
        return newest > 0 and len(run_store.read_attempt(RunDir(run), newest).nodes) == num_nodes

    wait_for(f"training on {num_nodes} nodes", training)


def hang_worker(run: Path, ranks: Ranks) -> None:
    """Suspend a rank and its worker, as if their machine hung: nothing reports about the rank any more."""
    for process in (ranks[1], *ranks[1].parents()):
        if "raylet" in command_line(process):
            # Its own parents are this test's.
            return
        process.suspend()


def assert_survived(run: Path, attempt: int, fault: Fault) -> Ranks:
    """Cause a fault in an attempt, check how the next attempt continues, and return the ranks that the fault hit."""

    def has_progressed() -> bool:
        saved = newest_saved(run, attempt)
        return saved > 0 and max(trained(run, attempt), default=0) > saved

    wait_for(f"a checkpoint of attempt {attempt} and another step", has_progressed)
    before = ranks_of(run)
    fault(run, before)
    following = run / f"attempts/{attempt + 1:03d}"
    wait_for(f"the attempt after {fault.__name__}", (following / "agent-00000.log").exists)
    assert not any(rank.is_running() for rank in before.values()), "no rank of the attempt before is left"
    saved = run_store.read_attempt(RunDir(run), attempt + 1).resume_step
    assert saved == newest_saved(run, attempt)
    assert saved > 0
    wait_for(f"a step after {fault.__name__}", lambda: trained(run, attempt + 1))
    assert trained(run, attempt + 1)[0] == saved + 1, "no more is repeated than was done since the last checkpoint"
    return before


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
        require_exit(completed)

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
