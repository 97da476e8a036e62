"""The words of a command line: files, flags, overrides, and mistakes in them. Every verb imports this: imports are light."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from launcher.errors import Problem

COMMAND_LINE = "command line"
GROUPS = ("model", "data", "objective", "optim", "deepspeed", "cluster", "tracking", "experiment")
# Hydra's flags: a sweep, and a folder of the user's own options.
_SWEEP = ("--multirun", "-m")
_CONFIG_DIR = ("--config-dir", "-cd")
# Values of data.path and data.sources that name nothing to read.
_NO_ROWS = ("", "null", "[]")
# Endings of a run's file, and of files of rows. A .json file may be either.
SUFFIXES = (".yaml", ".yml")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt", ".gz", ".zst")


def conf_dir() -> Path:
    """Return the folder of the config groups: in the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def list_options(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Return the names of the options of each group in these folders; one that cannot be read has none."""
    options: dict[str, list[str]] = {}
    for folder in folders:
        with suppress(OSError):
            for group in sorted(path for path in folder.expanduser().iterdir() if path.is_dir()):
                options.setdefault(group.name, []).extend(sorted(path.stem for path in group.glob("*.yaml")))
    return {group: names for group, names in options.items() if names}


def is_run_file(word: str) -> bool:
    """Return whether a word names a file: by its ending, or because it exists; reading it refuses pipes and files of rows."""
    if not word or "=" in word or word.startswith(("-", "+", "~")):
        return False
    return word.endswith((*SUFFIXES, *ROW_SUFFIXES)) or (os.path.exists(word) and not os.path.isdir(word))


def names_rows_only(overrides: Sequence[str], file_choices: Collection[str]) -> bool:
    """Return whether a command line names rows, but neither it nor a run's file (`file_choices`) an option that reads them."""
    values = {override_key(word): word.partition("=")[2] for word in overrides if not word.startswith("~")}
    if {"data", "experiment"} & {*values, *file_choices}:
        return False
    return any(values.get(key, "") not in _NO_ROWS for key in ("data.path", "data.sources"))


def split_words(tokens: Sequence[str], own_flags: Sequence[str]) -> tuple[list[str], list[str], list[str], list[Problem]]:
    """Return the run's files, Hydra's flags, the overrides, and the problems of flags, for which `own_flags` are suggested."""
    import difflib

    from launcher.config.schema import find_meant_setting, settings
    from launcher.security.redaction import looks_secret
    from launcher.shell_commands import launcher_command

    files: list[str] = []
    flags: list[str] = []
    overrides: list[str] = []
    problems: list[Problem] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if name.lstrip("+~").startswith("hydra.") and not name.endswith("searchpath"):
            problems.append(Problem(f"{name}: Hydra only composes settings here", COMMAND_LINE, remedy="remove it"))
            continue
        if not token.startswith("-"):
            (files if is_run_file(token) else overrides).append(token)
            continue
        if name in _SWEEP:
            flags.append(token)
            continue
        takes_value = name in _CONFIG_DIR
        may_be_value = rest and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~"))
        if not equals and may_be_value and (takes_value or not is_run_file(rest[0])):
            value = rest.pop(0)
        if takes_value:
            if value and Path(value).is_dir():
                flags += [name, value]
                continue
            remedy = f"write {name} followed by a folder with config groups"
            problems.append(Problem(f"{name}: there is no such folder", COMMAND_LINE, value, remedy))
            continue
        key = name.lstrip("-").replace("-", "_")
        same = [option for option in settings() if option.rpartition(".")[2] == key and "[]" not in option]
        meant = key if key in (*GROUPS, *settings()) else find_meant_setting(key) or " or ".join(same[:3])
        if value.endswith(SUFFIXES):
            remedy = f"a file of settings is named without a flag: {launcher_command('train', value)}"
        elif meant:
            remedy = f"settings are written without dashes: {meant.replace(' or ', '=... or ')}=..."
        else:
            known = [flag for flag in (*own_flags, *_SWEEP, *_CONFIG_DIR) if flag.startswith("--")]
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "settings are written key=value; --help lists the flags"
        shown = "" if looks_secret(key, value) else f"{name} {value}".strip()
        problems.append(Problem(f"there is no flag {name}", where=COMMAND_LINE, value=shown, remedy=remedy))
    return files, flags, overrides, problems


def is_sweep(flags: Sequence[str]) -> bool:
    """Return whether the flags request one job for each combination of the listed values."""
    return not {*_SWEEP}.isdisjoint(flags)


def find_unreadable_overrides(overrides: Sequence[str], has_multirun: bool) -> list[Problem]:
    """Return the problems of overrides that Hydra cannot parse and, without -m, of those that list the values of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from launcher.config.schema import settings, suggest_setting
    from launcher.security.redaction import looks_secret

    parser = OverridesParser.create()
    problems: list[Problem] = []
    for token in overrides:
        key, equals, value = token.partition("=")
        name = key.lstrip("+").strip()
        if not equals and not token.startswith("~"):
            remedy = suggest_setting(token) or "write key=value or group=option, without spaces around ="
            problems.append(Problem(f"{token}: is not an override, because it has no =", COMMAND_LINE, token, remedy))
            continue
        try:
            is_list = parser.parse_override(token).is_sweep_override()
        # The parser raises several kinds of exceptions.
        except Exception:
            is_list = None
        if is_list is False or (is_list and has_multirun):
            continue
        message = f"{name}: the value has characters that Hydra reads as its own syntax"
        remedy = "write key=value or group=option; in lists and mappings, quote texts and close every bracket"
        if is_list:
            message = f"{name}: the commas make this a list of values to try, and the flag -m is missing"
            remedy = "add -m for one run per value"
        is_secret = looks_secret(name, value)
        if is_list and name in settings() and settings()[name].type.startswith(("list", "[")):
            remedy = f"{remedy}; for a list, write '{key}=[{value.strip('()[] ')}]'"
        elif name and name not in GROUPS:
            text = "TEXT" if is_secret or set(value) & set("\"'\\$") else value
            quoted = f"one text, quote it twice, for the shell and for Hydra: '{key}=\"{text}\"'"
            remedy = f"{remedy}; for {quoted}" if is_list else f"for {quoted}"
        problems.append(Problem(message, COMMAND_LINE, "" if is_secret else token, remedy))
    return problems


def override_key(token: str) -> str:
    """Return the key of an override, without its leading signs."""
    return token.partition("=")[0].lstrip("+~")


def config_dirs(tokens: Sequence[str]) -> Iterator[Path]:
    """Yield the folders that --config-dir names."""
    for i, token in enumerate(tokens):
        if token in _CONFIG_DIR and i + 1 < len(tokens):
            yield Path(tokens[i + 1])
        elif token.startswith("--config-dir="):
            yield Path(token.split("=", 1)[1])
