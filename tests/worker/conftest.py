"""Plans for Slurm and Ray, a Slurm to tell what to do, and workers that are played."""

from __future__ import annotations

from fake_slurm import fake_slurm, in_slurm
from job_tools import own_signals, submitted
from plan_fixtures import config_of, ray_plan, slurm_plan
from played_workers import clock, play

__all__ = ["clock", "config_of", "fake_slurm", "in_slurm", "own_signals", "play", "ray_plan", "slurm_plan", "submitted"]
