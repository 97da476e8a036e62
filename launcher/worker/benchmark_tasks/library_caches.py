"""The caches of the packages `datasets` and `evaluate`, from which tasks read rows and load metrics.

Offline, `evaluate` imports the newest copy of a metric in its cache, and `datasets` uses previously converted rows. A cache that
other users can write, as in a shared HF_HOME, is therefore not used. Modules come from a folder that is private to this process:
`evaluate` adds the metrics' parent folder to Python's search path.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from launcher.errors import Problem
from launcher.models.private_code import MODULES_CACHE, use_private_modules
from launcher.security.permissions import first_problem_of_cache, tree
from launcher.security.trust import Trust

# The environment variable of each cache of rows and files, and the cache's folder in HF_HOME.
_CACHES = {"HF_DATASETS_CACHE": "datasets", "HF_EVALUATE_CACHE": "evaluate", "HF_METRICS_CACHE": "metrics"}
_MODULES, _METRICS = "modules", "evaluate_modules"


def leave_caches_of_others(replacement: Path) -> list[Problem]:
    """Point the variables of caches that other users could have written to folders in `replacement`; returns the reason for each.

    Metrics that other users could not have written are copied to the private folder for modules. Both packages read the variables
    on import.
    """
    problems = []
    for variable, name in _CACHES.items():
        if problem := _find_problem(variable, _cache(variable, name)):
            problems.append(problem)
            os.environ[variable] = str(replacement / name)
    metrics, own = _cache(MODULES_CACHE, _MODULES) / _METRICS, use_private_modules() / _METRICS
    if own == metrics:
        return problems
    if problem := _find_problem(MODULES_CACHE, metrics):
        return [*problems, problem]
    # Unreadable files are not used. `evaluate` picks a metric's newest copy by its modification time, so that is copied too.
    with suppress(OSError):
        if metrics.is_dir():
            shutil.copytree(metrics, own, ignore_dangling_symlinks=True)
    return problems


def _cache(variable: str, name: str) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(variable) or Path(HF_HOME) / name).expanduser()


def _find_problem(variable: str, folder: Path) -> Problem | None:
    return first_problem_of_cache(f"what {variable} names", folder, tree(folder), Trust.from_environ(os.environ))
