"""Reads and writes a run's file: settings in one YAML file, without Hydra's folders and headers.

For each group, a string selects an option, a mapping sets keys, and a mapping with `base` does both:

    model: {base: qwen3_8b, dtype: bf16}
    cluster: slurm
"""

from __future__ import annotations

import copy
import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from launcher.config.command_line import COMMAND_LINE, GROUPS, ROW_SUFFIXES, SUFFIXES
from launcher.config.error_messages import find_yaml_problems, make_unknown_option_problem
from launcher.config.origin import GLOBAL_HEADER, RunFile, yaml_nodes
from launcher.config.schema import RunConfig, choose_kind, leaves, sections_of, settings
from launcher.config.sections.data import Source
from launcher.errors import ConfigError, Problem
from launcher.security.redaction import looks_secret, redact, redact_setting
from launcher.shell_commands import launcher_command, short_path

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_ABSENT = object()
BASE = "base"
# The option for a data section that names rows but has no `base`.
_OWN_ROWS = "jsonl"
_OF_HYDRA = {
    "defaults": "remove it; a string selects an option, as in `model: qwen3_8b`, and `base` selects one inside a mapping",
    "hydra": "remove it; Hydra's flags are given on the command line",
}


def read_run_file(path: Path, replaced: Sequence[str], folders: Sequence[Path]) -> tuple[RunFile, list[Problem]]:
    """Return the content of a run's file and its problems.

    `replaced` are the groups whose option is selected on the command line, which replaces the file's whole section. `folders`
    hold the options of the groups; without folders, the options are not checked.

    Raises:
        ConfigError: if the file cannot be read as a mapping.
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
    """Return the mapping in a file, which is read as Hydra reads its own files.

    Raises:
        ConfigError: if there is no such file, or it is not readable, not YAML or not a mapping.
    """
    import yaml

    if path.name.endswith(ROW_SUFFIXES):
        raise ConfigError(_make_rows_problem(path))
    if not path.is_file():
        # All files share the ending, so it must not count as similarity.
        nearby = {file.stem: file for file in sorted(path.parent.glob("*")) if file.suffix in SUFFIXES and file.is_file()}
        close = difflib.get_close_matches(path.stem, nearby, n=1)
        guess = f"did you mean {nearby[close[0]]}? " if close else ""
        remedy = f"{guess}name a YAML file with settings; a file to start from: {launcher_command('init')}"
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


def _make_rows_problem(path: Path) -> Problem:
    """Return the problem of a file of rows in the position of a run's file."""
    name = redact(str(path))
    remedy = (
        f"write a file of settings for these rows with: {launcher_command('init', '--data', name)}; "
        f"or name them as a setting: data.path={shlex.quote(name)}"
    )
    return Problem("this is a file of rows, not one of settings", where=COMMAND_LINE, value=name, remedy=remedy)


def _select_option(group: str, value: Any, where: str, folders: Sequence[Path]) -> tuple[str | None, Problem | None]:
    """Return the option that a value selects, None for none, and the problem with the value."""
    options = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    if value is None:
        return None, None
    if folders and not any((folder / group / f"{value}.yaml").is_file() for folder in folders):
        name = redact(str(value))
        return None, replace(make_unknown_option_problem(group, name, options, ""), where=where, value=name)
    return str(value), None


def values_to_print(config: RunConfig, conf_dir: Path, all_settings: bool = False) -> dict[str, Any]:
    """Return the content of a run's file that composes to `config`: only the differences from its options, or all settings.

    Values that may be secrets are `<redacted>`.
    """

    def redact_value(key: str, value: Any) -> Any:
        shown = redact_setting(key, value)
        return value if shown == str(value) else shown

    target = config.model_dump(mode="json")
    if all_settings:
        with_base = {name: {BASE: None, **section} if name in GROUPS else section for name, section in target.items()}
        return dict(_convert_scalars(with_base, redact_value))
    composed = _load_yaml(conf_dir / "config.yaml")
    entries = [entry for entry in composed.pop("defaults") if isinstance(entry, dict)]
    # The option that conf/config.yaml selects for each group, in composition order.
    usual = {group: option for entry in entries for group, option in entry.items() if group in target}
    chosen = {group: _find_closest_option(group, conf_dir, target, option) for group, option in usual.items()}
    for _, values in chosen.values():
        _merge_into(composed, values)
    printed: dict[str, Any] = {}
    for name, section in target.items():
        changes = _find_changed_values(section, _list_section_defaults(name, section, composed), target)
        if name == "train":
            # Write 2 epochs, not 2.0; and leave out the length that is unset, because setting the other one unsets it.
            if isinstance(epochs := changes.get("epochs"), float) and epochs.is_integer():
                changes["epochs"] = int(epochs)
            for length, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
                if changes.get(length) is not None and changes.get(other, _ABSENT) is None:
                    del changes[other]
        option = chosen[name][0] if name in chosen else None
        # Readers always want to know the data and the model, but the path alone identifies a user's own model.
        is_named = name == "data" or (name == "model" and "path" not in changes)
        if name in chosen and (option != usual[name] or is_named):
            printed[name] = {BASE: option, **changes} if changes or option is None else option
        elif changes:
            printed[name] = changes
    return dict(_convert_scalars(printed, redact_value))


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


