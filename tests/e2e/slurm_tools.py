"""Inspect runs on the Slurm testbed from outside: their jobs, attempts, and processes on the nodes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
from e2e_tools import TINY, command_line, json_lines, metrics, slow_steps, status
from forked import Launch, require_exit
from hand_made import causes_of
from pace import wait_for
from testbed_cluster import Testbed

from launcher.plan.run_dir import RunDir
from launcher.runs import run_store

STEPS = 120
SETTINGS = (
    *TINY,
    "+cluster=slurm",
    "cluster.exclusive=false",
    "cluster.time=10:00",
    "cluster.ranks_per_node=1",
    "cluster.nodes=2",
    "checkpoint.save_every=20",
    "checkpoint.keep_last=3",
    "export.enabled=false",
    "eval.at_start=false",
    f"train.max_steps={STEPS}",
)
ENDED = ("completed", "failed", "cancelled", "preempted")


def process_of(pid: int) -> psutil.Process | None:
    """The process with this ID, None if it has ended."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True)
class SlurmRun:
    path: Path
    bed: Testbed
    launch: Launch

    @property
    def attempt(self) -> int:
        return run_store.newest_attempt(RunDir(self.path))

    @property
    def job(self) -> str:
        """The job of the newest attempt."""
        return self.job_of(self.attempt)

    def job_of(self, number: int) -> str:
        """The job of an attempt, empty until Slurm has assigned one."""
        submitted = self.path / f"attempts/{number:03d}/submitted.json"
        job = self.attempt_record(number)["job"]
        return job or (json.loads(submitted.read_text())["job"] if submitted.is_file() else "")

    def attempt_record(self, number: int, name: str = "attempt") -> dict:
        return json.loads((self.path / f"attempts/{number:03d}/{name}.json").read_text())

    def causes(self) -> list[str]:
        """Why each attempt ended, oldest first."""
        return causes_of(self.path)

    def shown(self) -> dict:
        """What `status --json` reports."""
        done = self.launch("status", str(self.path), "--json", **self.bed.variables)
        require_exit(done)
        return json.loads(done.stdout)

    def queued(self, job: str | None = None) -> str:
        return self.bed.output("squeue", "-h", "-j", job or self.job, "-o", "%T").strip()

    def ranks(self, node: str) -> list[psutil.Process]:
        return self._processes(node, "launcher rank ")

    def agents(self, node: str) -> list[psutil.Process]:
        return self._processes(node, "launcher.worker.slurm.agent ")

    def kill_batch_script(self) -> None:
        """Kill the batch script: the shell on the first node that concludes the attempt."""
        node = self.attempt_record(self.attempt)["nodes"][0]
        every = [process for process in map(process_of, self.bed.processes(node)) if process is not None]
        [*_, script] = [process for process in every if command_line(process).endswith(f"/job{self.job}/slurm_script")]
        script.kill()

    def _processes(self, node: str, words: str) -> list[psutil.Process]:
        every = [process for process in map(process_of, self.bed.processes(node)) if process is not None]
        return [process for process in every if words in (line := command_line(process)) and str(self.path) in line]

    def await_step(self, step: int, attempt: int = 1, deadline_s: float = 240) -> None:
        def there() -> bool:
            if status(self.path)["state"] in ENDED:
                raise AssertionError(f"ended early: {status(self.path)}\n{self.output()}")
            return any(m["trainer/step"] >= step and m["attempt"] >= attempt for m in metrics(self.path) if "train/loss" in m)

        wait_for(f"step {step} of attempt {attempt}", there, deadline_s)

    def await_state(self, *states: str, deadline_s: float = 240) -> dict:
        wait_for(f"{self.path.name} to be {' or '.join(states)}", lambda: status(self.path)["state"] in states, deadline_s)
        return status(self.path)

    def await_completed(self, deadline_s: float = 300) -> None:
        """Wait for the end of the run and of its job."""
        final = self.await_state("completed", "failed", "cancelled", deadline_s=deadline_s)
        assert final["state"] == "completed", f"{final}\n{self.output()}"
        self.await_end_of_job()

    def await_end_of_job(self, deadline_s: float = 60) -> None:
        """Wait until the job is over for good: a job that Slurm requeues is pending as soon as it has left its nodes."""
        wait_for("the job to leave the queue", lambda: not self.queued(), deadline_s)
        state = re.search(r"JobState=(\w+)", self.bed.output("scontrol", "show", "job", self.job))
        assert state is not None
        assert state[1] in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL"), state[1]

    def output(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.path.glob("jobs/*/*_log.out")))


def events(run: Path) -> list[dict]:
    return json_lines(run / "events.jsonl")


def submit(launch: Launch, bed: Testbed, root: Path, name: str, *overrides: str, **env: str) -> SlurmRun:
    """Submit a short run of slow steps on two nodes and return at once."""
    done = launch(*SETTINGS, f"run.root={root}", f"run.name={name}", *overrides, **{**bed.variables, **slow_steps(), **env})
    require_exit(done)
    return SlurmRun(root / name, bed, launch)
