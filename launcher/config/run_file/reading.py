"""Reads a run's file: settings in one YAML file, without Hydra's folders and headers.

For each group, a string selects an option, a mapping sets keys, and a mapping with `base` does both:

    model: {base: qwen3_8b, dtype: bf16}
    cluster: slurm
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config.command_line import GROUPS
from launcher.config.error_messages import no_such_option, yaml_problems
from launcher.config.introspect import settings
from launcher.config.origin import COMMAND_LINE, RunFile, nodes, short
from launcher.config.run_file.tokens import ROW_SUFFIXES, SUFFIXES
from launcher.errors import ConfigError, Problem
from launcher.security.redaction import looks_secret, redact
from launcher.shell_commands import launcher_command

BASE = "base"
# The option for a data section that names rows but has no `base`.
_OWN_ROWS = "jsonl"
_EXPERIMENT = "experiment"
_OF_HYDRA = {
    "defaults": "remove it; a string selects an option, as in `model: qwen3_8b`, and `base` selects one inside a mapping",
    "hydra": "remove it; Hydra's flags are given on the command line",
}


@dataclass(frozen=True)
class FileContent:
    """The content of a run's file: `choices` are the options of groups, None for none; `values` the settings of the sections."""

    file: RunFile
    choices: Mapping[str, str | None]
    values: Mapping[str, Any]

    def for_hydra(self) -> dict[str, Any]:
        """Return the config that Hydra composes last, before the overrides."""
        chosen: list[Any] = [{f"override /{group}": option} for group, option in self.choices.items()]
        return {"defaults": [*chosen, "_self_"], **self.values}


def the_only(files: Sequence[str]) -> Path | None:
    """Return the run's file of a command line; None without one.

    Raises:
        ConfigError: if there are several.
    """
    if len(files) > 1:
        remedy = "name one file, and write what differs as overrides (key=value)"
        raise ConfigError("a run has one file", where=COMMAND_LINE, value=redact(" ".join(files)), remedy=remedy)
    return Path(files[0]) if files else None


def read(path: Path, replaced: Sequence[str], folders: Sequence[Path]) -> tuple[FileContent, list[Problem]]:
    """Return the content of a run's file and its problems.

    `replaced` are the groups whose option is selected on the command line, which replaces the file's whole section. `folders`
    hold the options of the groups; without folders, the options are not checked.

    Raises:
        ConfigError: if the file cannot be read as a mapping.
    """
    root = _load(path)
    lines = {key: line for key, line, _ in nodes(path.read_text(encoding="utf-8"), with_sections=True)}

    def where(key: str) -> str:
        return f"{short(path)}:{lines.get(key, 1)}"

    problems: list[Problem] = []
    choices: dict[str, str | None] = {}
    values: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in root.items():
        if key in _OF_HYDRA:
            problems.append(Problem(f"{key}: is Hydra's, and not part of a run's file", where(key), remedy=_OF_HYDRA[key]))
        elif key in replaced:
            dropped += [f"{key}.{name}" for name in value if name != BASE] if isinstance(value, dict) else []
        elif key in GROUPS and not isinstance(value, dict):
            option, problem = _option(key, value, where(key), folders)
            problems += [problem] if problem else []
            choices |= {key: option} if option else {}
        elif problem := _misplaced(key, value, where(key)):
            problems.append(problem)
        # Hydra and the schema report unknown keys, and sections that are not mappings.
        elif value is not None or key not in settings():
            section = dict(value) if isinstance(value, dict) else value
            if key in GROUPS and BASE in section:
                option, problem = _option(key, section.pop(BASE), where(f"{key}.{BASE}"), folders)
                problems += [problem] if problem else []
                # For an option that does not exist, use the default one; otherwise its settings would be reported as missing.
                if problem is None:
                    choices[key] = option
                elif key == "data":
                    choices[key] = _OWN_ROWS
            elif key == "data" and ("path" in section or "sources" in section):
                choices[key] = _OWN_ROWS
            values[key] = section
    file = RunFile(path, tuple(_keys(choices, values)), tuple(dropped))
    return FileContent(file, choices, values), problems


