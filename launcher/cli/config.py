"""The verbs `config` and `schema`: settings as a file that `plan` and `train` accept, and the JSON Schema of such a file."""

from __future__ import annotations

import argparse
import json
from typing import Any

from launcher.cli.render import terminal
from launcher.cli.verbs import flags_of
from launcher.config.command_line import GROUPS, conf_dir, is_run_file, list_options
from launcher.config.compose import compose_one
from launcher.config.resume import with_overrides
from launcher.config.run_file import hide_secrets, render, to_values
from launcher.config.schema import RunConfig
from launcher.runs import run_store
from launcher.security.redaction import redact
from launcher.shell_commands import launcher_command

_DIALECT = "http://json-schema.org/draft-07/schema#"
# A reference to another setting, or a value that is not set yet, may stand for any value.
_OPEN = {"type": "string", "pattern": r"^(.*\$\{.+\}.*|\?\?\?)$"}
_EXPERIMENT = "experiment"


def print_settings(arguments: argparse.Namespace) -> int:
    """Print one file."""
    rest = arguments.overrides
    words = [token for token in rest if "=" not in token and not token.startswith(("-", "+", "~"))]
    if words and rest[0] == words[0] and not is_run_file(words[0]):
        plan = run_store.load_plan(run_store.find_run(words[0], arguments.root))
        config = with_overrides(plan.config, rest[1:], plan.run_name)
        head = [f"Settings of the run {plan.run_name}, planned by launcher {plan.provenance.launcher_version}."]
        head.append("Relative paths begin at the folder where the run was started: use the file there.")
        if config.run.name is not None:
            head.append("No two runs have the same name: change run.name to start another run from this file.")
    else:
        command = " ".join(launcher_command("plan", *rest).split())
        config, head = compose_one(rest, flags_of("config")).config, [f"Settings of: {redact(command)}"]
    if arguments.json:
        print(terminal.as_json(hide_secrets(config.model_dump(mode="json"))))
        return 0
    text = render(hide_secrets(to_values(config, conf_dir())))
    print("".join(f"# {' '.join(line.splitlines())}\n" for line in head), text, sep="", end="")
    return 0


def print_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema, which editors use for completion and checks."""
    print(json.dumps(build_schema(), indent=2))
    return 0


def build_schema() -> dict[str, Any]:
    """Return the schema: each section is a mapping with optional keys or, for a group, the name of an option."""
    schema = RunConfig.model_json_schema()
    # Existing names, for completion, and any other name, from --config-dir.
    names = {
        group: [{"enum": options}, {"type": "string"}] for group, options in list_options([conf_dir()]).items() if group in GROUPS
    }
    for definition in schema["$defs"].values():
        for name, value in definition.get("properties", {}).items():
            notes = {key: value.pop(key) for key in ("description", "default") if key in value}
            definition["properties"][name] = {**notes, "anyOf": [value, _OPEN]}
    for name, section in schema["properties"].items():
        references = [{"$ref": part["$ref"]} for part in section.pop("oneOf", [section])]
        options = names.get(name, [])
        for reference in references:
            definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
            definition.pop("required", None)
            if options:
                about = "The option whose settings these keys change; null for none."
                definition["properties"]["base"] = {"description": about, "anyOf": [*options, {"type": "null"}]}
        about = section.get("description") or definition.get("description", "")
        schema["properties"][name] = {"description": about, "anyOf": [*options, *references]}
    about = "A file of settings that combines several groups."
    schema["properties"][_EXPERIMENT] = {"description": about, "anyOf": [*names[_EXPERIMENT], {"type": "null"}]}
    del schema["required"]
    return {**schema, "$schema": _DIALECT, "title": "A run of the launcher", "additionalProperties": False}