def _read_option(group: str, file: Path) -> dict[str, Any]:
    """Return the values that an option's file sets in all sections, including the options of its group that it starts from."""
    own = _load_yaml(file) or {}
    values: dict[str, Any] = {}
    for name in own.pop("defaults", []):
        if isinstance(name, str) and name != "_self_":
            _merge_into(values, _read_option(group, file.with_name(f"{name}.yaml")))
    is_global = GLOBAL_HEADER.search(file.read_text(encoding="utf-8")) is not None
    _merge_into(values, own if is_global else {group: own})
    return values


def _find_closest_option(
    group: str, conf_dir: Path, target: Mapping[str, Any], usual: str | None
) -> tuple[str | None, dict[str, Any]]:
    """Return the option that leaves the fewest keys to write, None for none, with its values; in a tie, the default option."""
    files = sorted((conf_dir / group).glob("*.yaml"))
    options: dict[str | None, dict[str, Any]] = {None: {}, **{file.stem: _read_option(group, file) for file in files}}

    def cost(option: str | None) -> tuple[int, bool]:
        num_keys = 0
        for name, section in target.items():
            defaults = _list_section_defaults(name, section, options[option])
            if _has_other_keys(defaults, section):
                return (1 << 30, True)
            num_keys += len(list(leaves(_find_changed_values(section, defaults, target))))
        return num_keys, option != usual

    closest = min(options, key=cost)
    return closest, options[closest]


def _list_section_defaults(name: str, section: Mapping[str, Any], composed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a section has without a file: the schema's defaults, and over them those in `composed`.

    `section` has the section's values, of which `kind` may select the class.
    """
    classes = sections_of(RunConfig.model_fields[name].annotation)
    if len(classes) == 1:
        defaults = _list_field_defaults(classes[0])
    else:
        chosen = next(one for one in classes if one.model_fields["kind"].default == section["kind"])
        # If a section has no kind, its class is not the one that has this kind as its default.
        defaults = {**_list_field_defaults(chosen), **choose_kind({})}
    _merge_into(defaults, composed.get(name, {}))
    return defaults


def _list_field_defaults(section: type[BaseModel]) -> dict[str, Any]:
    fields = section.model_fields.items()
    return {key: to_jsonable_python(f.get_default(call_default_factory=True)) for key, f in fields if not f.is_required()}


def _find_changed_values(values: Mapping[str, Any], defaults: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the defaults; references in the defaults are resolved with `target`."""

    def resolve_reference(_: str, value: Any) -> Any:
        reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if reference is None:
            return value
        content: Any = target
        for part in reference[1].split("."):
            content = content.get(part) if isinstance(content, Mapping) else None
        return content

    changes: dict[str, Any] = {}
    for key, value in values.items():
        default = _convert_scalars(defaults.get(key, _ABSENT), resolve_reference)
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _find_changed_values(value, default, target):
                changes[key] = inner
        elif _drop_default_keys(value) != _drop_default_keys(default):
            changes[key] = _drop_default_keys(value)
    return changes


def _drop_default_keys(value: Any) -> Any:
    """Return a list of mappings, such as data.sources, without the keys that equal the schema's defaults."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) and "path" in item for item in value):
        return value
    unset = {key: default for key, default in _list_field_defaults(Source).items() if key != "name"}
    return [{key: content for key, content in item.items() if unset.get(key, _ABSENT) != content} for item in value]


def _has_other_keys(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return whether the defaults have keys that the values lack, because a file cannot remove keys."""
    for key, default in defaults.items():
        if key not in values:
            return True
        value = values[key]
        if isinstance(default, dict) and default and (not isinstance(value, dict) or _has_other_keys(default, value)):
            return True
    return False


def _merge_into(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge_into(values[key], value)
        else:
            values[key] = copy.deepcopy(value)


def _convert_scalars(value: Any, convert: Callable[[str, Any], Any], key: str = "") -> Any:
    """Return nested mappings and lists with each scalar converted; `convert` gets its key below `key` and its value."""
    if isinstance(value, dict):
        items = value.items()
        return {name: _convert_scalars(content, convert, f"{key}.{name}" if key else str(name)) for name, content in items}
    if isinstance(value, list):
        return [_convert_scalars(item, convert, f"{key}[{i}]") for i, item in enumerate(value)]
    return convert(key, value)
