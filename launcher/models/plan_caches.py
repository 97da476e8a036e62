"""Checks the parts of the launcher's cache that a plan names: commands that start from a run's plan find them by path."""

from __future__ import annotations

from pathlib import Path

from launcher.data.cache_dir import cache_root
from launcher.plan.launch_plan import LaunchPlan
from launcher.security import ownership


def require_caches(plan: LaunchPlan) -> None:
    """Refuse data and weights that another user could have written or replaced since the plan was made.

    Raises:
        DataError: with the file or folder, its owner and the remedy.
    """
    for facts in (plan.data, *plan.eval_sets.values()):
        if facts is not None:
            ownership.require_cache(Path(facts.cache_dir), plan.config.data.cache_group)
    for path in dict.fromkeys((plan.model.path, plan.model.tokenizer_path)):
        # Model folders elsewhere may belong to anyone.
        if path is not None and Path(path).is_relative_to(cache_root()):
            ownership.require_cache(Path(path))
