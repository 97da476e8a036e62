"""The JSON records of a run directory, one dataclass each. Times are seconds since the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """attempt.json: what an attempt starts from, and for which job of a scheduler.

    `resume_step` None starts from the initial weights. `job` is None until the job has begun; `restart` counts the
    scheduler's earlier starts of that job. The node agents meet at `address` and `port`, which the first of `nodes` has on
    `interface`. `ends_at` is the end of the job's time, `submitted_at` when the attempt was requested, `begun_at` when its
    machines were there. `automatic` where the launcher started it without a person, `pinned` where a person asked for
    exactly this step. `num_workers` are those that Ray holds for it, idle ones included.
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
    num_workers: int | None = None
