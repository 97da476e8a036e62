"""The settings that may change on resume, those that may change with --force, and the text of their differences."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.config.command_line import COMMAND_LINE
from launcher.config.compose import IN_ENVIRONMENT
from launcher.config.error_messages import find_extra_problems, format_value, list_schema_problems
from launcher.config.origin import Origins
from launcher.config.schema import RunConfig, leaves, settings, suggest_setting
from launcher.errors import ConfigError, Problem
from launcher.security.redaction import LOGIN_IN_ADDRESS, environment_secrets, has_login, redact, secret_problem
from launcher.shell_commands import launcher_command

# Settings that may change freely on resume.
CHANGEABLE = (
    "train.max_steps",
    "train.epochs",
    "train.largest_batch_first",
    "train.proof",
    "eval.",
    "evaluate.",
    "checkpoint.",
    "export.",
    "data.workers",
    "data.cache_group",
    "run.max_hours",
    "run.max_usd",
    "model.activation_checkpointing",
    "cluster.",
    "tracking.",
    "run.confirm_usd",
    "train.micro_batch_size",
    "model.attention",
    "model.liger",
    "model.compile",
    "optim.lr",
    "deepspeed.",
)

# Settings that cannot change: the checkpoint has the parameters of one architecture, the run has one directory, and its records
# belong to one backend. Keys below `plan.` are numbers that the plan recorded.
FIXED = (
    *("run.name", "run.root", "model.path", "model.revision", "model.tokenizer", "model.init", "model.config", "plan.model"),
    "cluster.kind",
)
ABSENT = "-"
_MISSING = object()


@dataclass(frozen=True)
class Difference:
    """A setting that differs from the one in the checkpoint; the values are in the form that errors show."""

    key: str
    saved: str
    requested: str

    @property
    def is_fixed(self) -> bool:
        """True for a setting that not even --force can change."""
        return _is_one_of(self.key, FIXED)


def differences(saved: RunConfig, requested: RunConfig) -> list[Difference]:
    """Return the settings that differ and may not change freely, in schema order."""
    changed = differing(saved.model_dump(mode="json"), requested.model_dump(mode="json"))
    return [difference for difference in changed if difference.is_fixed or not _is_one_of(difference.key, CHANGEABLE)]


def differing(saved: Mapping[str, Any], requested: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Return the leaves of two nested mappings that differ, with their keys below `prefix`."""
    before, after = dict(leaves(dict(saved), prefix)), dict(leaves(dict(requested), prefix))
    return [
        Difference(key, *(format_value(key, values[key]) if key in values else ABSENT for values in (before, after)))
        for key in dict.fromkeys((*before, *after))
        if before.get(key, _MISSING) != after.get(key, _MISSING)
    ]


def table(changes: Sequence[Difference], before: str = "checkpoint") -> str:
    """Return one line per difference: the key, the value in the checkpoint (or in `before`), and the requested value."""
    rows = [("", before, "requested"), *((d.key, d.saved, d.requested) for d in changes)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {key:<{widths[0]}}  {saved:<{widths[1]}}  {requested}".rstrip() for key, saved, requested in rows)


def require_same(changes: Sequence[Difference], force: bool, run: Path, checkpoint: str, remedy: str = "") -> None:
    """Refuse all differences that would make it another run, in one ConfigError; `force` accepts those that are not FIXED.

    `remedy` replaces the usual remedy for the differences that --force accepts.
    """
    problems = []
    if fixed_changes := [difference for difference in changes if difference.is_fixed]:
        problems.append(
            Problem(
                f"these settings cannot change when a run is resumed, not even with --force:\n{table(fixed_changes)}",
                where=checkpoint,
                remedy="remove them, or start another run with these weights: "
                f"{launcher_command(f'model.path=run:{run.name}')} ...",
            )
        )
    if not force and (other_changes := [difference for difference in changes if not difference.is_fixed]):
        problems.append(
            Problem(
                f"these settings differ from those that the checkpoint was saved with:\n{table(other_changes)}",
                where=checkpoint,
                remedy=remedy or "remove them, start another run with them, or add --force to accept the differences",
            )
        )
    if problems:
        raise ConfigError(problems)


def _is_one_of(key: str, keys: Sequence[str]) -> bool:
    return any(key.startswith(k) if k.endswith(".") else key == k or key.startswith((f"{k}.", f"{k}[")) for k in keys)


def with_overrides(config: RunConfig, overrides: Sequence[str], run_name: str = "NAME") -> RunConfig:
    """Return `config` with `key=value` overrides, even those that a resume does not allow. Raises ConfigError."""
    import yaml

    values = config.model_dump(mode="json")
    held = environment_secrets(os.environ)
    problems: list[Problem] = []
    for override in overrides:
        key, equals, raw = override.lstrip("+").partition("=")
        if equals and key in (*RunConfig.model_fields, "experiment"):
            fresh = launcher_command(f"model.path=run:{run_name}")
            remedy = f"write each setting that changes; another model needs another run: {fresh} ..."
            problems.append(_make_problem(f"{key}={raw}: a resume changes single settings, not a whole group", remedy))
        elif not equals or key not in settings():
            guess = suggest_setting(key)
            problems.append(_make_problem(f"{key}: there is no such setting", guess or "write settings as key=value"))
        else:
            section, _, name = key.partition(".")
            try:
                value = yaml.safe_load(raw)
            except yaml.YAMLError:
                problems.append(_make_problem(f"{key}: the value is not valid YAML", "write the value in YAML", value=raw))
                continue
            secrets = []
            for leaf, content in leaves(value, key):
                login = f"{leaf}: {LOGIN_IN_ADDRESS}" if has_login(content) else None
                if message := secret_problem(leaf, content, held) or login:
                    secrets.append(_make_problem(message, IN_ENVIRONMENT))
            problems += secrets
            if not secrets:
                if key == "data.path" and (before := values["data"]["path"]) is not None:
                    # The entry of data.sources that data.path abbreviates changes with it.
                    for source in values["data"]["sources"]:
                        source["path"] = value if source["path"] == before else source["path"]
                values[section][name] = value
            if key in ("train.max_steps", "train.epochs") and value is not None:
                values["train"]["epochs" if key == "train.max_steps" else "max_steps"] = None
    origins = Origins(overrides=tuple(overrides), choices={}, folders=())
    if any(override.lstrip("+").startswith("deepspeed.") for override in overrides):
        problems += find_extra_problems(values, origins)
    try:
        changed = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += list_schema_problems(error, origins, values, skip=set())
    if problems:
        raise ConfigError(problems)
    return changed


def _make_problem(message: str, remedy: str, value: str = "") -> Problem:
    return Problem(redact(message), where=COMMAND_LINE, value=redact(value), remedy=remedy)
