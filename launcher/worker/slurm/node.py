"""The end of the time of a Slurm job's nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from signal import Signals

from launcher.config.sections.slurm import SlurmSection
from launcher.plan.launch_plan import LaunchPlan
from launcher.run_records import Attempt
from launcher.worker.signals import PREEMPT

# Between the end of the ranks and the job's own: srun's end, the records, a requeue.
_CONCLUDE_S = 20.0


def save_before_end(record: Attempt, plan: LaunchPlan, stop: Callable[[Signals], None]) -> None:
    """Call `stop` when only cluster.signal_lead_seconds are left of the job's time, whether or not Slurm's signal arrives."""
    if record.ends_at is None:
        return
    lead_s = SlurmSection.of(plan.config.cluster).signal_lead_seconds
    timer = threading.Timer(record.ends_at - lead_s - time.time(), stop, (PREEMPT,))
    timer.daemon = True
    timer.start()


def kill_at(record: Attempt, plan: LaunchPlan) -> float | None:
    """Return the time, in seconds since the epoch, at which ranks that do not stop are killed; None without a time limit.

    The job must conclude before Slurm ends it, or nothing would run it again.
    """
    if record.ends_at is None:
        return None
    return record.ends_at - min(_CONCLUDE_S, SlurmSection.of(plan.config.cluster).signal_lead_seconds / 4)
