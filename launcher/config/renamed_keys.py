"""Renamed settings: one table from old key to new key, and the refusal of an old key."""

from __future__ import annotations

import re
from typing import Any

from launcher.errors import Problem
from launcher.security.redaction import looks_secret, redact

RENAMED = {
    "train.eval_every": "eval.every",
    "train.eval_at_start": "eval.at_start",
    "train.sample": "eval.sample",
    "train.sample_max_tokens": "eval.sample_max_tokens",
    "train.save_every": "checkpoint.save_every",
    "train.keep_last": "checkpoint.keep_last",
    "train.keep_every": "checkpoint.keep_every",
    "train.keep_best": "checkpoint.keep_best",
    "train.async_save": "checkpoint.async_save",
    "train.mirror": "checkpoint.mirror",
    "train.export": "export.enabled",
    "train.push_to_hub": "export.push_to_hub",
}
COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"(?P<prefix>[+~]{0,2})(?P<key>[A-Za-z_][\w.]*)(?P<assignment>=.*)?", re.DOTALL)


def renamed_override(token: str) -> Problem | None:
    """Return the problem with an override such as `train.save_every=50`; None if its key was not renamed.

    The remedy is the complete replacement, unless the value may be a secret.
    """
    match = _OVERRIDE.fullmatch(token)
    if not match or match["key"] not in RENAMED:
        return None
    old, assignment = match["key"], match["assignment"] or ""
    new = RENAMED[old]
    # A deletion keeps its tilde; keys that exist need no plus.
    prefix = match["prefix"].lstrip("+")
    if _is_secret(old, assignment.removeprefix("=")):
        return Problem(_renamed_text(old, new), where=COMMAND_LINE, remedy=f"write {prefix}{new}=..., with the same value")
    replacement = f"{prefix}{new}{assignment}" if assignment or prefix else f"{new}=..."
    return Problem(_renamed_text(old, new), where=COMMAND_LINE, value=token, remedy=f"write {replacement}")


def renamed_setting(key: str, value: Any, where: str) -> Problem | None:
    """Return the problem with a composed setting; None if its key was not renamed.

    `where` is the origin of the value: a file and line, or the command line.
    """
    # The schema loads slowly, and commands that only look at runs use just the table above.
    from launcher.config.introspect import as_yaml

    new = RENAMED.get(key)
    if new is None:
        return None
    is_shown = not isinstance(value, dict | list) and not _is_secret(key, value)
    text = as_yaml(value) if is_shown else "..."
    section, _, name = new.partition(".")
    # In a YAML file, a dotted key does not name a setting of a section.
    remedy = f"write {new}={text}" if where in ("", COMMAND_LINE) else f"write `{name}: {text}` in the section `{section}`"
    return Problem(_renamed_text(key, new), where=where, value=text if is_shown else "", remedy=remedy)


def renamed_reference(text: str) -> str | None:
    """Return the first renamed key in `text`, such as in the name of an interpolation; None without one."""
    return next((name for name in re.findall(r"[A-Za-z_][\w.]*\w", text) if name in RENAMED), None)


def _renamed_text(old: str, new: str) -> str:
    return f"{old}: the name of this setting is {new}"


def _is_secret(key: str, value: Any) -> bool:
    text = str(value)
    return looks_secret(key, value) or redact(text) != text
