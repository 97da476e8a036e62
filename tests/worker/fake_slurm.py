"""A fake Slurm that answers like a real one (24.11.5) and records its commands."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hand_made
import pytest
import slurm_said
from plan_fixtures import PlanOf

from launcher.clusters.slurm import commands
from launcher.plan.run_dir import RunDir
from launcher.runs import run_records, run_store
from launcher.runs.run_records import Attempt
from launcher.worker.slurm import job

COMMANDS = ("scontrol", "squeue", "sacct", "sinfo", "sbatch", "srun", "scancel")
COMMAND = """\
#!{python} -IS
import json, os, sys
folder, argv = {folder!r}, [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(f"{{folder}}/calls", "a") as file:
    file.write(json.dumps(argv) + "\\n")
with open(f"{{folder}}/variables_of_{{argv[0]}}", "w") as file:
    json.dump(dict(os.environ), file)
calls = [json.loads(line) for line in open(f"{{folder}}/calls")]
found = []
for i, answer in enumerate(json.load(open(f"{{folder}}/answers"))):
    to = answer["to"]
    asked = sum(call[:len(to)] == to for call in calls)
    if argv[:len(to)] == to and (answer["times"] is None or asked <= answer["times"]):
        found.append((len(to), i, answer))
if not found:
    sys.exit(f"nothing is known of {{argv}}")
answer = max(found)[2]
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
for number in answer["signals"]:
    os.kill(os.getppid(), number)
sys.exit(answer["code"])
"""
NODES = ("n1", "n2", "n3")


@dataclass(frozen=True)
class FakeSlurm:
    """Answers a command by its first words; the longest match wins, and of several the latest."""

    folder: Path

    def answer(
        self, *to: str, out: str = "", err: str = "", code: int = 0, signals: Sequence[int] = (), times: int | None = None
    ) -> None:
        """Set the answer to commands that begin with `to`; with `times`, only for that many calls."""
        file = self.folder / "answers"
        answers = json.loads(file.read_text()) if file.exists() else []
        file.write_text(
            json.dumps([*answers, {"to": to, "out": out, "err": err, "code": code, "signals": signals, "times": times}])
        )

    def refuse(self, *to: str, said: str, times: int | None = None) -> None:
        self.answer(*to, err=said + "\n", code=1, times=times)

    @property
    def calls(self) -> list[list[str]]:
        """All commands, oldest first."""
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def variables_of(self, command: str) -> dict[str, str]:
        """The environment of the last command with this name."""
        return dict(json.loads((self.folder / f"variables_of_{command}").read_text()))

    def told(self) -> list[list[str]]:
        """The commands that change something, without queries."""
        asking = ("show", "--oneliner", "--all")
        return [
            call for call in self.calls if call[0] in ("sbatch", "scancel") or (call[0] == "scontrol" and call[1] not in asking)
        ]


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Job 41 runs on n1, this machine; every command succeeds."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(COMMAND.format(python=sys.executable, folder=str(folder)))
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands, "_FIRST_PAUSE_S", 0.01)
    fake = FakeSlurm(folder)
    fake.answer("scontrol", "show", "hostnames", "n1", out="n1\n")
    fake.answer("scontrol", "--oneliner", "show", "node", "n1", out=slurm_said.node("n1", "127.0.0.1"))
    fake.answer("scontrol", "show", "config", out=slurm_said.CONFIG)
    for name in ("main", "high"):
        fake.answer("scontrol", "show", "partition", name, out=slurm_said.partition(name))
    fake.answer("scontrol", "show", "job", "41", out=slurm_said.job())
    fake.answer("scontrol", "show", "job", "41", "--json", out=slurm_said.job_json("RUNNING"))
    fake.answer("scontrol", "requeue")
    fake.answer("scontrol", "requeuehold")
    fake.answer("scontrol", "update")
    fake.answer("scontrol", "release")
    fake.answer("scancel")
    fake.answer("sbatch", out="Submitted batch job 4242\n")
    return fake


@pytest.fixture
def in_slurm(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables of the job's environment."""

    def set_to(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restore the signal handler that the job changes in this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Job:
    """A run submitted as job 41, and the steps of its job."""

    run: RunDir
    capture: pytest.CaptureFixture[str]

    def begin(self) -> tuple[int, str, str]:
        return self._main("begin", str(self.run.plan))

    def conclude(self, attempt: int = 1, code: int = 1) -> int:
        return self._main("conclude", str(self.run.plan), str(attempt), str(code))[0]

    def _main(self, *argv: str) -> tuple[int, str, str]:
        self.capture.readouterr()
        return (job.main(argv), *self.capture.readouterr())

    def attempt(self, number: int = 1) -> Attempt:
        return run_store.read_attempt(self.run, number)

    def exit(self, number: int = 1) -> dict[str, Any]:
        return hand_made.end_of(self.run, number)

    @property
    def status(self) -> run_records.Status:
        return run_store.read_status(self.run)

    def begun(self, number: int = 1, **values: Any) -> None:
        """Write an attempt that has started on three nodes in job 41, with an hour left."""
        attempt = Attempt(None, job="41", nodes=NODES, address="10.0.0.1", port=1, ends_at=time.time() + 3600)
        self.run.attempt(number).mkdir(exist_ok=True)
        run_store.write_attempt(self.run, number, replace(attempt, **values))
        run_store.update_status(self.run, state="running", attempt=number)

    def outcome(self, reason: str, step: int = 40) -> None:
        said = {"state": "any", "reason": reason, "step": step, "message": "as the ranks say", "checkpoint": "/c"}
        hand_made.record(self.run, run_store.newest_attempt(self.run), "TrainingEnded", **said)

    def node(self, node: int, **values: Any) -> None:
        hand_made.record(self.run, run_store.newest_attempt(self.run), "NodeEnded", node=node, **values)

    def failed(self, kind: str) -> None:
        self.node(0, first_failure={"rank": 3, "kind": kind, "at": 1.0, "exit_code": 1, "message": "what it said", "log": "/log"})
        for other in range(1, len(NODES)):
            self.node(other)

    def bad_node(self) -> None:
        self.node(0, problems=[{"message": "has no GPU", "where": "n2", "value": "", "remedy": ""}])

    def saved(self, step: int, attempt: int = 1) -> None:
        hand_made.checkpoint(self.run, step, attempt=attempt, files=hand_made.ONE_RANK)

    def ended(self, number: int, cause: str, began: int | None = None, saved: int | None = None, **values: Any) -> None:
        """Write an attempt that was concluded."""
        self.begun(number, **values)
        said = {"state": "pending", "message": f"{cause} it was"}
        hand_made.end(self.run, number, cause=cause, began_step=began, saved_step=saved, **said)


# Submits a run to the fake Slurm.
Submitted = Callable[..., Job]


@pytest.fixture
def submitted(
    slurm_plan: PlanOf,
    fake_slurm: FakeSlurm,
    own_signals: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Submitted:
    """A run as `python -m launcher` leaves it for its job, but without the code snapshot."""
    monkeypatch.setattr(run_store, "copy_code", lambda folder: (folder / "launcher").mkdir(parents=True))

    def submit(**settings: Any) -> Job:
        return Job(hand_made.run(slurm_plan(str(tmp_path), nodes=3, **settings), Attempt(None)), capsys)

    return submit
