"""Handles words of a command line that are not overrides or that Hydra cannot parse: what was meant, and how to write it."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from launcher.config.introspect import settings
from launcher.config.origin import COMMAND_LINE
from launcher.config.run_file.tokens import SUFFIXES
from launcher.config.suggestions import conversion, meant_setting, suggest_setting
from launcher.errors import Problem
from launcher.security.redaction import looks_secret
from launcher.shell_commands import launcher_command

GROUPS = ("model", "data", "optim", "deepspeed", "cluster", "tracking", "experiment")
# Hydra's flags that take a value, and its other flags.
FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--info", "-i"),
    *("--package", "-p"),
)
_FLAGS = ("--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--shell-completion", "-sc")
# Flags of other programs for a settings file; here the file is one of the words of the command line.
_FILE_FLAGS = ("--config", "--config-file", "--file", "-f")
_RERUN = "--experimental-rerun"
_MULTIRUN = {"--multirun", "-m"}
# The values of --cfg, its default first.
_CFG = ("job", "hydra", "all")
_OVERRIDE = re.compile(r"(?P<prefix>\+{0,2})(?P<key>[^=]*)=(?P<value>.*)", re.DOTALL)


def flags_first(tokens: Sequence[str]) -> list[str]:
    """Return the tokens with Hydra's flags before the overrides, as its parser requires, and flags without their value last."""
    flags: list[str] = []
    overrides: list[str] = []
    bare: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            overrides.append(token)
            continue
        if token not in FLAGS_WITH_VALUE:
            flags.append(token)
        elif rest and "=" not in rest[0] and not rest[0].startswith("-"):
            flags += [token, rest.pop(0)]
        else:
            bare.append(token)
    return [*flags, *overrides, *bare]


def without_unknown_flags(tokens: Sequence[str], own_flags: Sequence[str] = ()) -> tuple[list[str], list[Problem]]:
    """Split off flags that neither Hydra nor the command knows; `own_flags` are the command's flags, for suggestions."""
    remaining: list[str] = []
    problems: list[Problem] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if not token.startswith("-") or name in _FLAGS:
            remaining.append(token)
            continue
        has_next = bool(rest) and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~"))
        if name == _RERUN:
            remedy = "write the settings, or continue a run with: python -m launcher resume RUN"
            problems.append(Problem(f"{name}: Hydra would load a pickle, which can run code", COMMAND_LINE, token, remedy))
            rest = rest[1:] if not equals and has_next else rest
        elif name in FLAGS_WITH_VALUE:
            if not equals and has_next:
                value = rest.pop(0)
            if problem := _flag_without_value(name, value):
                problems.append(problem)
            else:
                remaining += [name, value] if value else [name]
        elif name in _FILE_FLAGS:
            problems.append(_file_with_flag(name, value))
        elif setting := _setting_meant(name):
            if not equals and has_next:
                value = rest.pop(0)
            problems.append(_setting_with_dashes(name, setting, value))
        else:
            problems.append(_unknown_flag(name, own_flags))
    return remaining, problems


def _flag_without_value(name: str, value: str) -> Problem | None:
    if value.endswith(SUFFIXES):
        return _file_with_flag(name, value)
    if name in ("--cfg", "-c") and value not in _CFG:
        guess = difflib.get_close_matches(value, _CFG, n=1)
        usual = (guess or _CFG)[0]
        return Problem(f"{name} prints one of {', '.join(_CFG)}", where=COMMAND_LINE, value=value, remedy=f"write {name} {usual}")
    if value or name in ("--info", "-i"):
        return None
    return Problem(f"{name} needs a value", where=COMMAND_LINE, remedy=f"write {name} followed by its value")


def _file_with_flag(name: str, file: str) -> Problem:
    remedy = f"write: {launcher_command('train', file)}; the same for plan and data"
    return Problem(f"{name}: a file of settings is named without a flag", COMMAND_LINE, f"{name} {file}".strip(), remedy)


def _setting_meant(name: str) -> str:
    """Return the setting or group that a flag such as --model or --max-steps names; several are joined with ` or `."""
    key = name.lstrip("-").replace("-", "_")
    if not name.startswith("--") or key in GROUPS or key in settings():
        return key if name.startswith("--") else ""
    same = [option for option in settings() if option.rpartition(".")[2] == key and "[]" not in option]
    # In other trainers, batch_size means the training batch size.
    return meant_setting(key) or " or ".join(same[:3])


