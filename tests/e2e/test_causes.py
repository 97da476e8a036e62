"""`status`, the alert and the end of `logs` name what ended a local run, or restarted its ranks, in their first line.

tests/e2e/test_resume_exact.py and tests/e2e/test_wandb_run.py check this for ranks that a signal killed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from causes import CAUSES, assert_run_named_first
from e2e_tools import TINY, agent_of, alerts, kill_all_of, last_step, metrics, processes_of, ranks_of, slow_steps, status
from forked import Launch
from pace import slowness, wait_for
from unusual_files import small_disk

pytestmark = [pytest.mark.rest, pytest.mark.timeout(900)]


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
Look = TypeVar("Look")
_CHUNK = b"x" * 2**24


class Faults:
    """The faults of one attempt; `groups` are the control groups of its processes, by controller."""

    def __init__(self, run: Path, groups: Mapping[str, Path]) -> None:
        self.run, self.groups = run, groups

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
        # Shared memory cannot be reclaimed, unlike the page cache. Filled slowly, by a process that the kernel kills before any
        # other, so that only the victim ends.
        code = (
            "import sys, time\n"
            "with open('/dev/shm/' + sys.argv[1], 'wb') as f:\n"
            " while True: f.write(b'x' * 2**20); f.flush(); time.sleep(0.01)"
        )
        name = f"causes-{os.getpid()}"
        filler = subprocess.Popen([sys.executable, "-c", code, name], preexec_fn=lambda: join(group))
        try:
            Path(f"/proc/{filler.pid}/oom_score_adj").write_text("999")
            wait_for("the kernel to kill a process", lambda: has_ended(victim), 60)
        finally:
            filler.kill()
            filler.wait()
            Path("/dev/shm", name).unlink(missing_ok=True)

    def processes(self) -> None:
        group = self._group("pids")
        (group / "pids.max").write_text(str(min(int(text) for text in _looks((group / "pids.current").read_text))))

    def open_files(self) -> None:
        rank = ranks_of(self.run)[1]
        # RLIMIT_NOFILE limits descriptor numbers, and a descriptor gets the lowest free one.
        used = set.intersection(*_looks(lambda: {int(path.name) for path in Path(f"/proc/{rank.pid}/fd").iterdir()}))
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
        return self.groups[controller]


# The faults of ranks and of the agent, with the control group that a fault needs. The tests of each cluster backend cover its
# own faults.
FAULTS_OF_RANKS = {"stop": "", "memory": "memory", "open_files": "", "processes": "pids"}
FAULTS_OF_ATTEMPTS = {"disk": "", "agent_memory": "memory"}


def _looks(look: Callable[[], Look]) -> list[Look]:
    """What is seen during a second, in which a save holds more threads and files for a moment."""
    seen = []
    for _ in range(20):
        seen.append(look())
        time.sleep(0.05)
    return seen


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, also if nothing has waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


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
def disk(module_runs: Path) -> Iterator[Path]:
    """A separate small disk for the run."""
    module_runs.mkdir(exist_ok=True)
    with small_disk(module_runs, "200m"):
        try:
            yield module_runs
        finally:
            kill_all_of(module_runs)


@pytest.fixture(scope="module")
def run(disk: Path) -> Path:
    """One run for all faults."""
    return disk / "faulty"


def lift_limits(groups: Mapping[str, Path]) -> None:
    for name, file, largest in (("pids", "pids.max", "max"), ("memory", "memory.limit_in_bytes", "-1")):
        if name in groups:
            (groups[name] / file).write_text(largest)


@contextmanager
def attempt(run: Path, groups: Mapping[str, Path], env: Mapping[str, str], *settings: str) -> Iterator[subprocess.Popen[str]]:
    """Start the run or resume it, in the control groups, and check that it fails inside the block."""
    words = ("resume", str(run)) if run.exists() else (*SETTINGS, f"run.root={run.parent}", f"run.name={run.name}")

    def join_groups() -> None:
        for group in groups.values():
            join(group)

    with subprocess.Popen(
        [sys.executable, "-m", "launcher", *words, *settings],
        env={**env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=join_groups,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            lift_limits(groups)
            kill_all_of(run)


def await_steps(process: subprocess.Popen[str], run: Path, number: int, num_restarts: int = 0) -> None:
    """Wait until an attempt has trained some steps after its last restart."""

    def trained() -> int:
        assert process.poll() is None, process.communicate()
        now = [line for line in metrics(run) if "train/loss" in line and line["attempt"] == number]
        return len([line for line in now if line["run/restarts"] == num_restarts])

    wait_for(f"some steps after {num_restarts} restarts", lambda: trained() >= 3, DEADLINE_S)


def test_what_restarts_the_ranks_and_what_ends_the_run_is_named_first(
    run: Path, groups: dict[str, Path], launch_here: Launch, launcher_env: Mapping[str, str]
) -> None:
    """One attempt: each fault but the last costs a restart."""
    *faults, last = (fault for fault, group in FAULTS_OF_RANKS.items() if not group or group in groups)
    with attempt(run, groups, launcher_env, "checkpoint.save_every=2", f"cluster.max_restarts={len(faults)}") as process:
        for count, fault in enumerate(faults):
            await_steps(process, run, 1, count)
            getattr(Faults(run, groups), fault)()
            prefix = f"all ranks are restarted (restart {count + 1}): "
            wait_for(
                f"the restart after {fault}",
                lambda prefix=prefix: [text for text in alerts(run) if text.startswith(prefix)],
                DEADLINE_S,
            )
            (line,) = [text.removeprefix(prefix).partition("\n")[0] for text in alerts(run) if text.startswith(prefix)]
            lift_limits(groups)
            assert re.fullmatch(CAUSES[fault], line), line
        await_steps(process, run, 1, len(faults))
        getattr(Faults(run, groups), last)()
        output, _ = process.communicate(timeout=DEADLINE_S * slowness())
    assert process.returncode == 1, output
    assert_run_named_first(launch_here, run, last)
    assert_quiet_agent(run, 1)


@pytest.mark.parametrize("fault", FAULTS_OF_ATTEMPTS)
def test_the_cause_is_named_first_in_status_alert_and_logs(
    fault: str, run: Path, groups: dict[str, Path], launch_here: Launch, launcher_env: Mapping[str, str]
) -> None:
    if (group := FAULTS_OF_ATTEMPTS[fault]) and group not in groups:
        pytest.skip(f"no control group for {group} can be made here")
    number = status(run)["attempt"] + 1 if run.exists() else 1
    # A failed save ends a run only if it is the last save.
    last = last_step(run) + 20 if fault == "disk" else 100000
    changes = (f"train.max_steps={last}", "checkpoint.save_every=10", "cluster.max_restarts=0")
    with attempt(run, groups, {**launcher_env, **slow_steps(0.3)}, *changes) as process:
        await_steps(process, run, number)
        getattr(Faults(run, groups), fault)()
        output, _ = process.communicate(timeout=DEADLINE_S * slowness())
        wait_for("the ranks to end", lambda: not processes_of(run), deadline_s=20)
    assert process.returncode == 1, output
    # If the agent itself is killed, nothing is left to send an alert or to record the end.
    is_recorded = fault != "agent_memory"
    assert_run_named_first(launch_here, run, fault, alert="the attempt failed: " if is_recorded else "")
    assert_quiet_agent(run, number)
    assert (status(run)["state"] == "failed") is is_recorded
    (run.parent / "filler").unlink(missing_ok=True)


def assert_quiet_agent(run: Path, number: int) -> None:
    """Check the log of an attempt's agent."""
    agent_log = (run / f"attempts/{number:03d}/agent.log").read_text()
    assert "Traceback" not in agent_log
    assert "ranks are started as new processes" not in agent_log
