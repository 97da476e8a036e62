from __future__ import annotations

from plan_fixtures import config_of, plan_of
from played_nvml import nvml

__all__ = ["config_of", "nvml", "plan_of"]
