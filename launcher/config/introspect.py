"""Every setting with its type, default and meaning, from the schema."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel

from launcher.config.schema import RunConfig

_SCALARS = {"integer": "int", "number": "float", "string": "text", "object": "mapping"}
_LOWER = (("exclusiveMinimum", ">"), ("minimum", ">="))
_UPPER = (("exclusiveMaximum", "<"), ("maximum", "<="))


@dataclass(frozen=True)
class Setting:
    """One setting: `type` as in `int > 0 or null`; `default` in YAML, None if a value is required.

    `kinds` are the cluster kinds that have the setting, empty if all have it.
    """

    key: str
    type: str
    default: str | None
    meaning: str
    kinds: tuple[str, ...] = ()


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return all settings by key, in the schema's order; `data.sources[].path` is the key of a list's items."""
    return {setting.key: setting for setting in settings_of(RunConfig, "")}


def settings_of(section: type[BaseModel], prefix: str) -> Iterator[Setting]:
    """Yield the settings of a section and of those below it, with `prefix` before their keys."""
    properties = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        nested = sections_of(field.annotation)
        meaning = field.description or (nested[0].__mro__[len(nested) > 1].__doc__ if nested else "") or ""
        if len(nested) > 1:
            yield Setting(key, "mapping", None, meaning)
            yield from _walk_kinds(nested, f"{key}.")
            continue
        default = None if field.is_required() else as_yaml(field.get_default(call_default_factory=True))
        yield Setting(key, _type_text(properties[name]), default, meaning)
        if nested:
            yield from settings_of(nested[0], f"{key}[]." if nested[0] is not field.annotation else f"{key}.")


def _walk_kinds(members: Sequence[type[BaseModel]], prefix: str) -> Iterator[Setting]:
    """Yield the settings of sections that `kind` selects from: first those in all sections, then those of each section."""
    by_kind = {member.model_fields["kind"].default: {s.key: s for s in settings_of(member, prefix)} for member in members}
    shared = [key for key in next(iter(by_kind.values())) if all(key in of_kind for of_kind in by_kind.values())]
    any_kind = next(iter(by_kind.values()))
    for key in shared:
        is_kind = key == f"{prefix}kind"
        yield replace(any_kind[key], type=" | ".join(by_kind)) if is_kind else any_kind[key]
    own = {key: setting for of_kind in by_kind.values() for key, setting in of_kind.items() if key not in shared}
    for key, setting in own.items():
        yield replace(setting, kinds=tuple(kind for kind, of_kind in by_kind.items() if key in of_kind))


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in an annotation: a single one, directly or as a list's items, or several to select from."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def _type_text(schema: Mapping[str, Any]) -> str:
    """Return a JSON Schema as text: `bf16 | fp16 | fp32`, `int > 0 or null`, `0 <= float <= 1`, `list of name`."""
    if "anyOf" in schema:
        parts = [_type_text(part) for part in schema["anyOf"] if part.get("type") != "null"]
        optional = any(part.get("type") == "null" for part in schema["anyOf"])
        return " | ".join(parts) + (" or null" if optional else "")
    if "const" in schema or "enum" in schema:
        return " | ".join(str(choice) for choice in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "boolean":
        return "true | false"
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_type_text(item) for item in schema['prefixItems'])}]"
        return f"list of {_type_text(schema['items'])}"
    if kind is None:
        return "mapping"
    name = schema.get("format") or _SCALARS[kind]
    lower = next((f"{sign} {schema[bound]:g}" for bound, sign in _LOWER if bound in schema), "")
    upper = next((f"{sign} {schema[bound]:g}" for bound, sign in _UPPER if bound in schema), "")
    if lower and upper:
        sign, number = lower.split()
        return f"{number} {sign.replace('>', '<')} {name} {upper}"
    return " ".join(filter(None, (name, lower, upper)))


def as_yaml(value: Any) -> str:
    """Return a value as it is written in a file or on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    return str(value)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the scalars in nested mappings and lists, with their keys below `key`, such as data.sources[0].path."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from leaves(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from leaves(v, f"{key}[{i}]")
    else:
        yield key, value
