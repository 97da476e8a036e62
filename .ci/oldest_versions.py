"""Write pip constraints with the oldest versions that pyproject.toml allows for the launcher's dependencies.

    python .ci/oldest_versions.py oldest.txt

It needs only Python, because `make try-oldest` runs it before anything is installed. Test and docs packages stay unpinned.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_OLDEST = re.compile(r"(?P<name>[\w-]+)(\[[\w,-]+\])?>=(?P<version>[\d.]+)")


def lines(dependencies: list[str]) -> list[str]:
    """Return a constraint for each dependency.

    Raises:
        SystemExit: if a dependency does not name its oldest version.
    """
    matches = [_OLDEST.match(dependency) for dependency in dependencies]
    if unnamed := [dependency for dependency, match in zip(dependencies, matches, strict=True) if match is None]:
        raise SystemExit(f"no oldest version is named for: {', '.join(unnamed)}")
    return sorted(f"{match['name']}=={match['version']}" for match in matches if match is not None)


if __name__ == "__main__":
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    Path(sys.argv[1]).write_text("\n".join(lines(project["dependencies"])) + "\n", encoding="utf-8")
