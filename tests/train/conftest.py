from __future__ import annotations

from fake_nvml import nvml
from plan_fixtures import config_of, plan_of

__all__ = ["config_of", "nvml", "plan_of"]
