"""`status`, the alert and the end of `logs` name what ended a local run in their first line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from causes import assert_run_named_first
from e2e_tools import TINY, agent_of, kill_all_of, last_step, metrics, ranks_of, status
from pace import slowness, wait_for

pytestmark = [pytest.mark.rest, pytest.mark.timeout(900)]

Launch = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = (
    *TINY,
    "eval.at_start=false",
    "export.enabled=false",
    "train.max_steps=100000",
    "checkpoint.save_every=10",
    "checkpoint.keep_last=1",
    "cluster.stall_seconds=10",
)
DEADLINE_S = 180
_CHUNK = b"x" * 2**24


class Faults:
    """The faults of one attempt; `groups` are the control groups of its processes, by controller."""

    def __init__(self, run: Path, groups: Mapping[str, Path]) -> None:
        self.run, self.groups = run, groups

    def segv(self) -> None:
        ranks_of(self.run)[1].send_signal(signal.SIGSEGV)

    def kill(self) -> None:
        ranks_of(self.run)[1].kill()

    def stop(self) -> None:
        ranks_of(self.run)[1].suspend()

    def memory(self) -> None:
        self._exhaust_memory(ranks_of(self.run)[1])

    def agent_memory(self) -> None:
        self._exhaust_memory(agent_of(self.run))

    def _exhaust_memory(self, victim: psutil.Process) -> None:
        """Fill the control group's memory until the kernel kills the process."""
        group = self._group("memory")
        Path(f"/proc/{victim.pid}/oom_score_adj").write_text("1000")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, usage = (group / name for name in (names if (group / names[0]).exists() else ("memory.max", "memory.current")))
        limit.write_text(str(int(usage.read_text()) + len(_CHUNK)))
        # Shared memory cannot be reclaimed, unlike the page cache.
        code = "import sys\nwith open('/dev/shm/' + sys.argv[1], 'wb') as f:\n while True: f.write(b'x' * 2**20); f.flush()"
        name = f"causes-{os.getpid()}"
        filler = subprocess.Popen([sys.executable, "-c", code, name], preexec_fn=lambda: join(group))
        try:
            victim.wait(60)
        finally:
            filler.kill()
            filler.wait()
            Path("/dev/shm", name).unlink(missing_ok=True)

    def processes(self) -> None:
        group = self._group("pids")
        (group / "pids.max").write_text((group / "pids.current").read_text())

    def open_files(self) -> None:
        rank = ranks_of(self.run)[1]
        # RLIMIT_NOFILE limits descriptor numbers, and new descriptors get the lowest free one.
        used = {int(descriptor.name) for descriptor in Path(f"/proc/{rank.pid}/fd").iterdir()}
        lowest = min({*range(len(used) + 1)} - used)
        rank.rlimit(psutil.RLIMIT_NOFILE, (lowest, rank.rlimit(psutil.RLIMIT_NOFILE)[1]))

    def disk(self) -> None:
        """Fill the disk to the last byte, and fill again what a save frees."""
        with open(self.run.parent / "filler", "ab", buffering=0) as filler:
            deadline = time.monotonic() + 60
            while status(self.run)["state"] in ("running", "saving") and time.monotonic() < deadline:
                with suppress(OSError):
                    while True:
                        filler.write(b"x" * 2**16)
                with suppress(OSError):
                    while True:
                        filler.write(b"x")
                time.sleep(0.2)

    def _group(self, controller: str) -> Path:
        if controller not in self.groups:
            pytest.skip(f"no control group for {controller} can be made here")
        return self.groups[controller]


# The faults that end a local run; the tests of each cluster backend cover its own faults.
FAULTS = ("segv", "kill", "stop", "memory", "processes", "open_files", "disk", "agent_memory")


def join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[str, Path]]:
    """Control groups for this test, by controller; those that cannot be created here are missing."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        for controller, limit in (("memory", "memory.limit_in_bytes"), ("pids", "pids.max")):
            if controller == controllers:
                folder = Path("/sys/fs/cgroup", controller, group.lstrip("/"), f"causes-{os.getpid()}")
                with suppress(OSError):
                    folder.mkdir()
                    if (folder / limit).is_file():
                        found[controller] = folder
    yield found
    for folder in found.values():
        with suppress(OSError):
            folder.rmdir()


@pytest.fixture(scope="module")
def small_disk(module_runs: Path) -> Iterator[Path]:
    """A separate small disk for the run."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can mount a small disk")
    module_runs.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", module_runs], check=True, timeout=10)
    try:
        yield module_runs
    finally:
        kill_all_of(module_runs)
        subprocess.run(["umount", "--lazy", module_runs], check=True, timeout=10)


@pytest.fixture(scope="module")
def run(small_disk: Path, launch: Launch) -> Path:
    """One run for all faults, each of which ends one attempt."""
    done = launch(*SETTINGS, "train.max_steps=1", f"run.root={small_disk}", "run.name=faulty")
    assert done.returncode == 0, done.stdout + done.stderr
    return small_disk / "faulty"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_cause_is_named_first_in_status_alert_and_logs(
    fault: str, run: Path, groups: dict[str, Path], launch_here: Launch, launcher_env: Mapping[str, str]
) -> None:
    attempt = status(run)["attempt"] + 1
    begun = last_step(run)

    def join_groups() -> None:
        for group in groups.values():
            join(group)

    # A failed save ends a run only if it is the last save.
    last = begun + 60 if fault == "disk" else 100000
    command = [sys.executable, "-m", "launcher", "resume", str(run), f"train.max_steps={last}"]
    with subprocess.Popen(
        command, env={**launcher_env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=join_groups
    ) as process:
        try:
            wait_for("some steps", lambda: last_step(run) >= begun + 3 and metrics(run)[-1]["attempt"] == attempt, DEADLINE_S)
            getattr(Faults(run, groups), fault)()
            output, _ = process.communicate(timeout=DEADLINE_S * slowness())
        finally:
            process.kill()
            for name, largest in (("pids", "max"), ("memory", "-1")):
                if name in groups:
                    (groups[name] / ("pids.max" if name == "pids" else "memory.limit_in_bytes")).write_text(largest)
    assert process.returncode == 1, output
    # If the agent itself is killed, nothing is left to send an alert or to record the end.
    is_recorded = fault != "agent_memory"
    assert_run_named_first(launch_here, run, fault, alert="the attempt failed: " if is_recorded else "")
    agent_log = (run / f"attempts/{attempt:03d}/agent.log").read_text()
    assert "Traceback" not in agent_log
    assert "ranks are started as new processes" not in agent_log
    assert (status(run)["state"] == "failed") is is_recorded
    (run.parent / "filler").unlink(missing_ok=True)
