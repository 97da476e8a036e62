"""The text of a starter file: settings by section, with the reason for each above it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.config.run_file.printing import render

# In the order in which a person reads them; other sections follow.
_ORDER = ("model", "data", "train", "optim", "deepspeed", "eval", "checkpoint", "cluster", "tracking", "run")
_WIDTH = 100


def starter_text(head: Sequence[str], values: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return the file: `head` as comments, then the sections; `reasons` are by section, or by section.name."""
    names = [*(name for name in _ORDER if name in values), *(name for name in values if name not in _ORDER)]
    parts = ["\n".join(_comment(line, "") for line in head), *(_section(name, values[name], reasons) for name in names)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, content: Any, reasons: Mapping[str, str]) -> str:
    lines = [_comment(reasons[name], "")] if name in reasons else []
    if not isinstance(content, dict):
        return "\n".join([*lines, render({name: content}).rstrip()])
    lines.append(f"{name}:")
    for key, value in content.items():
        if reason := reasons.get(f"{name}.{key}"):
            lines.append(_comment(reason, "  "))
        lines.append(textwrap.indent(render({key: value}).rstrip(), "  "))
    return "\n".join(lines)


def _comment(text: str, indent: str) -> str:
    prefix = f"{indent}# "
    return textwrap.fill(
        text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False, break_long_words=False
    )
