"""The verb init: write a starter file that fits the data, the model and the machine, and print what to run next."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import facts
from launcher.cli.arguments import COMMON_FLAGS, VerbParser
from launcher.cli.starting.starter_settings import StarterSettings, apply_changes, fit_settings, list_chosen
from launcher.cli.views.starter_file import next_lines, starter_text
from launcher.clusters.backends import cluster_for
from launcher.config.command_line import SUFFIXES, override_key
from launcher.config.compose import Composed, compose_one, conf_dir
from launcher.config.known_settings import leaves
from launcher.config.run_file import values_to_print
from launcher.config.schema import RunConfig
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.config.sections.model import is_local_path, is_run
from launcher.errors import ConfigError, LauncherError
from launcher.models.found_model import find_model
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import plan as make_plan
from launcher.security.redaction import REDACTED


def run(verb: str, tokens: list[str]) -> int:
    """Write the file, or refuse with the reason; nothing is overwritten."""
    arguments, rest = _parser().parse_known_args(tokens)
    data = arguments.data or _rows_of(rest)
    out = Path(arguments.out or f"{_name_of(data)}.yaml")
    _require_free(out)
    composed = _with_name(_compose(arguments.model, arguments.data, rest), out)
    with composed.located():
        starter = fit_settings(composed, data)
    values = _values(starter, composed)
    text = starter_text(starter.head, values, starter.reasons)
    plan = _require_plan(text, out)
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    hidden = [key for key, value in leaves(values) if REDACTED in str(value)]
    warnings = [*starter.warnings, *(f"{key} looks like a credential: {out} has {REDACTED} in its place" for key in hidden)]
    remarks_on_data = [*(f"assumed: {text}" for text in starter.assumptions), *(f"warning: {text}" for text in warnings)]
    print("\n".join(next_lines(out, starter.config, starter.machines, remarks_on_data, plan)))
    return 0


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="python -m launcher init",
        usage="%(prog)s [--data FILE] [--model NAME] [--out FILE] [overrides]",
        description="Write a commented file of settings that fits the data, the model and this machine or +cluster=..., and "
        "print the commands that use it. Nothing is overwritten or started.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", metavar="FILE", help="a file, folder, pattern or Hub dataset with your rows (default: a demo)")
    parser.add_argument("--model", metavar="NAME", help="a preset, a folder, a Hub id or run:NAME (default: a demo)")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: named after the data)")
    return parser


def _rows_of(overrides: Sequence[str]) -> str | None:
    """Return the rows that overrides name, as --data would."""
    paths = [token.partition("=")[2].strip("'\"") for token in overrides if override_key(token) == "data.path"]
    return paths[-1] if paths else None


def _name_of(data: str | None) -> str:
    last = (data or "run").rstrip("/").rpartition("/")[2]
    while Path(last).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".zst"):
        last = Path(last).stem
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "run"


def _require_free(out: Path) -> None:
    """Refuse to overwrite a file, to write to a missing folder, or to use a name that no command accepts as a run's file.

    Raises:
        ConfigError: with the reason.
    """
    problem = ""
    if not out.name.endswith(SUFFIXES):
        problem = f"a file of settings must end in {' or '.join(SUFFIXES)}"
    elif out.exists() or out.is_symlink():
        problem = "the file exists, and init overwrites nothing"
    elif not out.parent.is_dir():
        problem = "the folder of the file does not exist"
    if problem:
        raise ConfigError(problem, where="--out", value=str(out), remedy="name another file with --out")


def _compose(model: str | None, data: str | None, rest: Sequence[str]) -> Composed:
    """Return the settings for model, data and overrides.

    Raises:
        ConfigError: with what is wrong in them.
    """
    tokens = [_model_token(model)] if model else []
    tokens += ["data=jsonl", f"data.path={_quoted(data)}"] if data else []
    keys = [override_key(token) for token in rest]
    if "data.path" in keys and "data" not in keys and not data:
        tokens.append("data=jsonl")
    return compose_one([*tokens, *rest], ("--data", "--model", "--out", *COMMON_FLAGS))


def _with_name(composed: Composed, out: Path) -> Composed:
    """Return the settings with a run name taken from the file, if every machine must find the same run."""
    config = composed.config
    if not config.cluster.runs_on_every_node or config.run.name is not None:
        return composed
    return replace(composed, config=apply_changes(config, {"run.name": _name_of(out.stem)}))


def _model_token(model: str) -> str:
    if Path(model).is_dir() and "/" not in model:
        model = f"./{model}"
    is_source = is_local_path(model) or is_run(model) or HUB_ID_PATTERN.fullmatch(model) or ":" in model
    return f"model.path={_quoted(model)}" if is_source else f"model={model}"


def _quoted(value: str) -> str:
    """Return a value in Hydra's syntax: quoted if it has characters that are not allowed in names."""
    if re.fullmatch(r"[\w./:@-]+", value):
        return value
    # `${` begins a reference.
    escaped = value.replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _values(starter: StarterSettings, composed: Composed) -> dict[str, Any]:
    """Return the file's content: what differs from the options, and everything that has a reason."""
    values = values_to_print(starter.config, conf_dir())
    dumped = starter.config.model_dump(mode="json")
    # The names of the data and the model are already in their sections.
    for key in (*starter.reasons, *list_chosen(composed)):
        section, _, name = key.partition(".")
        content = values.setdefault(section, {} if name else dumped[section].get("kind", {}))
        if name and not isinstance(content, dict):
            content = values[section] = {"base": content}
        if name and name not in content:
            content[name] = dumped[section][name]
    for section, content in values.items():
        if isinstance(content, dict) and list(content) == ["base"]:
            values[section] = content["base"]
    return values


def _require_plan(text: str, out: Path) -> LaunchPlan | None:
    """Reject what `plan` would reject, before the file is written; returns the plan, or None for a model that is not known yet.

    Raises:
        LauncherError: with the problems.
    """
    config = _compose_text(text, out)
    node = cluster_for(config.cluster.kind).device(config.cluster)
    config = facts.resolve(config, lambda: node)
    found = find_model(config.model)
    if not found.is_config_known:
        return None
    try:
        return make_plan(config, facts.gather(config, found, (), node))
    except LauncherError as error:
        raise type(error)(
            replace(problem, remedy=f"{problem.remedy}; or add overrides to init, such as cluster.nodes=2")
            for problem in error.problems
        ) from error


def _compose_text(text: str, out: Path) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / out.name
        file.write_text(text, encoding="utf-8")
        return compose_one([str(file)]).config
