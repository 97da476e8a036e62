"""The verb `schema`: the JSON Schema of a run's file, which editors use for completion and checks."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.cli.arguments import VerbParser
from launcher.config.command_line import GROUPS
from launcher.config.compose import conf_dir
from launcher.config.introspect import sections_of
from launcher.config.schema import RunConfig

_DIALECT = "http://json-schema.org/draft-07/schema#"
# A reference to another setting, or a value that is not set yet, may stand for any value.
_OPEN = {"type": "string", "pattern": r"^(.*\$\{.+\}.*|\?\?\?)$"}
_EXPERIMENT = "experiment"
_NOTES = ("description", "default", "title")


def run(verb: str, tokens: list[str]) -> int:
    """Print the schema."""
    _parser().parse_args(tokens)
    print(json.dumps(build_schema(), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Print the JSON Schema of a run's file. Save it and begin the file with "
        "`# yaml-language-server: $schema=PATH`: the editor then completes settings and shows their descriptions."
    )
    return VerbParser(prog="python -m launcher schema", description=about)


def build_schema() -> dict[str, Any]:
    """Return the schema: each section is a mapping with optional keys or, for a group, the name of an option."""
    properties: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        classes = sections_of(field.annotation)
        about = field.description or (classes[0].__mro__[len(classes) > 1].__doc__ or "").strip()
        section = _mapping([_inlined(cls.model_json_schema()) for cls in classes])
        properties[name] = {"description": about, **(_of_group(name, section) if name in GROUPS else section)}
    properties[_EXPERIMENT] = {"description": "A file of settings that combines several groups.", **_option(_EXPERIMENT)}
    return {
        "$schema": _DIALECT,
        "title": "A run of the launcher",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _of_group(group: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a group: the name of an option, or a mapping of keys with the option in `base`."""
    base = {"description": "The option whose settings these keys change; null for none.", **_option(group)}
    mapping = {**section, "properties": {"base": base, **section["properties"]}}
    return {"anyOf": [*_names(group), mapping]}


def _option(group: str) -> dict[str, Any]:
    return {"anyOf": [*_names(group), {"type": "null"}]}


def _names(group: str) -> list[dict[str, Any]]:
    """Return the schemas of an option's name: existing names, for completion, and any other name, from --config-dir."""
    return [{"enum": sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))}, {"type": "string"}]


def _inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without references to definitions."""
    definitions = schema.get("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inline({**definitions[part["$ref"].rpartition("/")[2]], **{k: v for k, v in part.items() if k != "$ref"}})
        return {key: inline(value) for key, value in part.items() if key != "$defs"}

    return dict(inline(copy.deepcopy(dict(schema))))


def _mapping(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a section; for one that `kind` selects, with the keys of all kinds."""
    properties: dict[str, Any] = {}
    for schema in schemas:
        for key, value in schema.get("properties", {}).items():
            if key in properties and properties[key] != value:
                properties[key] = _merged(properties[key], value)
            else:
                properties[key] = value
    return {
        "type": "object",
        "properties": {key: _setting(value) for key, value in properties.items()},
        "additionalProperties": False,
    }


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a key that differs between kinds, with the first one's description."""
    about = {key: first[key] for key in ("description",) if key in first}
    parts = [part for one in (first, second) for part in _alternatives(one)]
    return {**about, "anyOf": [part for i, part in enumerate(parts) if part not in parts[:i]]}


def _setting(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a setting, whose value may also be a reference; keys of nested sections are optional too."""
    if schema.get("type") == "object" and "properties" in schema:
        return {**{k: v for k, v in schema.items() if k in _NOTES}, **_mapping([dict(schema)])}
    notes = {key: schema[key] for key in ("description", "default") if key in schema}
    parts = list(_alternatives(schema))
    return {**notes, "anyOf": [*parts, _OPEN]}


def _alternatives(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for part in schema.get("anyOf") or schema.get("oneOf") or [schema]:
        plain = {key: value for key, value in part.items() if key not in _NOTES}
        if plain.get("type") == "array" and isinstance(items := plain.get("items"), dict) and "properties" in items:
            # A list's entries are complete.
            plain["items"] = {**_mapping([items]), "required": items.get("required", [])}
        yield plain
