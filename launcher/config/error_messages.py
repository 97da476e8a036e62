"""Converts errors of pydantic and Hydra to problems: the key, its origin, the value as typed, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.config.hydra_composition.location import locate_hydra_error
from launcher.config.introspect import Setting, as_yaml, settings
from launcher.config.origin import Origins, short
from launcher.config.suggestions import suggest_setting
from launcher.errors import Problem, causes, did_you_mean
from launcher.security.redaction import looks_secret, redact, redact_setting

_ABSENT = object()
_UNIFORM_KEY = re.compile(r"\[\d+\]")


def schema_problems(error: ValidationError, origins: Origins, values: Mapping[str, Any], skip: set[str]) -> Iterator[Problem]:
    """Yield one problem per key; `values` are the validated settings, `skip` has the keys that are already reported."""
    reported: set[str] = set()
    items = [(_key_of(item["loc"]), item) for item in error.errors(include_url=False)]
    for key, item in items:
        # A list with a bad item is also "too short", and a union reports each of its branches.
        if key in skip or key in reported or (item["type"] == "too_short" and any(k.startswith(f"{key}[") for k, _ in items)):
            continue
        reported.add(key)
        setting = settings().get(_UNIFORM_KEY.sub("[]", key))
        if item["type"] == "extra_forbidden":
            yield _unknown(key, item["input"], origins)
        elif item["type"] == "missing":
            yield missing(key, origins)
        elif item["type"] == "union_tag_invalid":
            yield _unknown_kind(f"{key}.kind", item["ctx"]["tag"], origins)
        elif item["type"] == "value_error":
            yield _by_rule(key, item["msg"].removeprefix("Value error, "), origins, values)
        else:
            yield _by_type(key, setting, item, origins)


def missing(key: str, origins: Origins) -> Problem:
    """Return the problem of a required setting that has no value."""
    section, _, name = key.rpartition(".")
    remedy = f"add {key}=... to the command line"
    if "]" in key:
        remedy = f"complete {section}: {name} is missing"
    elif origins.run_file is not None:
        remedy = f"write `{name}: ...` below `{section}:` in {short(origins.run_file.path)}, or {remedy}"
    return Problem(f"{key}: a value is required and none was given", where=origins.of(key), remedy=remedy)


def _give(key: str) -> str:
    # The description of a list or a mapping covers its entries.
    uniform = _UNIFORM_KEY.sub("[]", key)
    setting = max((s for s in settings().values() if uniform.startswith(s.key)), key=lambda s: len(s.key))
    return f"set {setting.key} to a value of the type: {setting.type}. {setting.meaning}"


def _unknown(key: str, value: Any, origins: Origins) -> Problem:
    uniform = _UNIFORM_KEY.sub("[]", key)
    elsewhere = settings().get(uniform)
    section = uniform.rpartition(".")[0]
    siblings = ", ".join(k for k in settings() if k.rpartition(".")[0] == section)
    message = f"{key}: there is no such {'section of settings' if isinstance(value, dict) else 'setting'}"
    if elsewhere is not None and elsewhere.kinds:
        group = uniform.split(".")[0]
        message = f"{key}: this setting only exists with {' and '.join(f'{group}={kind}' for kind in elsewhere.kinds)}"
        remedy = f"select {' or '.join(f'+{group}={kind}' for kind in elsewhere.kinds)}, or remove {key}"
    elif key == "experiment":
        remedy = "write `# @package _global_` as the first line of the experiment's file"
    elif section and siblings:
        remedy = suggest_setting(uniform) or f"the settings in this section are: {siblings}"
    else:
        remedy = suggest_setting(uniform) or f"write section.name=value; the sections are: {siblings}"
    return Problem(message, where=origins.of(key), value=_plain(key, value), remedy=remedy)


def _unknown_kind(key: str, kind: str, origins: Origins) -> Problem:
    choices = settings()[key].type.split(" | ")
    remedy = f"{did_you_mean(kind, choices)} choose one of: {', '.join(choices)}".strip()
    return Problem(f"{key}: is not one of its choices", where=origins.of(key), value=shown(key, kind), remedy=remedy)


def _by_rule(key: str, text: str, origins: Origins, values: Mapping[str, Any]) -> Problem:
    """Return the problem for a validator's message, `what is wrong; the remedy`, which may name several settings."""
    message, _, remedy = text.partition("; ")
    if "." in key:
        value = _value_of(key, values)
        text = "" if value is _ABSENT else _plain(key, value)
        if key == "model.path" and isinstance(value, str) and Path(value).is_dir():
            remedy = f"to use the folder of this name, write ./{value}"
        return Problem(f"{key}: {message}", where=origins.of(key), value=text, remedy=remedy or _give(key))
    named = [k for k in settings() if "." in k and re.search(rf"(?<![\w.]){re.escape(k)}(?!\w)", text)]
    origin = {k: origins.of(k) for k in named}
    shown_values = {k: _plain(k, value) for k in named if (value := _value_of(k, values)) is not _ABSENT}
    return Problem(
        message,
        where=", ".join(f"{k} ({where})" for k, where in origin.items() if where),
        value=", ".join(f"{k}={value}" for k, value in shown_values.items() if value),
        remedy=remedy,
    )


