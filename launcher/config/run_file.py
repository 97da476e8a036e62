"""Reads and writes a run's file: settings in one YAML file, without Hydra's folders and headers.

For each group, a string selects an option, a mapping sets keys, and a mapping with `base` does both:

    model: {base: qwen3_8b, dtype: bf16}
    cluster: slurm
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.command_line import COMMAND_LINE, GROUPS, ROW_SUFFIXES
from launcher.config.error_messages import find_yaml_problems, make_unknown_option_problem
from launcher.config.origin import RunFile, yaml_nodes
from launcher.config.schema import RunConfig, settings
from launcher.errors import ConfigError, Problem
from launcher.security.redaction import looks_secret, redact, redact_setting
from launcher.shell_commands import launcher_command, short_path

BASE = "base"
# The option for a data section that names rows but has no `base`.
_OWN_ROWS = "jsonl"
_OF_HYDRA = {
    "defaults": "remove it; a string selects an option, as in `model: qwen3_8b`, and `base` selects one inside a mapping",
    "hydra": "remove it; Hydra's flags are given on the command line",
}


def read_run_file(path: Path, replaced: Sequence[str], folders: Sequence[Path]) -> tuple[RunFile, list[Problem]]:
    """Return the content of a run's file and its problems. Raises ConfigError if it cannot be read as a mapping.

    `replaced` are the groups whose option is selected on the command line, which replaces the file's whole section. `folders`
    hold the options of the groups; without folders, the options are not checked.
    """
    root = _read_mapping(path)
    lines = {key: line for key, line, _ in yaml_nodes(path.read_text(encoding="utf-8"))}

    def where(key: str) -> str:
        return f"{short_path(path)}:{lines.get(key, 1)}"

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
            option, problem = _select_option(key, value, where(key), folders)
            problems += [problem] if problem else []
            choices |= {key: option} if option else {}
        elif key == "experiment":
            remedy = "write `experiment: NAME`; the settings of a run's file are in its sections"
            problems.append(Problem("experiment: selects an experiment by its name", where(key), remedy=remedy))
        elif (parts := str(key).partition("."))[1] and parts[0] in settings():
            content = "..." if isinstance(value, dict | list) or looks_secret(str(key), value) else value
            remedy = f"write `{parts[0]}:`, and indented below it `{parts[2]}: {content}`"
            problems.append(Problem(f"{key}: a file has one section with its settings below it", where(key), remedy=remedy))
        # Hydra and the schema report unknown keys, and sections that are not mappings.
        elif value is not None or key not in settings():
            section = dict(value) if isinstance(value, dict) else value
            if key in GROUPS and BASE in section:
                option, problem = _select_option(key, section.pop(BASE), where(f"{key}.{BASE}"), folders)
                problems += [problem] if problem else []
                # For an option that does not exist, use the default one; otherwise its settings would be reported as missing.
                if problem is None:
                    choices[key] = option
                elif key == "data":
                    choices[key] = _OWN_ROWS
            elif key == "data" and ("path" in section or "sources" in section):
                choices[key] = _OWN_ROWS
            values[key] = section
    return RunFile(path, choices, values, tuple(dropped)), problems


def _read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping in a file, which is read as Hydra reads its own files."""
    import yaml

    if path.name.endswith(ROW_SUFFIXES):
        name = redact(str(path))
        remedy = (
            f"write a file of settings for these rows with: {launcher_command('init', '--data', name)}; "
            f"or name them as a setting: data.path={shlex.quote(name)}"
        )
        raise ConfigError("this is a file of rows, not one of settings", where=COMMAND_LINE, value=name, remedy=remedy)
    if not path.is_file():
        remedy = f"name a YAML file with settings; a file to start from: {launcher_command('init')}"
        raise ConfigError("there is no such file", where=COMMAND_LINE, value=redact(str(path)), remedy=remedy)
    try:
        root = _load_yaml(path)
    except (ValueError, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ConfigError(f"the file is not read: {reason}", where=short_path(path), remedy="correct this value") from None
    except yaml.YAMLError as error:
        unreadable = Problem(
            "the file is not valid YAML", short_path(path), remedy="a line is `key: value`, indented with spaces"
        )
        raise ConfigError(find_yaml_problems(error) or [unreadable]) from error
    if not isinstance(root, dict) or not root:
        message = "the file is not a mapping of sections to settings"
        remedy = f"write settings as `section:` with `name: value` below it; a file to start from: {launcher_command('init')}"
        raise ConfigError(message, where=short_path(path), remedy=remedy)
    return root


def _select_option(group: str, value: Any, where: str, folders: Sequence[Path]) -> tuple[str | None, Problem | None]:
    """Return the option that a value selects, None for none, and the problem with the value."""
    options = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    if value is None:
        return None, None
    if folders and not any((folder / group / f"{value}.yaml").is_file() for folder in folders):
        name = redact(str(value))
        return None, replace(make_unknown_option_problem(group, name, options, ""), where=where, value=name)
    return str(value), None


def to_values(config: RunConfig, conf_dir: Path) -> dict[str, Any]:
    """Return the content of a run's file that composes to `config`, without options of groups.

    It has the settings that differ from the schema's defaults, and those that conf/config.yaml sets.
    """
    everything, differing = config.model_dump(mode="json"), config.model_dump(mode="json", exclude_defaults=True)
    root = _load_yaml(conf_dir / "config.yaml")
    values = {}
    for name, section in everything.items():
        kept = {*differing.get(name, {}), *root.get(name, {}), "kind"}
        values[name] = {key: differing.get(name, {}).get(key, value) for key, value in section.items() if key in kept}
        if name in GROUPS:
            values[name] = {BASE: None, **values[name]}
    return {name: section for name, section in values.items() if section}


def hide_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's content with `<redacted>` in place of values that may be secrets."""

    def hide(key: str, value: Any) -> Any:
        shown = redact_setting(key, value)
        return value if shown == str(value) else shown

    return dict(_convert_scalars(dict(values), hide))


def render(values: Mapping[str, Any]) -> str:
    """Return the content of a run's file as YAML that reads back as the same values."""
    from omegaconf import OmegaConf

    def escape_references(_: str, value: Any) -> Any:
        # A backslash before each `${`, which would otherwise be a reference; backslashes there are doubled.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return OmegaConf.to_yaml(OmegaConf.create(_convert_scalars(dict(values), escape_references)))


def _load_yaml(file: Path) -> Any:
    import yaml
    from omegaconf._utils import get_yaml_loader

    # As Hydra reads files: 1e3 is a number, and a key that stands twice is an error. OmegaConf.load would also wrap the values.
    with file.open(encoding="utf-8") as stream:
        return yaml.load(stream, Loader=get_yaml_loader())  # noqa: S506


def _convert_scalars(value: Any, convert: Callable[[str, Any], Any], key: str = "") -> Any:
    """Return nested mappings and lists with each scalar converted; `convert` gets its key below `key` and its value."""
    if isinstance(value, dict):
        items = value.items()
        return {name: _convert_scalars(content, convert, f"{key}.{name}" if key else str(name)) for name, content in items}
    if isinstance(value, list):
        return [_convert_scalars(item, convert, f"{key}[{i}]") for i, item in enumerate(value)]
    return convert(key, value)
