"""The caches of the packages `datasets` and `evaluate`, with which tasks read rows and load metrics.

Offline, `evaluate` imports the newest copy of a metric in its cache, and `datasets` takes rows that were converted before. So a
cache that others can write, as in a shared HF_HOME, is not used. Modules come from a private folder of this process alone:
`evaluate` adds the folder around the metrics to the search path of Python.
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

# The variable of each cache of rows and files, and its folder in HF_HOME.
_CACHES = {"HF_DATASETS_CACHE": "datasets", "HF_EVALUATE_CACHE": "evaluate", "HF_METRICS_CACHE": "metrics"}
_MODULES, _METRICS = "modules", "evaluate_modules"


def leave_caches_of_others(replacement: Path) -> list[Problem]:
    """Set the variables of the caches that others could have written to folders in `replacement`; returns why, for each of them.

    Metrics that others could not have written are copied to the private folder for modules. Both packages read the variables when
    they are imported.
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
    # What cannot be read is not used. `evaluate` takes the newest copy of a metric by its time, which is copied, too.
    with suppress(OSError):
        if metrics.is_dir():
            shutil.copytree(metrics, own, ignore_dangling_symlinks=True)
    return problems


def _cache(variable: str, name: str) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(variable) or Path(HF_HOME) / name).expanduser()


def _find_problem(variable: str, folder: Path) -> Problem | None:
    return first_problem_of_cache(f"what {variable} names", folder, tree(folder), Trust.from_environ(os.environ))
