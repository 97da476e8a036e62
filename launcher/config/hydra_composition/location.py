"""Finds the file and line of an error in Hydra's composition: Hydra names at most the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.origin import nodes, short
from launcher.errors import causes

# The group in which Hydra composes a run's file.
RUN_FILE_GROUP = "run_file"
_IN_FILE = re.compile(r"[Ii]n '(?P<file>[\w/.-]+)'")
_GROUP_CHOICE = re.compile(r"\+{0,2}(?P<group>[A-Za-z_][\w/]*)=(?P<option>[\w/.-]+)")
_TWO_VALUES = re.compile(r"Multiple values for (?P<group>[\w/]+)")


@dataclass(frozen=True)
class Location:
    """`where` is file:line, `line` its text; `message` and `remedy` are empty if Hydra's own message is sufficient."""

    where: str
    line: str
    message: str = ""
    remedy: str = ""


def locate_hydra_error(
    error: Exception, tokens: Sequence[str], folders: Sequence[Path], run_file: Path | None = None
) -> Location | None:
    """Return the line that an error is about; None if it is not in a file that the command line selects.

    `tokens` are the overrides, `folders` hold the config files; `run_file` is composed with them.
    """
    text = "\n".join(str(cause) for cause in causes(error))
    if run_file is not None and f"{RUN_FILE_GROUP}/" in text:
        return _location(run_file, _line_of(run_file, error, text))
    chosen = [match for token in tokens if (match := _GROUP_CHOICE.fullmatch(token))]
    files = [file for match in chosen if (file := _file(f"{match['group']}/{match['option']}", folders)) is not None]
    missing = str(getattr(error, "missing_cfg_file", None) or "")
    two_values = _TWO_VALUES.search(text)
    group = two_values["group"] if two_values else missing.partition("/")[0]
    for file in files:
        if line := broken_reference(file):
            message = "a reference in this value is not written as Hydra reads it"
            return _location(file, line, message, "write ${section.name}, with a } for each ${")
        if group and (line := _matching_line(file, rf"^\s*-\s*(override\s+)?/?{re.escape(group)}\s*:")):
            return _location(file, line)
    if (named := _IN_FILE.search(text)) and (file := _file(named["file"], folders)) is not None:
        return _location(file, _line_of(file, error, text.replace(named[0], "")))
    return None


def _file(name: str, folders: Sequence[Path]) -> Path | None:
    return next((file for folder in folders if (file := folder / f"{name.removesuffix('.yaml')}.yaml").is_file()), None)


def _location(file: Path, line: int, message: str = "", remedy: str = "") -> Location:
    lines = file.read_text(errors="replace").splitlines()
    text = lines[line - 1].strip() if line <= len(lines) else ""
    return Location(f"{short(file)}:{line}", text, message, remedy)


def _line_of(file: Path, error: Exception, text: str) -> int:
    """Return the line with a name that the error quotes, or with the key that it is about; otherwise the first content line."""
    keys = [str(key) for cause in causes(error) if (key := getattr(cause, "full_key", None))]
    for key, line, _ in nodes(file.read_text(errors="replace"), with_sections=True):
        if key in keys:
            return line
    for name in re.findall(r"'([\w/.-]+)'", text):
        if line := _matching_line(file, rf"(?<![\w-]){re.escape(name.rpartition('/')[2])}(?![\w-])"):
            return line
    return _matching_line(file, r"^defaults\s*:") or _matching_line(file, r"^[^#\s]") or 1


def broken_reference(file: Path) -> int:
    """Return the line of the first value with a reference that OmegaConf cannot parse; 0 without one."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    for _, line, value in nodes(file.read_text(errors="replace")):
        try:
            if value and "${" in value:
                parse(value)
        # Some thousands of nested references are too many for the parser.
        except (GrammarParseError, RecursionError):
            return line
    return 0


def _matching_line(file: Path, pattern: str) -> int:
    """Return the number of the first line that matches; 0 without one."""
    lines = file.read_text(errors="replace").splitlines()
    return next((number for number, line in enumerate(lines, start=1) if re.search(pattern, line)), 0)
