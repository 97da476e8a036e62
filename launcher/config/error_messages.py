"""Turns mistakes in settings, found by pydantic or Hydra, into problems: the key, its origin, the value, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.config.command_line import COMMAND_LINE
from launcher.config.origin import RUN_FILE_GROUP, Origins, yaml_nodes
from launcher.config.schema import as_yaml, leaves, settings, suggest_setting
from launcher.config.sections.train import ALLOWED_EXTRA, QGZ, QGZ_IS_WRONG
from launcher.errors import Problem, causes, did_you_mean
from launcher.security.redaction import looks_secret, redact, redact_setting
from launcher.shell_commands import short_path

_UNIFORM_KEY = re.compile(r"\[\d+\]")
_UNION_BRANCH = re.compile(r"\.(constrained-\w+|literal\[.*\]|int|float|str|bool|function-\S+)$")
EXTRA = "deepspeed.extra"
_TWO_VALUES = re.compile(r"Multiple values for (?P<group>[\w/]+)")
_IN_FILE = re.compile(r"[Ii]n '(?P<file>[\w/.-]+)'")


def list_schema_problems(
    error: ValidationError, origins: Origins, values: Mapping[str, Any], skip: set[str]
) -> Iterator[Problem]:
    """Yield one problem per key; `values` are the validated settings, `skip` has the keys that are already reported."""
    items = []
    for item in error.errors(include_url=False):
        # pydantic puts the kind of the cluster after `cluster`, and appends the branch of a union.
        location = ("cluster", *item["loc"][2:]) if item["loc"][:1] == ("cluster",) else item["loc"]
        parts = [f"[{part}]" if isinstance(part, int) else part for part in location if part != "[key]"]
        items.append((_UNION_BRANCH.sub("", ".".join(parts).replace(".[", "[")), item))
    reported: set[str] = set()
    for key, item in items:
        # A list with a bad item is also "too short", and a union reports each of its branches.
        if key in skip or key in reported or (item["type"] == "too_short" and any(k.startswith(f"{key}[") for k, _ in items)):
            continue
        reported.add(key)
        if item["type"] == "extra_forbidden":
            uniform, is_section = _UNIFORM_KEY.sub("[]", key), isinstance(item["input"], dict)
            message = f"{key}: there is no such {'section of settings' if is_section else 'setting'}"
            section = uniform.rpartition(".")[0]
            siblings = ", ".join(k for k in settings() if k.rpartition(".")[0] == section)
            if uniform in settings() and (kinds := settings()[uniform].kinds):
                group = uniform.split(".")[0]
                message = f"{key}: this setting only exists with {' and '.join(f'{group}={kind}' for kind in kinds)}"
                remedy = f"select {' or '.join(f'+{group}={kind}' for kind in kinds)}, or remove {key}"
            elif key == "experiment":
                remedy = "write `# @package _global_` as the first line of the experiment's file"
            elif section and siblings:
                remedy = suggest_setting(uniform) or f"the settings in this section are: {siblings}"
            else:
                remedy = suggest_setting(uniform) or f"write section.name=value; the sections are: {siblings}"
            yield Problem(message, where=origins.of(key), value=_format_scalar(key, item["input"]), remedy=remedy)
        elif item["type"] == "missing":
            yield make_missing_problem(key, origins)
        elif item["type"] == "union_tag_invalid":
            key, kind = f"{key}.kind", item["ctx"]["tag"]
            choices = settings()[key].type.split(" | ")
            remedy = f"{did_you_mean(kind, choices)} choose one of: {', '.join(choices)}".strip()
            yield Problem(f"{key}: is not one of its choices", origins.of(key), format_value(key, kind), remedy)
        elif item["type"] == "value_error":
            yield _make_rule_problem(key, item["msg"].removeprefix("Value error, "), origins, values)
        else:
            value, remedy = item["input"], _write_type_remedy(key)
            setting = settings().get(_UNIFORM_KEY.sub("[]", key))
            if setting is not None and item["type"] == "literal_error":
                guess = did_you_mean(str(value), setting.type.removesuffix(" or null").split(" | "))
                remedy = f"{guess} {remedy}".strip()
            if item["type"] == "string_type" and isinstance(value, int | float):
                text = f'"{str(value).lower()}"'
                remedy = f"quote it: {text} in a file, '{key}={text}' on the command line"
            yield Problem(f"{key}: {item['msg']}", where=origins.of(key), value=_format_scalar(key, value), remedy=remedy)


def make_missing_problem(key: str, origins: Origins) -> Problem:
    """Return the problem of a required setting that has no value."""
    section, _, name = key.rpartition(".")
    remedy = f"add {key}=... to the command line"
    if "]" in key:
        remedy = f"complete {section}: {name} is missing"
    elif origins.run_file is not None:
        remedy = f"write `{name}: ...` below `{section}:` in {short_path(origins.run_file.path)}, or {remedy}"
    return Problem(f"{key}: a value is required and none was given", where=origins.of(key), remedy=remedy)


def _write_type_remedy(key: str) -> str:
    # The description of a list or a mapping covers its entries.
    uniform = _UNIFORM_KEY.sub("[]", key)
    setting = max((s for s in settings().values() if uniform.startswith(s.key)), key=lambda s: len(s.key))
    return f"set {setting.key} to a value of the type: {setting.type}. {setting.meaning}"


def _make_rule_problem(key: str, text: str, origins: Origins, values: Mapping[str, Any]) -> Problem:
    """Return the problem for a validator's message, `what is wrong; the remedy`, which may name several settings."""
    message, _, remedy = text.partition("; ")
    scalars = dict(leaves(values))
    if "." in key:
        if key == "model.path" and Path(str(scalars.get(key))).is_dir():
            remedy = f"to use the folder of this name, write ./{scalars[key]}"
        value = format_value(key, scalars[key]) if key in scalars else ""
        return Problem(f"{key}: {message}", where=origins.of(key), value=value, remedy=remedy or _write_type_remedy(key))
    named = [k for k in settings() if "." in k and re.search(rf"(?<![\w.]){re.escape(k)}(?!\w)", text)]
    return Problem(
        message,
        where=", ".join(f"{k} ({where})" for k in named if (where := origins.of(k))),
        value=", ".join(f"{k}={format_value(k, scalars[k])}" for k in named if k in scalars),
        remedy=remedy,
    )


