"""The paths in a run directory. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

# The version of a plan's JSON.
SCHEMA_VERSION: Final = 4
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class RunDir:
    """The layout of one run: plan, status, code, attempts, checkpoints, metrics, export."""

    root: Path

    @classmethod
    def of_plan(cls, plan_path: Path) -> RunDir:
        """Return the run whose directory holds a plan, either the plan of the run or of an attempt."""
        folder = plan_path.parent
        return cls(folder.parents[1] if folder.parent.name == "attempts" else folder)

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def plans(self) -> Path:
        """All plans of the run, named by their digests, which the checkpoints record."""
        return self.root / "plans"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        """The lock of whoever starts an attempt or removes files."""
        return self.root / ".lock"

    @property
    def code(self) -> Path:
        return self.root / "code"

    def earlier_code(self, attempt: int) -> Path:
        """The code of the attempts up to this one, before a resume replaced it."""
        return self.root / f"code-until-attempt-{attempt:03d}"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def largest_batch(self) -> Path:
        """The record of the plan whose largest batch fitted."""
        return self.root / "largest-batch.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def evaluations(self) -> Path:
        """One folder per evaluated step."""
        return self.root / "evaluations"

    def evaluation(self, step: int) -> Path:
        return self.evaluations / f"step-{step:08d}"

    @property
    def jobs(self) -> Path:
        """Batch scripts and output of scheduler jobs, one folder per job."""
        return self.root / "jobs"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:03d}"

    def journal(self, attempt: int) -> Path:
        """What happened in an attempt, a file of events per writer; see launcher.runs.journal."""
        return self.attempt(attempt) / "journal"

    def cancel(self, attempt: int) -> Path:
        """The request to end an attempt; its field `save` says whether to write a checkpoint first."""
        return self.attempt(attempt) / "cancel.json"

    @property
    def alive(self) -> Path:
        """The liveness file of a driver, for commands on other machines."""
        return self.root / "driver.json"

    def agent_log(self, attempt: int, job: str | None = None) -> Path:
        """The output of the process that runs an attempt: a scheduler job, or the agent or driver on one machine."""
        return self.jobs / job / f"{job}_0_log.out" if job else self.attempt(attempt) / "agent.log"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.attempt(attempt) / f"rank-{rank:05d}.log"


def parse_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint's or an evaluation's folder; None for others, such as a person's copy."""
    match = _STEP.fullmatch(name)
    return None if match is None else int(match[1])


def default_name(config: RunConfig, created_at: str, run_file: str | None) -> str:
    """Return `<file>-<date>-<time>`, or `<model>-<data>-<date>-<time>` without a run's file, for an ISO time such as
    2026-01-31T09:15:00Z.
    """
    # Most commands import this module but do not need the schema.
    from launcher.config.sections.fields import derive_name

    stamp = re.sub(r"[^0-9]", "", created_at)[:14]
    of_file = derive_name(Path(run_file).stem) if run_file else ""
    return f"{of_file or f'{config.model.name}-{config.data.name}'}-{stamp[:8]}-{stamp[8:]}"
