"""The origin of a value: the command line, or the file and line of the config group that set it last."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config.introspect import settings
from launcher.errors import Problem


@dataclass(frozen=True)
class Origins:
    """`choices` maps a group to the chosen option; `folders` are searched in this order."""

    overrides: tuple[str, ...]
    choices: dict[str, Any]
    folders: tuple[Path, ...]

    def of(self, key: str) -> str:
        """Return the origin of a setting: `command line`, `conf/optim/adamw.yaml:3`, or an empty string."""
        return self.resolve(key)[1]

    def resolve(self, key: str) -> tuple[str, str]:
        """Return the key that holds the value (another one where `key` is an interpolation), and its origin."""
        for override in reversed(self.overrides):
            name = override.split("=", 1)[0].lstrip("+~")
            if name in self.choices:
                continue
            if name and (key == name or key.startswith((f"{name}.", f"{name}[")) or name.startswith(f"{key}.")):
                return key, "command line"
        path = [int(p) if p.isdigit() else p for p in re.split(r"[.\[]", key.replace("]", "")) if p]
        for file, inside in self._candidates(path):
            location = _find(file.read_text(), inside)
            if location is None:
                continue
            line, value = location
            reference = re.fullmatch(r"\$\{([\w.\[\]]+)\}", value or "")
            if reference and reference[1] != key:
                return self.resolve(reference[1])
            return key, f"{_short(file)}:{line}"
        return key, ""

    def located(self, problem: Problem) -> Problem:
        """Return `problem` with the origin of the setting that it names."""
        if re.sub(r"\[\d+\]", "[]", problem.where) not in settings():
            return problem
        key, where = self.resolve(problem.where)
        if not where:
            return problem
        message, remedy = (text.replace(problem.where, key) for text in (problem.message, problem.remedy))
        return replace(problem, message=message, where=f"{key} ({where})", remedy=remedy)

    def _candidates(self, path: list[str | int]) -> Iterator[tuple[Path, list[str | int]]]:
        """Yield the files that can set `path`, the last composed first, with the path inside each."""
        # Hydra lists the choices in this order: the experiment, then the groups from the last to the first.
        for group, option in self.choices.items():
            file = None if group.startswith("hydra") or option in (None, "null") else self._file(f"{group}/{option}.yaml")
            if file is None:
                continue
            if re.search(r"^#\s*@package\s+_global_", file.read_text(), re.MULTILINE):
                yield file, path
            elif path[:1] == [group] and len(path) > 1:
                yield file, path[1:]
        root = self._file("config.yaml")
        if root is not None and path:
            yield root, path

    def _file(self, relative: str) -> Path | None:
        return next((f / relative for f in self.folders if (f / relative).is_file()), None)


def _short(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _find(text: str, path: list[str | int]) -> tuple[int, str | None] | None:
    """Return the line of `path` in a YAML text, and its value where that is a scalar; None without such a path."""
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = 0
    for part in path:
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == part), None)
            if entry is None:
                return None
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            # A value that comes from an interpolation has no line of its own: use its parent's.
            break
    return (line, node.value if isinstance(node, yaml.ScalarNode) else None) if line else None
