"""The verb `diff`: the differences between two runs, or between a run and a settings file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli import formatting
from launcher.cli.views.compared_run import GIT_COMMIT, SECTIONS, ComparedRun, ValueDifference, compare, of_settings, read
from launcher.config.command_line import is_run_file
from launcher.security.redaction import redact_setting

_MAX_CHARS = 200
# Smaller changes are not shown; numbers this small are shown with an exponent.
_LEAST_CHANGE, _MOST = 0.0005, 1e12
_COMMIT = re.compile(r"[0-9a-f]{40}")


def compare_runs(arguments: argparse.Namespace) -> int:
    """Print the differences of two runs."""
    left, right = (_side(word, Path(arguments.root)) for word in (arguments.left, arguments.right))
    sections = compare(left, right)
    if arguments.json:
        values = {
            "left": left.name,
            "right": right.name,
            **{
                name: [_as_json(difference) for difference in sections.get(name, [])]
                for name in SECTIONS
                if name in left.sections and name in right.sections
            },
        }
        print(formatting.as_json(values))
    else:
        print("\n".join(_lines(left, right, sections)))
    return 0


def _side(word: str, root: Path) -> ComparedRun:
    """Return what a command line word names: a run, or a run's file, which has only settings.

    Raises:
        LauncherError: if there is no such run, or the file has mistakes.
    """
    if not is_run_file(word):
        return read(run_store.find_run(word, root))
    from launcher.config.compose import compose_one

    return of_settings(word, compose_one([word]).config.model_dump(mode="json"))


def _lines(left: ComparedRun, right: ComparedRun, sections: Mapping[str, Sequence[ValueDifference]]) -> list[str]:
    if not sections:
        return [f"no differences between {left.name} and {right.name}"]
    names = left.name, right.name if right.name != left.name else f"{right.name} (the second)"
    lines = []
    for section, differences in sections.items():
        rows = [(d.key, _shown(d.key, d.left), _shown(d.key, d.right), _change(section, d)) for d in differences]
        has_changes = any(row[3] for row in rows)
        columns = (section, *names, *([">change"] if has_changes else []))
        lines += [*formatting.table(columns, [row if has_changes else row[:3] for row in rows]), ""]
    return lines[:-1]


def _change(section: str, difference: ValueDifference) -> str:
    change = difference.relative_change
    if section != "results" or change is None:
        return ""
    return f"{change:+.1%}" if abs(change) >= _LEAST_CHANGE else "0.0%"


def _shown(key: str, value: Any) -> str:
    """Return a value as a single line of text without secrets."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value.is_integer() and 1 <= abs(value) < _MOST:
            return f"{value:,.0f}"
        return f"{value:,.{1 if abs(value) >= 100 else 4}f}" if 0.001 <= abs(value) < _MOST else f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(key, item) for item in value)
    text = _without_secrets(key, str(value)).replace("\n", " ")
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


def _without_secrets(key: str, text: str) -> str:
    # A commit looks like a W&B key.
    return text if key == GIT_COMMIT and _COMMIT.fullmatch(text) else redact_setting(key, text)


def _as_json(difference: ValueDifference) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return _without_secrets(difference.key, value)
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: value if name == "key" else plain(value) for name, value in asdict(difference).items()}