def _by_type(key: str, setting: Setting | None, item: Mapping[str, Any], origins: Origins) -> Problem:
    value, remedy = item["input"], _give(key)
    if setting is not None and item["type"] == "literal_error":
        guess = did_you_mean(str(value), setting.type.removesuffix(" or null").split(" | "))
        remedy = f"{guess} {remedy}".strip()
    if item["type"] == "string_type" and isinstance(value, int | float):
        text = f'"{str(value).lower()}"'
        remedy = f"quote it: {text} in a file, '{key}={text}' on the command line"
    return Problem(f"{key}: {item['msg']}", where=origins.of(key), value=_plain(key, value), remedy=remedy)


def shown(key: str, value: Any) -> str:
    """Return a value in the form that errors show: without secrets, at most 200 characters."""
    text = repr(value) if isinstance(value, str) else as_yaml(value)
    return redact_setting(key, value, text)[:200]


def _plain(key: str, value: Any) -> str:
    return "" if isinstance(value, dict | list) else shown(key, value)


def _value_of(key: str, values: Any) -> Any:
    for part in re.split(r"[.\[]", key.replace("]", "")):
        if isinstance(values, dict):
            values = values.get(part, _ABSENT)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return _ABSENT
    return values


def _key_of(location: tuple[int | str, ...]) -> str:
    if location[:1] == ("cluster",) and len(location) > 1:
        # pydantic puts the kind of the cluster after `cluster`.
        location = ("cluster", *location[2:])
    parts = [f"[{part}]" if isinstance(part, int) else part for part in location if part != "[key]"]
    key = ".".join(parts).replace(".[", "[")
    # pydantic appends the branch of a union to the location.
    return re.sub(r"\.(constrained-\w+|literal\[.*\]|int|float|str|bool|function-\S+)$", "", key)


def no_such_option(group: str, option: str, options: Sequence[str], token: str) -> Problem:
    """Return the problem of an unknown option of a config group. The option may be meant as the path of a model or of rows."""
    close = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in options}.get(re.sub(r"[^a-z0-9]", "", option.lower()))
    guess = f"did you mean {close}?" if close else did_you_mean(option.lower(), options)
    remedy = f"{guess} choose one of: {', '.join(options)}".strip()
    if group in ("model", "data") and ("/" in option or ":" in option or "." in option or Path(option or "-").exists()):
        remedy = f"write {'data=jsonl ' if group == 'data' else ''}{group}.path={option}, or in a file `{group}: {{path: ...}}`"
    return Problem(f"{group}={option}: there is no such option", where="command line", value=token, remedy=remedy)


def yaml_problems(error: BaseException) -> list[Problem]:
    """Return the problem of a file that is not valid YAML, from the error or its causes; empty for any other error."""
    import yaml

    cause = next((cause for cause in causes(error) if isinstance(cause, yaml.MarkedYAMLError)), None)
    mark = cause.problem_mark if cause is not None else None
    if cause is None or mark is None or not Path(mark.name).is_file():
        return []
    lines = Path(mark.name).read_text(errors="replace").splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    key, _, value = line.partition(":")
    return [
        Problem(
            f"the file is not valid YAML: {', '.join(filter(None, (cause.context, cause.problem)))}",
            where=f"{short(Path(mark.name))}:{mark.line + 1}:{mark.column + 1}",
            value="" if looks_secret(key.strip(), value.strip()) else line.strip(),
            remedy="correct this line or the one before it: a line is `key: value`, indented with spaces, and a key occurs once",
        )
    ]


def hydra_problems(
    error: Exception, tokens: Sequence[str], folders: Sequence[Path], run_file: Path | None = None
) -> list[Problem]:
    """Return the problems for an error in Hydra's composition, without the `++` that the launcher added.

    `folders` hold the composed files, in search order; `run_file` is composed with them.
    """
    return yaml_problems(error) or [_hydra_problem(error, tokens, folders, run_file)]


def _hydra_problem(error: Exception, tokens: Sequence[str], folders: Sequence[Path], run_file: Path | None) -> Problem:
    text = redact(str(error)).strip()
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # If a line ends in a colon, the message is on the next line.
    message = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).replace("++", "")
    if folder := re.search(r"Additional config directory '(.+)' not found", text):
        return Problem("--config-dir: there is no such folder", "command line", folder[1], "name a folder with config groups")
    culprit = getattr(error, "override", None) or next((t for t in tokens if t.split("=")[0] not in ("", t) and t in text), "")
    if redact(culprit) != culprit:
        message = "this override cannot be parsed"
    group, _, option = (getattr(error, "missing_cfg_file", None) or "").partition("/")
    location = locate_hydra_error(error, tokens, folders, run_file)
    if option and (options := getattr(error, "options", None)):
        problem = no_such_option(group, option, options, f"{group}={option}")
        is_typed = any(token.lstrip("+") == f"{group}={option}" for token in tokens)
        return problem if is_typed or location is None else replace(problem, where=location.where, value=location.line)
    if location is None:
        remedy = "see python -m launcher --help"
        return Problem(f"Hydra cannot compose these settings: {message}", "command line", culprit.removeprefix("++"), remedy)
    value = "" if redact(location.line) != location.line else location.line
    remedy = location.remedy or "correct this line; docs/settings.md shows how files are composed"
    return Problem(f"Hydra cannot compose these settings: {location.message or message}", location.where, value, remedy)
