"""Fixtures: plans for Slurm and Ray, and a fake Slurm."""

from __future__ import annotations

from fake_slurm import fake_slurm, in_slurm, own_signals, submitted
from plan_fixtures import config_of, ray_plan, slurm_plan

__all__ = ["config_of", "fake_slurm", "in_slurm", "own_signals", "ray_plan", "slurm_plan", "submitted"]
