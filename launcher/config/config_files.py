"""Finds the file and line of a mistake in a YAML file."""

from __future__ import annotations

from pathlib import Path

from launcher.config.origin import Origins, nodes, short
from launcher.errors import Problem, causes
from launcher.security.redaction import looks_secret


def missing_keys(origins: Origins) -> list[str]:
    """Return the keys that the last file to set them leaves as `???`: Hydra keeps the value of an earlier file."""
    keys = []
    for file, prefix in origins.files():
        text = file.read_text()
        for key, line, value in nodes(text) if "???" in text else ():
            full = ".".join(filter(None, (prefix, key)))
            if value == "???" and origins.written_at(full) == f"{short(file)}:{line}":
                keys.append(full)
    return keys


def yaml_problems(error: BaseException) -> list[Problem]:
    """Return the problem of a file that is not valid YAML, from the error or its causes; empty for any other error."""
    import yaml

    cause = next((cause for cause in causes(error) if isinstance(cause, yaml.MarkedYAMLError)), None)
    mark = cause.problem_mark if cause is not None else None
    if cause is None or mark is None or not Path(mark.name).is_file():
        return []
    lines = Path(mark.name).read_text(errors="replace").splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    key, _, value = line.partition(":")
    return [
        Problem(
            f"the file is not valid YAML: {', '.join(filter(None, (cause.context, cause.problem)))}",
            where=f"{short(Path(mark.name))}:{mark.line + 1}:{mark.column + 1}",
            value="" if looks_secret(key.strip(), value.strip()) else line.strip(),
            remedy="correct this line or the one before it: a line is `key: value`, indented with spaces, and a key occurs once",
        )
    ]
