"""The JSON of a plan of an earlier schema version, as one of the current version. Pure, and without the models of plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config.renamed_keys import RENAMED

SCHEMA_VERSION = 2


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan `values` in the current schema; neither it nor anything in it is changed.

    Raises:
        ValueError: where the schema version is unknown, or a part that moves is not where its version has it.
    """
    version = values.get("schema_version")
    if isinstance(version, bool) or version not in (1, SCHEMA_VERSION):
        raise ValueError(
            f"schema_version is {version!r}, and this launcher reads 1 and {SCHEMA_VERSION}; use the launcher that wrote the plan"
        )
    return _from_version_1(values) if version == 1 else dict(values)


def _from_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 has the settings of evaluation, checkpoints and export in the section `train`."""
    config = values.get("config")
    if not isinstance(config, Mapping):
        raise ValueError("config is missing or is not an object")
    if not isinstance(config.get("train"), Mapping):
        raise ValueError("config.train is missing or is not an object")
    moved = {**config, "train": dict(config["train"])}
    for old, new in RENAMED.items():
        (old_section, old_name), (section, name) = old.split("."), new.split(".")
        if old_name in moved[old_section]:
            value = moved[old_section].pop(old_name)
            moved[section] = {**moved.get(section, {}), name: value}
    return {**values, "schema_version": 2, "config": moved}
