"""Programs that only some machines have: hide them from tests that are not marked as needing them, or skip those that are."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import NoReturn

import pytest

# Markers, and the programs that only tests with the marker may find.
PROGRAMS = {
    "slurm": ("srun", "sbatch", "salloc", "squeue", "sacct*", "scancel", "scontrol", "sinfo", "slurm*", "munge*", "mariadb*"),
    "browser": ("chromium*", "google-chrome*"),
    "compiler": ("gcc*", "g++*", "cc", "c++", "c[89][0-9]", "clang*", "*-linux-gnu-g[c+]*", "nvcc", "ninja"),
}


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, except in CI: CI has every program, so a test that cannot run there has failed."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def path_of_a_bare_machine(path: str, folder: Path) -> str:
    """Return `path` with each directory that holds a program of PROGRAMS replaced by one of links to the other programs."""
    patterns = [pattern for patterns in PROGRAMS.values() for pattern in patterns]
    directories = []
    for number, directory in enumerate(dict.fromkeys(path.split(os.pathsep))):
        names = os.listdir(directory) if os.path.isdir(directory) else []
        hidden = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
        if hidden:
            links = folder / str(number)
            links.mkdir(parents=True)
            for name in set(names) - hidden:
                (links / name).symlink_to(os.path.join(directory, name))
            directory = str(links)
        directories.append(directory)
    return os.pathsep.join(directories)