def _load(path: Path) -> dict[Any, Any]:
    """Return the mapping in a file, which is read as Hydra reads its own files.

    Raises:
        ConfigError: if there is no such file, or it is not readable, not YAML or not a mapping.
    """
    import yaml
    from omegaconf._utils import get_yaml_loader

    if path.name.endswith(ROW_SUFFIXES):
        raise ConfigError(_rows(path))
    if not path.is_file():
        raise ConfigError(_no_file(path))
    try:
        with path.open(encoding="utf-8") as stream:
            root = yaml.load(stream, Loader=get_yaml_loader())  # noqa: S506
    except (ValueError, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ConfigError(f"the file is not read: {reason}", where=short(path), remedy="correct this value") from None
    except yaml.YAMLError as error:
        if path.suffix == ".json":
            raise ConfigError(_rows(path)) from None
        unreadable = Problem("the file is not valid YAML", short(path), remedy="a line is `key: value`, indented with spaces")
        raise ConfigError(yaml_problems(error) or [unreadable]) from error
    if isinstance(root, list) and path.suffix == ".json":
        raise ConfigError(_rows(path))
    if not isinstance(root, dict) or not root:
        message = "the file is not a mapping of sections to settings"
        remedy = f"write settings as `section:` with `name: value` below it; a file to start from: {launcher_command('init')}"
        raise ConfigError(message, where=short(path), remedy=remedy)
    return root


def _rows(path: Path) -> Problem:
    """Return the problem of a file of rows in the position of a run's file."""
    name = redact(str(path))
    remedy = (
        f"write a file of settings for these rows with: {launcher_command('init', '--data', name)}; "
        f"or name them as a setting: data.path={shlex.quote(name)}"
    )
    return Problem("this is a file of rows, not one of settings", where=COMMAND_LINE, value=name, remedy=remedy)


def _no_file(path: Path) -> Problem:
    folder = path.parent
    # All files share the ending, so it must not count as similarity.
    nearby = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES and file.is_file()}
    close = difflib.get_close_matches(path.stem, nearby, n=1)
    guess = f"did you mean {nearby[close[0]]}? " if close else ""
    remedy = f"{guess}name a YAML file with settings; a file to start from: {launcher_command('init')}"
    return Problem("there is no such file", where=COMMAND_LINE, value=redact(str(path)), remedy=remedy)


def _option(group: str, value: Any, where: str, folders: Sequence[Path]) -> tuple[str | None, Problem | None]:
    """Return the option that a value selects, None for none, and the problem with the value."""
    options = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    if value is None:
        return None, None
    if folders and not any((folder / group / f"{value}.yaml").is_file() for folder in folders):
        name = redact(str(value))
        return None, replace(no_such_option(group, name, options, ""), where=where, value=name)
    return str(value), None


def _misplaced(key: Any, value: Any, where: str) -> Problem | None:
    """Return the problem of a setting outside its section, or of an experiment with settings."""
    if key == _EXPERIMENT:
        remedy = "write `experiment: NAME`; the settings of a run's file are in its sections"
        return Problem("experiment: selects an experiment by its name", where, remedy=remedy)
    section, dot, name = str(key).partition(".")
    if dot and section in settings():
        content = "..." if isinstance(value, dict | list) or looks_secret(str(key), value) else value
        remedy = f"write `{section}:`, and indented below it `{name}: {content}`"
        return Problem(f"{key}: a file has one section with its settings below it", where, remedy=remedy)
    return None


def _keys(choices: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the groups with an option, and the settings of the sections."""
    yield from choices
    for section, content in values.items():
        yield from (f"{section}.{name}" for name in content) if isinstance(content, dict) else (str(section),)
