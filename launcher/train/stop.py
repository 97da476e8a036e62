"""Why a run stops before its last step, and whether it can still save then."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from launcher.config.cluster import ClusterSection


@dataclass(frozen=True)
class Outcome:
    """How training ended: completed, cancelled (a person) or preempted (the machines, or a limit of the run).

    `reason` is completed or one of launcher.distributed.STOP_REASONS.
    """

    state: str
    reason: str
    step: int
    message: str
    checkpoint: Path


class Stop(Protocol):
    """Asked after each step; `at` is the time.monotonic() of the wish, None where there is none."""

    at: float | None

    def __call__(self) -> str | None: ...

    def cancel(self) -> None:
        """A person asks to stop, as by a signal; from any thread."""


def save_fits(cluster: ClusterSection, reason: str, asked_at: float | None, save_s: float | None, device: torch.device) -> bool:
    """Whether a save as long as the last one ends before the machines go, in the judgement of every rank. Collective.

    A save that is cut off would cost its time and leave nothing; what was committed before stays.
    """
    lead_s = cluster.save_lead_s
    if reason != "preempted" or lead_s is None or save_s is None:
        return True
    waited = time.monotonic() - asked_at if asked_at is not None else 0.0
    late = torch.tensor(float(save_s > lead_s - waited), device=device)
    dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return not late.item()
