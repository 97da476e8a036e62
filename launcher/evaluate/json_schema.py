"""A JSON schema validator with a time limit for regular expressions: an answer may make one take forever."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from launcher.errors import DataError

# Maximum number of a pattern's characters in a message.
_MAX_CHARS = 200


@functools.cache
def schema_validator(schema: str, time_limit_s: float) -> Any:
    """Return the validator for a JSON schema, given as JSON text; each match of a pattern may take `time_limit_s`.

    The validator raises DataError for a pattern that takes longer.
    """
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend, validator_for
    from jsonschema_specifications import REGISTRY

    def matches(pattern: str, text: str) -> bool:
        return is_match(pattern, text, time_limit_s)

    def check_pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "string") and not matches(pattern, instance):
            yield ValidationError(f"{instance!r} does not match {pattern!r}")

    def check_properties(validator: Any, patterns: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(instance, "object"):
            for pattern, part in patterns.items():
                for key, value in instance.items():
                    if matches(pattern, key):
                        yield from validator.descend(value, part, path=key, schema_path=pattern)

    parsed = json.loads(schema)
    timed = extend(validator_for(parsed), {"pattern": check_pattern, "patternProperties": check_properties})
    ordered = _with_patterns_first(parsed)
    if isinstance(ordered, dict):
        # Otherwise a reference to the root would lead to this dialect's own validator, which has no time limit.
        ordered.pop("$schema", None)
    # Without its own registry, the validator downloads what $ref names.
    return timed(ordered, registry=REGISTRY)


def is_match(pattern: str, text: str, time_limit_s: float) -> bool:
    """Return whether a pattern of the schema matches anywhere in a text.

    Raises:
        DataError: if it takes too long, or is not a valid pattern.
    """
    import regex

    try:
        return regex.compile(pattern).search(text, timeout=time_limit_s) is not None
    except regex.error as error:
        message = f"a regular expression of the JSON schema cannot be used: {error}"
        raise DataError(message, where="evaluate.json_schema", value=pattern[:_MAX_CHARS], remedy="correct it") from None
    except TimeoutError:
        raise DataError(
            f"a regular expression of the JSON schema takes more than {time_limit_s:g} s for one answer",
            where="evaluate.json_schema",
            value=pattern,
            remedy="nested repetitions such as (a+)+ take very long; write them without nesting",
        ) from None


def _with_patterns_first(value: Any) -> Any:
    """Return a schema whose patternProperties come first: other keywords match the same keys, without a time limit."""
    if isinstance(value, list):
        return [_with_patterns_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    ordered = {key: value[key] for key in ("patternProperties",) if key in value} | value
    return {key: _with_patterns_first(item) for key, item in ordered.items()}
