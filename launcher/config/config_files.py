"""Finds mistakes in the files of config groups that composition does not report with file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.config.origin import Origins, nodes, short
from launcher.config.schema import RunConfig
from launcher.errors import Problem, causes
from launcher.security.redaction import looks_secret

_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.\[\]]*)\}")
_PACKAGE = re.compile(r"#\s*@package\s+([\w.]+)")
_MISSING = "???"


def missing_keys(origins: Origins) -> list[str]:
    """Return the keys that the last file to set them leaves as `???`.

    Hydra keeps the value of an earlier file under a later `???`, so the composed settings do not show these.
    """
    keys = []
    for file, prefix in origins.files():
        text = file.read_text()
        for key, line, value in nodes(text) if _MISSING in text else ():
            full = ".".join(filter(None, (prefix, key)))
            if value == _MISSING and not key.startswith("defaults") and origins.written_at(full) == f"{short(file)}:{line}":
                keys.append(full)
    return keys


def package_problems(values: Mapping[str, Any], origins: Origins) -> Iterator[tuple[str, Problem]]:
    """Yield the package that an experiment's file sets instead of `_global_`, and its problem."""
    file = origins.file_of("experiment")
    if file is None:
        return
    header = "# @package _global_"
    lines = file.read_text().splitlines()
    written = {match[1]: number for number, line in enumerate(lines, start=1) if (match := _PACKAGE.match(line))}
    for package in ("experiment", *written):
        if package in values and package not in RunConfig.model_fields:
            problem = Problem(
                f"experiment={origins.choices['experiment']}: the first line of its file is not `{header}`, so it sets nothing",
                where=f"{short(file)}:{next(iter(written.values()), 1)}",
                remedy=f"write `{header}` as the first line of the file",
            )
            yield package, problem


def cycle_problem(unresolved: Mapping[str, Any], origins: Origins) -> Problem | None:
    """Return the problem of settings that refer to each other; None without such settings.

    `unresolved` maps each setting's key to its value with references, such as `${run.name}`.
    """
    texts = {key: value for key, value in unresolved.items() if isinstance(value, str)}
    references = {
        key: [target for name in _REFERENCE.findall(text) for target in _inside(name, texts)] for key, text in texts.items()
    }
    cycle = next((cycle for key in references if (cycle := _cycle_from(key, references))), None)
    if cycle is None:
        return None
    chain = " -> ".join((*cycle, cycle[0]))
    locations = [f"{key} ({where})" if (where := origins.written_at(key)) else key for key in cycle]
    what = "this setting refers to itself" if len(cycle) == 1 else "these settings refer to each other"
    return Problem(
        f"{what}: {chain}",
        where=", ".join(locations),
        value=", ".join(f"{key}={texts[key]}" for key in cycle if not looks_secret(key, texts[key])),
        remedy=f"write a value without a reference for {' or '.join(cycle)}",
    )


def _inside(name: str, keys: Mapping[str, Any]) -> list[str]:
    """Return the keys that a reference reads: the setting itself, or all settings of a section."""
    return [key for key in keys if key == name or key.startswith((f"{name}.", f"{name}["))]


def _cycle_from(start: str, references: Mapping[str, list[str]]) -> list[str] | None:
    """Return the shortest chain of references from `start` back to it; None without one."""
    chains = [[start]]
    seen = set()
    while chains:
        chain = chains.pop(0)
        for target in references[chain[-1]]:
            if target == start:
                return chain
            if target not in seen:
                seen.add(target)
                chains.append([*chain, target])
    return None


def yaml_problems(error: BaseException) -> list[Problem]:
    """Return the problems of a file that is not valid YAML, from the error or its causes; empty for any other error."""
    import yaml

    cause = next((cause for cause in causes(error) if isinstance(cause, yaml.MarkedYAMLError)), None)
    mark = cause.problem_mark if cause is not None else None
    if cause is None or mark is None or not Path(mark.name).is_file():
        return []
    file = Path(mark.name)
    lines = file.read_text(errors="replace").splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    where = f"{short(file)}:{mark.line + 1}"
    if "duplicate key" in (cause.problem or ""):
        return list(_duplicates(file))
    if line[: mark.column + 1].endswith("\t"):
        return [
            Problem("the indentation contains a tab, which YAML does not allow", where, remedy="indent this line with spaces")
        ]
    key, _, value = line.partition(":")
    details = ", ".join(filter(None, (cause.context, cause.problem)))
    return [
        Problem(
            f"the file is not valid YAML: {details}",
            where=f"{where}:{mark.column + 1}",
            value="" if looks_secret(key.strip(), value.strip()) else line.strip(),
            remedy="correct this line or the one before it: a line is `key: value`, indented with spaces; [ and { need ] and }",
        )
    ]


def _duplicates(file: Path) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for key, line, _ in nodes(file.read_text(errors="replace"), with_sections=True):
        if key in first:
            yield Problem(
                f"{key}: the file sets this key twice, in lines {first[key]} and {line}",
                where=f"{short(file)}:{line}",
                remedy="remove one of the two lines; the settings of one section belong together",
            )
        first.setdefault(key, line)
