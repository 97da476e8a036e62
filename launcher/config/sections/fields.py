"""The types of setting values. Each rule's message is `what is wrong; the remedy`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# The limit of a path on Linux; other texts are always shorter.
MAX_CHARACTERS = 4096
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Maximum characters of a name from a file or a path. In the name of a run, the data set, the date and the time follow.
_DERIVED_CHARACTERS = 60


class SettingsSection(BaseModel):
    """A section of settings: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)


def derive_name(text: str) -> str:
    """Return a text as the first part of a name, with hyphens for characters that names may not contain; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:_DERIVED_CHARACTERS]


def no_control_characters(value: str) -> str:
    """Return the text. Raises ValueError if it contains a control character, or another character that ends a line in YAML."""
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in value):
        raise ValueError("contains a control character; remove line breaks, tabs and other control characters")
    return value


def matching(pattern: str, rule: str) -> AfterValidator:
    """Return a validator for text that matches the whole of `pattern`; `rule` is its message."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        no_control_characters(value)
        if len(value) > MAX_CHARACTERS:
            raise ValueError(f"is longer than {MAX_CHARACTERS} characters; shorten it")
        if not compiled.fullmatch(value):
            raise ValueError(rule)
        return value

    return AfterValidator(check)


def with_own_names(kind: str) -> AfterValidator:
    """Return a validator for sections with different names; `kind` says what they are."""

    def check(value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [one.name for one in value]
        if len({*names}) < len(names):
            raise ValueError(f"uses a name twice ({', '.join(names)}); give every {kind} its own name")
        return value

    return AfterValidator(check)


def number_as_text(value: Any) -> Any:
    """Return a number that YAML parsed as the text that was written; return other values unchanged."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, AfterValidator(no_control_characters)]
Name = Annotated[
    str,
    matching(
        NAME_PATTERN.pattern, "is not a valid name; use at most 100 letters, digits, '.', '_' and '-', a letter or digit first"
    ),
    Field(json_schema_extra={"format": "name"}),
]
Group = Annotated[str, matching(r"[A-Za-z_][\w.-]*|\d+", "is not a group of this machine; write its name as `id` shows it")]
HubId = Annotated[str, matching(HUB_ID_PATTERN.pattern, "is not the id of a Hub repository; write owner/name")]
Url = Annotated[
    str,
    matching(
        r"[a-z][a-z0-9+.-]*://(?![^/]*:[^/]*@)[\w.@:/+=~-]+",
        "is not the URL of a folder; write protocol://path, such as s3://bucket/runs, without keys or passwords",
    ),
]
Sha256 = Annotated[str, matching(r"[0-9a-f]{64}", "is not a SHA-256 digest; write 64 hexadecimal digits")]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


def _write_checkpointing(value: Any) -> Any:
    if isinstance(value, bool):
        return "all" if value else "none"
    return "all" if value == "every 1" else value


Checkpointing = Annotated[
    str,
    BeforeValidator(_write_checkpointing),
    matching(r"auto|all|none|every [1-9]\d{0,3}", "is none of auto, all, none and every N; write every 2 for each second layer"),
]
