"""The caches of the packages `datasets` and `evaluate`, with which tasks read rows and load metrics.

Offline, `evaluate` imports the newest copy of a metric in its cache, and `datasets` takes rows that were converted before. So a
cache that others can write, as in a shared HF_HOME, is not used.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import Problem
from launcher.security import ownership
from launcher.security.permissions import tree

# The variable of each cache, and its folder in HF_HOME.
_CACHES = {
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
    "HF_EVALUATE_CACHE": "evaluate",
    "HF_METRICS_CACHE": "metrics",
}
# Of HF_MODULES_CACHE: the code of models lies beside it, and is not used from there.
_METRICS = "evaluate_modules"


def leave_caches_of_others(replacement: Path) -> list[Problem]:
    """Set the variables of the caches that others could have written to folders in `replacement`; returns why, for each of them.

    Both packages read the variables when they are imported.
    """
    from huggingface_hub.constants import HF_HOME

    problems = []
    for variable, name in _CACHES.items():
        cache = Path(os.environ.get(variable) or Path(HF_HOME) / name).expanduser()
        used = cache / _METRICS if variable == "HF_MODULES_CACHE" else cache
        if problem := ownership.folder_problem(f"what {variable} names", used, tree(used)):
            problems.append(problem)
            os.environ[variable] = str(replacement / name)
    return problems
