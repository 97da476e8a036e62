"""Converts the JSON of a plan with an earlier schema version to the current version. Pure, and without the plan's models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config.renamed_keys import RENAMED

SCHEMA_VERSION = 4


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan `values` in the current schema; neither it nor anything in it is changed.

    Raises:
        ValueError: if the schema version is unknown, or a part that moves is not where its version stores it.
    """
    version = values.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"schema_version is {version!r}, and this launcher reads 1 to {SCHEMA_VERSION}; use the launcher that wrote the plan"
        )
    migrated = dict(values)
    if version == 1:
        migrated = _from_version_1(migrated)
    if version <= 2:
        migrated = _from_version_2(migrated)
    return _from_version_3(migrated) if version < SCHEMA_VERSION else migrated


def _from_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 has the settings of evaluation, checkpoints and export in the section `train`."""
    config, train = _read_section(values, "train")
    moved = {**config, "train": dict(train)}
    for old, new in RENAMED.items():
        (old_section, old_name), (section, name) = old.split("."), new.split(".")
        if old_name in moved[old_section]:
            value = moved[old_section].pop(old_name)
            moved[section] = {**moved.get(section, {}), name: value}
    return {**values, "schema_version": 2, "config": moved}


def _from_version_2(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 2 divides documents one by one, and writes a prompt and its completion as text.

    A cache that is built again for such a run has the same rows.
    """
    config, data = _read_section(values, "data")
    if not isinstance(data.get("sources"), list) or not all(isinstance(source, Mapping) for source in data["sources"]):
        raise ValueError("config.data.sources is missing or is not a list of objects")
    sources = [{"completions": "text", **source} for source in data["sources"]]
    moved = {**config, "data": {"split_by": "document", **data, "sources": sources}}
    return {**values, "schema_version": 3, "config": moved}


def _from_version_3(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 3 says whether all layers recompute their activations, or none."""
    config, model = _read_section(values, "model")
    layers = "all" if model.get("activation_checkpointing") is True else "none"
    return {**values, "schema_version": 4, "config": {**config, "model": {**model, "activation_checkpointing": layers}}}


def _read_section(values: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return a plan's settings and one section of them. Raises ValueError if either is missing."""
    config = values.get("config")
    if not isinstance(config, Mapping):
        raise ValueError("config is missing or is not an object")
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"config.{name} is missing or is not an object")
    return config, section
