"""The verb `schema`: the JSON Schema of a run's file, which editors use for completion and checks."""

from __future__ import annotations

import argparse
import json
from typing import Any

from launcher.cli.arguments import VerbParser
from launcher.config.command_line import GROUPS
from launcher.config.compose import conf_dir
from launcher.config.schema import RunConfig

_DIALECT = "http://json-schema.org/draft-07/schema#"
# A reference to another setting, or a value that is not set yet, may stand for any value.
_OPEN = {"type": "string", "pattern": r"^(.*\$\{.+\}.*|\?\?\?)$"}
_EXPERIMENT = "experiment"


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
    schema = RunConfig.model_json_schema()
    for definition in schema["$defs"].values():
        for name, value in definition.get("properties", {}).items():
            notes = {key: value.pop(key) for key in ("description", "default") if key in value}
            definition["properties"][name] = {**notes, "anyOf": [value, _OPEN]}
    for name, section in schema["properties"].items():
        references = [{"$ref": part["$ref"]} for part in section.pop("oneOf", [section])]
        options = _names(name) if name in GROUPS else []
        for reference in references:
            definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
            definition.pop("required", None)
            if options:
                about = "The option whose settings these keys change; null for none."
                definition["properties"]["base"] = {"description": about, "anyOf": [*options, {"type": "null"}]}
        about = section.get("description") or definition.get("description", "")
        schema["properties"][name] = {"description": about, "anyOf": [*options, *references]}
    about = "A file of settings that combines several groups."
    schema["properties"][_EXPERIMENT] = {"description": about, "anyOf": [*_names(_EXPERIMENT), {"type": "null"}]}
    del schema["required"]
    return {**schema, "$schema": _DIALECT, "title": "A run of the launcher", "additionalProperties": False}


def _names(group: str) -> list[dict[str, Any]]:
    """Return the schemas of an option's name: existing names, for completion, and any other name, from --config-dir."""
    return [{"enum": sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))}, {"type": "string"}]
