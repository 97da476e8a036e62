"""Plans for Slurm, and a Slurm to tell what to do."""

from __future__ import annotations

from fake_slurm import fake_slurm, in_slurm
from job_tools import own_signals, submitted
from plan_fixtures import config_of, ray_plan, slurm_plan

__all__ = ["config_of", "fake_slurm", "in_slurm", "own_signals", "ray_plan", "slurm_plan", "submitted"]
