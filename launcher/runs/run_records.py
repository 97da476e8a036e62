"""The JSON records that the processes of a run exchange, one dataclass each.

Times are seconds since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.errors import DamagedRun, RunError, UnreadableRun
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records

# Part of every export; only folders with this file are ever replaced.
EXPORT_RECORD = "export.json"
RUNNING_STATES = ("pending", "running", "saving")


@dataclass(frozen=True)
class Status:
    """status.json. `job` is the backend's own handle."""

    state: str
    attempt: int
    step: int = 0
    max_steps: int | None = None
    job: dict[str, Any] | None = None
    message: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """attempt.json: what an attempt starts from, and its scheduler job.

    `resume_step` None starts from the initial weights. `job` is None until the job has begun; `restart` counts the
    scheduler's earlier starts of that job. The node agents meet at `address` and `port`, on `interface` of the first of `nodes`.
    `ends_at` is the end of the job's time, `submitted_at` when the attempt was requested, `begun_at` when its machines became
    available. `automatic`: the launcher started it, not a person. `pinned`: a person requested exactly this step. `clock` is the
    reading of launcher.clock for the times of its machine.
    """

    resume_step: int | None
    job: str | None = None
    restart: int = 0
    nodes: tuple[str, ...] = ()
    address: str | None = None
    interface: str | None = None
    port: int | None = None
    ends_at: float | None = None
    submitted_at: float | None = None
    begun_at: float | None = None
    automatic: bool = False
    pinned: bool = False
    clock: str = field(default="", compare=False)


@dataclass(frozen=True)
class CancelRequest:
    """cancel.json: a request to end the attempt. `save` asks for a checkpoint first."""

    asked_at: float = 0.0
    save: bool = True


@dataclass(frozen=True)
class Liveness:
    """driver.json: a heartbeat of the process that runs a run, for readers on other machines."""

    at: float
    host: str


@dataclass(frozen=True)
class MirrorRecord:
    """mirror.json: which parts of a run the mirror at `url` holds.

    `steps` are the complete checkpoints there, `missing_steps` the others. `failure` is the last error, None after a success.
    """

    url: str
    steps: tuple[int, ...]
    missing_steps: tuple[int, ...]
    failure: str | None
    at: float


@dataclass(frozen=True)
class ExportRecord:
    """export.json in an export: its checkpoint and dtype; `tensors_compared` tensors equal the engine's."""

    step: int
    plan_digest: str
    dtype: str
    tensors_compared: int = 0


def read_export(run: RunDir) -> ExportRecord | None:
    """Return the record of the run's export, or None if there is no export or no record in it."""
    try:
        return json_records.read_if_present(ExportRecord, run.export / EXPORT_RECORD)
    except RunError:
        return None


def read_cancel(run: RunDir, attempt: int) -> CancelRequest | None:
    """Return the request to end an attempt, or None if there is none; a damaged one asks to save and stop."""
    try:
        return json_records.read_if_present(CancelRequest, run.cancel(attempt))
    except UnreadableRun:
        raise
    except DamagedRun:
        return CancelRequest()
