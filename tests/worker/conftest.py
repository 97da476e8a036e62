"""Fixtures: plans for Slurm and Ray, a fake Slurm, and fake Ray workers."""

from __future__ import annotations

from fake_slurm import fake_slurm, in_slurm, own_signals, submitted
from fake_workers import clock, make_fake
from plan_fixtures import config_of, ray_plan, slurm_plan

__all__ = ["clock", "config_of", "fake_slurm", "in_slurm", "make_fake", "own_signals", "ray_plan", "slurm_plan", "submitted"]