def format_value(key: str, value: Any) -> str:
    """Return a value in the form that errors show: without secrets, at most 200 characters."""
    text = repr(value) if isinstance(value, str) else as_yaml(value)
    return redact_setting(key, value, text)[:200]


def _format_scalar(key: str, value: Any) -> str:
    return "" if isinstance(value, dict | list) else format_value(key, value)


def find_extra_problems(values: Mapping[str, Any], origins: Origins, skip: Set[str] = frozenset()) -> Iterator[Problem]:
    """Yield a problem for each key of `deepspeed.extra` in unvalidated settings that is not allowed, unless `skip` has it."""
    section = values.get("deepspeed")
    extra = section.get("extra") if isinstance(section, dict) else None
    for name, value in leaves(extra) if isinstance(extra, dict) else ():
        key = f"{EXTRA}.{name}"
        if key not in skip and not re.match(rf"({'|'.join(ALLOWED_EXTRA)})($|[.\[])", name):
            close = difflib.get_close_matches(name, ALLOWED_EXTRA, n=1, cutoff=0.9)
            remedy = f"did you mean {close[0]}?" if close else f"remove it; these are accepted: {', '.join(ALLOWED_EXTRA)}"
            message = f"{key}: not accepted, because the plan or another setting decides it, or DeepSpeed has no such key"
            if name == QGZ:
                message = f"{key}: {QGZ_IS_WRONG}"
            yield Problem(message, origins.of(key), format_value(key, value), remedy)


def make_unknown_option_problem(group: str, option: str, options: Sequence[str], token: str) -> Problem:
    """Return the problem of an unknown option of a config group. The option may be meant as the path of a model or of rows."""
    close = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in options}.get(re.sub(r"[^a-z0-9]", "", option.lower()))
    guess = f"did you mean {close}?" if close else did_you_mean(option.lower(), options)
    remedy = f"{guess} choose one of: {', '.join(options)}".strip()
    if group in ("model", "data") and ("/" in option or ":" in option or "." in option or Path(option or "-").exists()):
        remedy = f"write {'data=jsonl ' if group == 'data' else ''}{group}.path={option}, or in a file `{group}: {{path: ...}}`"
    return Problem(f"{group}={option}: there is no such option", where=COMMAND_LINE, value=token, remedy=remedy)


def find_yaml_problems(error: BaseException) -> list[Problem]:
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
            where=f"{short_path(Path(mark.name))}:{mark.line + 1}:{mark.column + 1}",
            value="" if looks_secret(key.strip(), value.strip()) else line.strip(),
            remedy="correct this line or the one before it: a line is `key: value`, indented with spaces, and a key occurs once",
        )
    ]


def make_hydra_problem(error: Exception, tokens: Sequence[str], folders: Sequence[Path], run_file: Path | None) -> Problem:
    """Return the problem for an error in Hydra's composition of `tokens`, with `folders` in search order, and `run_file`."""
    text = redact(str(error)).strip()
    lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # If a line ends in a colon, the message is on the next line.
    message = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).replace("++", "")
    culprit = getattr(error, "override", None) or next((t for t in tokens if t.split("=")[0] not in ("", t) and t in text), "")
    if redact(culprit) != culprit:
        message = "this override cannot be parsed"
    group, _, option = (getattr(error, "missing_cfg_file", None) or "").partition("/")
    # The chosen files that name the unknown option, or the group with two options; else the file that Hydra names.
    chosen = [folder / f"{token.lstrip('+').replace('=', '/')}.yaml" for token in tokens for folder in folders]
    content = option or ((twice := _TWO_VALUES.search(text)) and f"/{twice['group']}:")
    files = [path for path in chosen if content and path.is_file() and content in path.read_text(errors="replace")]
    if not files and (named := _IN_FILE.search(text)):
        paths = (folder / f"{named['file'].removesuffix('.yaml')}.yaml" for folder in folders)
        files = [path for path in paths if path.is_file()]
    file = run_file if run_file is not None and f"{RUN_FILE_GROUP}/" in text else next(iter(files), None)
    where = COMMAND_LINE if file is None else short_path(file)
    if option and (options := getattr(error, "options", None)):
        problem = make_unknown_option_problem(group, option, options, f"{group}={option}")
        is_typed = any(token.lstrip("+") == f"{group}={option}" for token in tokens)
        return problem if is_typed else replace(problem, where=where)
    remedy = "see python -m launcher --help" if file is None else "correct this file; docs/settings.md has the settings"
    return Problem(f"Hydra cannot compose these settings: {message}", where, culprit.removeprefix("++"), remedy)


def find_broken_reference(file: Path) -> int:
    """Return the line of the first value with a reference that OmegaConf cannot parse; 0 without one."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    for _, line, value in yaml_nodes(file.read_text(errors="replace")):
        try:
            if value and "${" in value:
                parse(value)
        # Some thousands of nested references are too many for the parser.
        except (GrammarParseError, RecursionError):
            return line
    return 0
