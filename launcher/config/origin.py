"""The origin of a value: the command line, or the file and line of the config group that set it last."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.command_line import COMMAND_LINE, override_key
from launcher.config.schema import settings
from launcher.errors import Problem
from launcher.shell_commands import short_path

if TYPE_CHECKING:
    import yaml

# The group in which Hydra composes a run's file.
RUN_FILE_GROUP = "run_file"
# The header of a file that sets more than the section of its group.
GLOBAL_HEADER = re.compile(r"^#\s*@package\s+_global_", re.MULTILINE)
# The last part of a setting's key, such as `.path` or `[0]`.
_LAST_PART = re.compile(r"(^|\.|\[)[^.\[]*$")


@dataclass(frozen=True)
class RunFile:
    """A run's file: `choices` are the options of groups, None for none; `values` the settings of the sections.

    `dropped` are the settings of sections that an option on the command line replaces.
    """

    path: Path
    choices: Mapping[str, str | None]
    values: Mapping[str, Any]
    dropped: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """The groups whose option the file selects, and the settings that it sets (section.name)."""
        keys = list(self.choices)
        for section, content in self.values.items():
            keys += [f"{section}.{name}" for name in content] if isinstance(content, dict) else [str(section)]
        return keys

    def for_hydra(self) -> dict[str, Any]:
        """Return the config that Hydra composes last, before the overrides."""
        chosen: list[Any] = [{f"override /{group}": option} for group, option in self.choices.items()]
        return {"defaults": [*chosen, "_self_"], **self.values}

    def sets(self, setting: str) -> bool:
        """Return whether the file has a value of the setting or of one around it, or selects an option for its whole group."""
        prefix = ".".join(re.split(r"[.\[]", setting)[:2])
        return prefix in self.keys or any(key.startswith(f"{prefix}.") for key in self.keys)


@dataclass(frozen=True)
class Origins:
    """`choices` maps each group to the chosen option; `folders` are searched in this order, after `run_file`."""

    overrides: tuple[str, ...]
    choices: dict[str, Any]
    folders: tuple[Path, ...]
    run_file: RunFile | None = None

    def of(self, key: str) -> str:
        """Return the origin of a setting: `command line`, `conf/optim/adamw.yaml:3`, or an empty string."""
        return self.resolve(key)[1]

    def resolve(self, key: str) -> tuple[str, str]:
        """Return the key that holds the value (another key if `key` is an interpolation), and its origin."""
        seen = {key}
        where, value = self._locate(key)
        while (reference := re.fullmatch(r"\$\{([\w.\[\]]+)\}", value or "")) and reference[1] not in seen:
            key = reference[1]
            seen.add(key)
            where, value = self._locate(key)
        return key, where

    def written_at(self, key: str) -> str:
        """Return the origin of a setting's text, which may be an interpolation."""
        return self._locate(key)[0]

    def _locate(self, key: str) -> tuple[str, str | None]:
        """Return the origin of a setting, and its text if it is a scalar in a file."""
        for override in reversed(self.overrides):
            name = override_key(override)
            is_around = key == name or key.startswith((f"{name}.", f"{name}["))
            if name and name not in self.choices and (is_around or name.startswith(f"{key}.")):
                return COMMAND_LINE, None
        for file, section in self.files():
            if self.run_file is not None and file == self.run_file.path and not self.run_file.sets(key):
                continue
            if section and not key.startswith(f"{section}."):
                continue
            lines = {name: (line, text) for name, line, text in yaml_nodes(file.read_text())}
            inner = prefix = key.removeprefix(f"{section}.") if section else key
            while prefix and prefix not in lines:
                prefix = _LAST_PART.sub("", prefix)
            line, text = lines.get(prefix, (0, None))
            # What an interpolation or a list's missing item contains has no line of its own.
            if prefix and (prefix == inner or text is not None or inner[len(prefix)] == "["):
                return f"{short_path(file)}:{line}", text
        return "", None

    def dropped_note(self) -> str | None:
        """Return which settings of the run's file are unused because an option on the command line replaces their section."""
        if self.run_file is None or not self.run_file.dropped:
            return None
        keys = self.run_file.dropped
        sections = dict.fromkeys(key.partition(".")[0] for key in keys)
        options = " and ".join(f"{section}={self.choices.get(section)}" for section in sections)
        file = short_path(self.run_file.path)
        return f"{options} on the command line instead of the section in {file}: not used: {', '.join(keys)}"

    def located(self, problem: Problem) -> Problem:
        """Return `problem` with the origin of the setting that it names."""
        if re.sub(r"\[\d+\]", "[]", problem.where) in settings():
            key, where = self.resolve(problem.where)
            if where:
                message, remedy = (text.replace(problem.where, key) for text in (problem.message, problem.remedy))
                problem = replace(problem, message=message, where=f"{key} ({where})", remedy=remedy)
        return problem

    def files(self) -> Iterator[tuple[Path, str]]:
        """Yield the composed files, last one first, each with the section that it sets; empty for all settings."""
        if self.run_file is not None:
            yield self.run_file.path, ""
        # Hydra lists the choices in this order: the experiment, then the groups from the last to the first.
        for group in self.choices:
            if (file := self.file_of(group)) is not None:
                yield file, "" if GLOBAL_HEADER.search(file.read_text()) else group
        if (root := self._find_file("config.yaml")) is not None:
            yield root, ""

    def missing_keys(self) -> list[str]:
        """Return the keys that the last file to set them leaves as `???`: Hydra keeps the value of an earlier file."""
        keys = []
        for file, prefix in self.files():
            text = file.read_text()
            for key, line, value in yaml_nodes(text) if "???" in text else ():
                full = ".".join(filter(None, (prefix, key)))
                if value == "???" and self.written_at(full) == f"{short_path(file)}:{line}":
                    keys.append(full)
        return keys

    def file_of(self, group: str) -> Path | None:
        """Return the file of the chosen option of a group; None if no option is chosen."""
        option = self.choices.get(group)
        return None if group.startswith("hydra") or option in (None, "null") else self._find_file(f"{group}/{option}.yaml")

    def _find_file(self, relative: str) -> Path | None:
        return next((f / relative for f in self.folders if (f / relative).is_file()), None)


def yaml_nodes(text: str) -> Iterator[tuple[str, int, str | None]]:
    """Yield key, line and text of each scalar in a YAML text, and of each section, which has no text."""
    import yaml

    def walk(node: yaml.Node | None, key: str, line: int) -> Iterator[tuple[str, int, str | None]]:
        if isinstance(node, yaml.ScalarNode):
            yield key, line, node.value
            return
        if key:
            yield key, line, None
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                yield from walk(value, f"{key}.{name.value}" if key else str(name.value), name.start_mark.line + 1)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                yield from walk(item, f"{key}[{i}]", item.start_mark.line + 1)

    yield from walk(yaml.compose(text, Loader=yaml.SafeLoader), "", 1)
