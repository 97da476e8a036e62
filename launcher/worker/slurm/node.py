"""The time limit of a Slurm job, on its nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from signal import Signals

from launcher.config.sections.slurm import SlurmSection
from launcher.plan.launch_plan import LaunchPlan
from launcher.run_records import Attempt
from launcher.worker.signals import PREEMPT

# Seconds between the end of the ranks and the end of the job, for srun's exit, the records and a requeue.
_CONCLUDE_S = 20.0


def save_before_end(record: Attempt, plan: LaunchPlan, stop: Callable[[Signals], None]) -> None:
    """Call `stop` when cluster.signal_lead_seconds of the job's time are left, whether or not Slurm's signal arrives."""
    if record.ends_at is None:
        return
    lead_s = SlurmSection.of(plan.config.cluster).signal_lead_seconds
    timer = threading.Timer(record.ends_at - lead_s - time.time(), stop, (PREEMPT,))
    timer.daemon = True
    timer.start()


def kill_at(record: Attempt, plan: LaunchPlan) -> float | None:
    """Return when ranks that do not stop are killed, as a time.monotonic() time, or None if there is no time limit.

    The job must conclude before Slurm ends it; otherwise nothing would run it again.
    """
    if record.ends_at is None:
        return None
    margin_s = min(_CONCLUDE_S, SlurmSection.of(plan.config.cluster).signal_lead_seconds / 4)
    return time.monotonic() + record.ends_at - margin_s - time.time()
