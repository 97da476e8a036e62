"""Writes settings as a run's file: the closest options of the groups, and the keys that differ."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from launcher.config.command_line import GROUPS
from launcher.config.introspect import leaves, sections_of
from launcher.config.run_file.reading import BASE
from launcher.config.schema import RunConfig
from launcher.config.sections.backends import choose_kind
from launcher.config.sections.data import Source
from launcher.security.redaction import redact_setting

_SECTIONS_OF_GROUPS = tuple(group for group in GROUPS if group != "experiment")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_HEADER_GLOBAL = re.compile(r"^#\s*@package\s+_global_", re.MULTILINE)
_ABSENT = object()


@dataclass(frozen=True)
class _Option:
    """An option of a group: `values` are the values that its file sets in all sections."""

    group: str
    name: str | None
    values: Mapping[str, Any]


def values_to_print(config: RunConfig, conf_dir: Path, all_settings: bool = False) -> dict[str, Any]:
    """Return the content of a run's file that composes to `config`: only the differences from its options, or all settings.

    Values that may be secrets are `<redacted>`.
    """
    target = config.model_dump(mode="json")
    if all_settings:
        with_base = {name: {BASE: None, **section} if name in GROUPS else section for name, section in target.items()}
        return dict(_redacted(with_base, ""))
    root, usual = _root(conf_dir)
    chosen = {group: _closest(group, conf_dir, target, usual[group]) for group in _SECTIONS_OF_GROUPS}
    composed = copy.deepcopy(root)
    for group in usual:
        if group in chosen:
            _merge(composed, chosen[group].values)
    printed: dict[str, Any] = {}
    for name, section in target.items():
        defaults = _defaults(name, section)
        _merge(defaults, composed.get(name, {}))
        changes = _changes(section, defaults, target)
        if name == "train":
            _shorten_length(changes)
        option = chosen.get(name)
        if option is not None and (option.name != usual[name] or _is_named(name, changes)):
            printed[name] = {BASE: option.name, **changes} if changes or option.name is None else option.name
        elif changes:
            printed[name] = changes
    return dict(_redacted(printed, ""))


def _is_named(group: str, changes: Mapping[str, Any]) -> bool:
    """Return whether to name a group's default option: readers always want to know the model and the data."""
    # The path alone identifies a user's own model.
    return group == "data" or (group == "model" and "path" not in changes)


def render(values: Mapping[str, Any]) -> str:
    """Return the content of a run's file as YAML that reads back as the same values."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dict(values))))


def _root(conf_dir: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return the settings of conf/config.yaml, and the option that it selects for each group, in composition order."""
    values = _load(conf_dir / "config.yaml")
    entries = [entry for entry in values.pop("defaults") if isinstance(entry, dict)]
    return values, {group: option for entry in entries for group, option in entry.items() if group in _SECTIONS_OF_GROUPS}


def _load(file: Path) -> dict[str, Any]:
    import yaml
    from omegaconf._utils import get_yaml_loader

    values: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=get_yaml_loader()) or {}  # noqa: S506
    return values


def _option(group: str, file: Path) -> _Option:
    """Read the option in a file, including the options of the same group that it starts from."""
    values = _load(file)
    begins_with = [entry for entry in values.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    section: dict[str, Any] = {}
    for name in begins_with:
        _merge(section, _option(group, file.with_name(f"{name}.yaml")).values)
    is_global = _HEADER_GLOBAL.search(file.read_text(encoding="utf-8")) is not None
    _merge(section, values if is_global else {group: values})
    return _Option(group, file.stem, section)


def _closest(group: str, conf_dir: Path, target: Mapping[str, Any], usual: str | None) -> _Option:
    """Return the option that leaves the fewest keys to write; in a tie, the default option."""
    options = [_Option(group, None, {}), *(_option(group, file) for file in sorted((conf_dir / group).glob("*.yaml")))]

    def cost(option: _Option) -> tuple[int, bool]:
        num_keys = 0
        for name, section in target.items():
            defaults = _defaults(name, section)
            _merge(defaults, option.values.get(name, {}))
            if _has_more(defaults, section):
                return (1 << 30, True)
            num_keys += len(list(leaves(_changes(section, defaults, target))))
        return num_keys, option.name != usual

    return min(options, key=cost)


def _defaults(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema's defaults of a section; `section` has its values, of which `kind` may select the class."""
    classes = sections_of(RunConfig.model_fields[name].annotation)
    if len(classes) == 1:
        return _field_defaults(classes[0])
    chosen = next(one for one in classes if one.model_fields["kind"].default == section["kind"])
    # If a section has no kind, its class is not the one that has this kind as its default.
    return {**_field_defaults(chosen), **choose_kind({})}


def _field_defaults(section: type[BaseModel]) -> dict[str, Any]:
    fields = section.model_fields.items()
    return {key: to_jsonable_python(f.get_default(call_default_factory=True)) for key, f in fields if not f.is_required()}


def _changes(values: Mapping[str, Any], defaults: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the defaults; references in the defaults are resolved with `target`."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        default = _resolved(defaults.get(key, _ABSENT), target)
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _changes(value, default, target):
                changes[key] = inner
        elif _without_unset(value) != _without_unset(default):
            changes[key] = _without_unset(value)
    return changes


def _without_unset(value: Any) -> Any:
    """Return a list of mappings, such as data.sources, without the keys that equal the schema's defaults."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) and "path" in item for item in value):
        return value
    unset = {key: default for key, default in _field_defaults(Source).items() if key != "name"}
    return [{key: content for key, content in item.items() if unset.get(key, _ABSENT) != content} for item in value]


def _has_more(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return whether the defaults have keys that the values lack, because a file cannot remove keys."""
    for key, default in defaults.items():
        if key not in values:
            return True
        value = values[key]
        if isinstance(default, dict) and default and (not isinstance(value, dict) or _has_more(default, value)):
            return True
    return False


def _resolved(value: Any, target: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and (reference := _REFERENCE.fullmatch(value)):
        content: Any = target
        for part in reference[1].split("."):
            content = content.get(part) if isinstance(content, Mapping) else None
        return content
    if isinstance(value, list):
        return [_resolved(item, target) for item in value]
    return {key: _resolved(content, target) for key, content in value.items()} if isinstance(value, dict) else value


def _shorten_length(changes: dict[str, Any]) -> None:
    """Leave out the unset length, because a file that sets the other length unsets it; write 2 epochs, not 2.0."""
    if isinstance(epochs := changes.get("epochs"), float) and epochs.is_integer():
        changes["epochs"] = int(epochs)
    for length, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if changes.get(length) is not None and changes.get(other, _ABSENT) is None:
            del changes[other]


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = copy.deepcopy(value)


def _redacted(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _redacted(content, f"{key}.{name}" if key else str(name)) for name, content in value.items()}
    if isinstance(value, list):
        return [_redacted(item, f"{key}[{i}]") for i, item in enumerate(value)]
    shown = redact_setting(key, value)
    return value if shown == str(value) else shown


def _escaped(value: Any) -> Any:
    """Return the values with a backslash before each `${`, which would otherwise be a reference; doubles backslashes there."""
    if isinstance(value, dict):
        return {key: _escaped(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
