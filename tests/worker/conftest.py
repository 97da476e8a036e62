"""Plans for Slurm, and a Slurm to tell what to do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_slurm import fake_slurm, in_slurm
from job_tools import own_signals, submitted
from plan_fixtures import config_of, slurm_plan

__all__ = ["config_of", "fake_slurm", "in_slurm", "own_signals", "slurm_plan", "submitted"]
