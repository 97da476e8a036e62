"""A run submitted as job 41, with the begin and conclude steps of its job."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hand_made
import pytest
from fake_slurm import FakeSlurm

from launcher import atomic_files, json_records, run_records, run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, ExitRecord
from launcher.worker.slurm import job

NODES = ("n1", "n2", "n3")


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
        return json_records.read_json(self.run.attempt(number) / "exit.json")

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
        atomic_files.write_json(self.run.attempt(run_store.newest_attempt(self.run)) / "outcome.json", said)

    def node(self, node: int, **values: Any) -> None:
        left = {"node": node, "first_failure": None, "stopped": False, "ended_at": time.time(), **values}
        atomic_files.write_json(run_records.node_file(self.run, run_store.newest_attempt(self.run), node), left)

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
        record = ExitRecord("pending", cause=Cause(cause), message=f"{cause} it was", began_step=began, saved_step=saved)
        json_records.write(run_records.exit_file(self.run, number), record)


@pytest.fixture
def submitted(
    slurm_plan: Callable[..., LaunchPlan],
    fake_slurm: FakeSlurm,
    own_signals: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Job]:
    """A run as `python -m launcher` leaves it for its job, but without the code snapshot."""
    monkeypatch.setattr(run_store, "copy_code", lambda folder: (folder / "launcher").mkdir(parents=True))

    def submit(**settings: Any) -> Job:
        return Job(hand_made.run(slurm_plan(str(tmp_path), nodes=3, **settings), Attempt(None)), capsys)

    return submit
