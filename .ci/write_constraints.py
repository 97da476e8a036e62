"""Write constraints.txt: the installed versions, with which the tests passed, of all packages the launcher and its extras need.

    python .ci/write_constraints.py constraints.txt

torch stays a range because each CUDA version has its own builds. The file has only names and versions; pip's settings
decide where packages come from.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

_EXTRAS = ("", "test", "dev", "ray-jobs", "docs", "s3")
_OWN = ("launcher", "torch", "pip", "setuptools")
_HEAD = """\
# Versions with which the tests passed, for `pip install --constraint`. `make constraints` writes them from what is installed, and
# `make try-newest` runs the tests with the newest versions of everything.
"""


def required() -> dict[str, str]:
    """Return the installed version of every direct and indirect dependency of the launcher."""
    versions: dict[str, str] = {}
    visited: set[tuple[str, str]] = set()
    waiting = [("launcher", extra) for extra in _EXTRAS]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[name] = distribution.version
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(_normalized(requirement.name), inner) for inner in ("", *requirement.extras)]
    return versions


def lines() -> list[str]:
    """Return the lines of the file after its header."""
    torch = Version(importlib.metadata.version("torch"))
    (oldest,) = (r for r in map(Requirement, importlib.metadata.requires("launcher") or ()) if r.name == "torch")
    pinned = [f"{name}=={version}" for name, version in required().items() if name not in _OWN]
    return sorted([*pinned, f"torch{oldest.specifier},<{torch.major}.{torch.minor + 1}"])


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(_HEAD + "\n".join(lines()) + "\n")
