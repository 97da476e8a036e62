from __future__ import annotations

from plan_fixtures import config_of, plan_of

__all__ = ["config_of", "plan_of"]
