"""The caches of the packages `datasets` and `evaluate`, with which tasks read rows and load metrics.

Offline, `evaluate` imports the newest copy of a metric in its cache, and `datasets` takes rows that were converted before. So a
cache that others can write, as in a shared HF_HOME, is not used.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import Problem
from launcher.security.permissions import first_problem, first_problem_above, is_private, tree
from launcher.security.trust import Trust

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
        if problem := _find_problem(f"what {variable} names", used):
            problems.append(problem)
            os.environ[variable] = str(replacement / name)
    return problems


def _find_problem(subject: str, folder: Path) -> Problem | None:
    """Return why others could have written to a cache; None if they could not, as in a home directory that nobody else enters."""
    trust = Trust.from_environ(os.environ)
    if problem := first_problem_above(subject, folder, trust, may_be_hidden=True):
        return problem
    is_hidden = any(is_private(parent, trust) for parent in folder.resolve().parents if parent.is_dir())
    return first_problem(subject, folder, tree(folder), trust, in_private_folder=is_hidden)
