"""Where a value was written: the command line, or the file and line of the config group that set it last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origins:
    """`choices` maps a group to the chosen option; `folders` are searched in this order."""

    overrides: tuple[str, ...]
    choices: dict[str, Any]
    folders: tuple[Path, ...]

    def of(self, key: str) -> str:
        """`command line (train.lr=-1)`, `conf/optim/adamw.yaml:3`, or an empty string."""
        for override in reversed(self.overrides):
            name = override.split("=", 1)[0].lstrip("+~")
            if name in self.choices:
                continue
            if name and (key == name or key.startswith((f"{name}.", f"{name}[")) or name.startswith(f"{key}.")):
                return "command line"
        path = [int(p) if p.isdigit() else p for p in re.split(r"[.\[]", key.replace("]", "")) if p]
        # Whatever is composed last wins, so the search goes from the experiment down to the root file.
        groups = [g for g in self.choices if not g.startswith("hydra") and self.choices[g] not in (None, "null")]
        for group in sorted(groups, key=lambda g: g != "experiment"):
            file = self._file(f"{group}/{self.choices[group]}.yaml")
            if file is None:
                continue
            text = file.read_text()
            package_is_root = re.search(r"^#\s*@package\s+_global_", text, re.MULTILINE)
            inside = path if package_is_root else path[1:] if path and path[0] == group else None
            line = _line_of(text, inside) if inside else None
            if line is not None:
                return f"{_short(file)}:{line}"
        root = self._file("config.yaml")
        line = _line_of(root.read_text(), path) if root and path else None
        return f"{_short(root)}:{line}" if root and line is not None else ""

    def _file(self, relative: str) -> Path | None:
        return next((f / relative for f in self.folders if (f / relative).is_file()), None)


def _short(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _line_of(text: str, path: list[str | int]) -> int | None:
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                return None
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            # A value that is computed by interpolation has no line of its own; its parent's serves.
            return line
    return line