def _setting_with_dashes(name: str, setting: str, value: str) -> Problem:
    if looks_secret(setting, value):
        value = ""
    if name == "--dry-run":
        remedy = f"{launcher_command('plan')} with the same words shows everything and starts nothing"
        return Problem("there is no flag --dry-run here", where=COMMAND_LINE, value=name, remedy=remedy)
    written = " or ".join(shlex.quote(f"{key}={value}") if value else f"{key}=..." for key in setting.split(" or "))
    return Problem(
        f"{name}: settings are written without dashes",
        where=COMMAND_LINE,
        value=f"{name} {value}".strip(),
        remedy=suggest_setting(name) if conversion(name) else f"write {written}",
    )


def _unknown_flag(name: str, own_flags: Sequence[str]) -> Problem:
    known = [*own_flags, *_FLAGS, *FLAGS_WITH_VALUE]
    matches = difflib.get_close_matches(name, [flag for flag in known if flag.startswith("--")], n=1)
    guess = f"did you mean {matches[0]}?" if matches else "settings are written key=value;"
    return Problem(f"there is no flag {name}", where=COMMAND_LINE, value=name, remedy=f"{guess} --help lists the flags")


def without_unreadable_overrides(tokens: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Split off overrides that Hydra cannot parse and, without -m, overrides that list the values of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    has_multirun = bool(_MULTIRUN & set(tokens))
    remaining: list[str] = []
    problems: list[Problem] = []
    rest = list(tokens)
    previous = ""
    while rest:
        token = rest.pop(0)
        if token.startswith("-"):
            remaining.append(token)
            if token in FLAGS_WITH_VALUE and rest and "=" not in rest[0]:
                remaining.append(rest.pop(0))
            continue
        if rest and "=" not in token and rest[0].startswith("="):
            token += rest.pop(0)
            token += rest.pop(0) if token.endswith("=") and rest else ""
            problems.append(_with_spaces(token))
        elif problem := _override_problem(parser, token, previous, has_multirun):
            problems.append(problem)
        else:
            remaining.append(token)
        previous = token
    return remaining, problems


def _override_problem(parser: Any, token: str, previous: str, has_multirun: bool) -> Problem | None:
    match = _OVERRIDE.fullmatch(token)
    if match is None:
        return None if token.startswith("~") else _bare_word(parser, token, previous)
    key, value = match["key"], match["value"]
    if not key or key != key.strip():
        return _with_spaces(f"{key.strip()}={value.strip()}")
    try:
        is_sweep = parser.parse_override(token).is_sweep_override()
    # The parser raises several kinds of exceptions.
    except Exception:
        return _unparsed(parser, match, has_multirun)
    if not is_sweep or has_multirun:
        return None
    text = _as_one_value(parser, match["prefix"] + key, value)
    one_value = f"; for one value with commas, write {text}" if text else ""
    return Problem(
        f"{key}: the commas make this a list of values to try, and the flag -m is missing",
        where=COMMAND_LINE,
        value=token,
        remedy=f"add -m for one run per value{one_value}",
    )


def _with_spaces(token: str) -> Problem:
    """Return the problem of an override with spaces around its =, or without a key; `token` is the text without the spaces."""
    key, _, value = token.partition("=")
    remedy = f"write {shlex.quote(token)}" if key and not looks_secret(key, value) else "write key=value"
    return Problem("an override needs a key before its =, and no spaces around it", where=COMMAND_LINE, remedy=remedy)


def override_key(token: str) -> str:
    """Return the key of an override, without its leading signs."""
    return token.partition("=")[0].lstrip("+~")


def _unparsed(parser: Any, match: re.Match[str], has_multirun: bool) -> Problem:
    key, value = match["key"], match["value"]
    if looks_secret(key, value):
        remedy = "put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong in settings"
        return Problem(f"{key}: looks like a secret (a token, key or password); its value is not shown", COMMAND_LINE, "", remedy)
    if value.lstrip().startswith(("[", "{")):
        return Problem(
            f"{key}: Hydra cannot parse this list or mapping",
            where=COMMAND_LINE,
            value=match[0],
            remedy="close every bracket; inside, quote texts with characters other than letters, digits and . _ - / :, "
            "as in 'data.sources=[{name: a, path: \"~/rows (1).jsonl\"}]'",
        )
    if value.count("${") > value.count("}"):
        remedy = "close each ${ with a }, as in 'run.name=run-${optim.lr}'"
        return Problem(f"{key}: a reference in this value is not closed", COMMAND_LINE, match[0], remedy)
    if has_multirun and "," in value:
        remedy = f"quote the values of the sweep one by one, as in '{key}=a,\"~/b (1)\"'"
        return Problem(f"{key}: a value has characters that Hydra reads as its own syntax", COMMAND_LINE, match[0], remedy)
    if words := _several(match[0]):
        message = f"{key}: the value contains further overrides"
        return Problem(message, COMMAND_LINE, match[0], f"write each as a separate word: {words}")
    text = _as_one_value(parser, match["prefix"] + key, value)
    if key in GROUPS:
        remedy = "write group=option"
    elif _takes_text(key):
        remedy = f"quote it twice, for the shell and for Hydra: {text}" if text else "write key=value or group=option"
    else:
        remedy = f"write {text}" if text else f"write {key}=VALUE with a value of the type: {settings()[key].type}"
    return Problem(f"{key}: the value has characters that Hydra reads as its own syntax", COMMAND_LINE, match[0], remedy)


def _several(token: str) -> str:
    """Return the overrides that a single shell word contains, as several words; empty if it contains one."""
    words = token.split()
    keys = [word.partition("=")[0].lstrip("+~") for word in words if "=" in word]
    return shlex.join(words) if len(words) == len(keys) > 1 and all(key in settings() or key in GROUPS for key in keys) else ""


def _takes_text(key: str) -> bool:
    """Return whether the setting accepts any text as its value; a key that does not exist may stand for such a setting."""
    kind = settings()[key].type if key in settings() else "text"
    return any(name in kind.split() for name in ("text", "name")) and not kind.startswith("list")


def _as_one_value(parser: Any, key: str, value: str) -> str:
    """Return an override in shell syntax, so that Hydra takes its value as one value; empty if quotes do not help."""
    name = key.lstrip("+")
    if name in GROUPS:
        return ""
    if _takes_text(name):
        return quoted(parser, key, value)
    items = value.strip("()[] ")
    is_list = settings()[name].type.startswith(("list", "["))
    return shlex.quote(f"{key}=[{items}]") if is_list and re.fullmatch(r"[\w., /@-]+", items) else ""


def _bare_word(parser: Any, word: str, previous: str) -> Problem:
    name, _, rest = word.partition(":")
    if name in settings() or name in GROUPS:
        remedy = f"write {name}={'...' if looks_secret(name, rest) else rest or '...'}"
    elif (match := _OVERRIDE.fullmatch(previous)) and not match["value"]:
        remedy = f"write {shlex.quote(previous + word)}"
    elif match is not None and match["key"] not in GROUPS:
        text = quoted(parser, match["prefix"] + match["key"], f"{match['value']} {word}")
        is_secret = looks_secret(match["key"], match["value"])
        remedy = "write key=value or group=option"
        remedy += f"; if it belongs to the value before it: {text}" if text and not is_secret else ""
    else:
        remedy = suggest_setting(word) or "write key=value or group=option"
    return Problem(f"{word}: is not an override, because it has no =", where=COMMAND_LINE, value=word, remedy=remedy)


def quoted(parser: Any, key: str, value: str) -> str:
    """Return an override in shell syntax, quoted so that Hydra takes `value` as one text; empty if that is impossible."""
    for mark in ('"', "'"):
        # A backslash escapes only a quotation mark; backslashes directly before one are doubled.
        inner = re.sub(rf"(\\*)({mark}|$)", lambda match: match[1] * 2 + ("\\" + match[2] if match[2] else ""), value)
        text = f"{key}={mark}{inner}{mark}"
        try:
            if parser.parse_override(text).value() == value:
                return shlex.quote(text)
        # The parser raises several kinds of exceptions.
        except Exception:  # noqa: S112
            continue
    return ""
