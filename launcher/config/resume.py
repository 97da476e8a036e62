"""Which settings of a run may change when it is continued, which may with --force, and how a difference is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from launcher.config.compose import leaves
from launcher.config.deepspeed_keys import extra_problems
from launcher.config.error_messages import schema_problems, shown
from launcher.config.introspect import settings
from launcher.config.origin import Origins
from launcher.config.redaction import looks_secret, redact
from launcher.config.renamed_keys import renamed_override
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError, Problem, did_you_mean

# What changes nothing that a step computes: how long, how often, where, and where it is told.
WITHOUT_EFFECT = (
    "train.max_steps",
    "train.epochs",
    "train.log_every",
    "eval.",
    "checkpoint.",
    "export.",
    "data.workers",
    "run.max_hours",
    "run.max_usd",
    "model.activation_checkpointing",
    "cluster.",
    "tracking.",
)

# What may change without changing what the run is.
CHANGEABLE = (
    *WITHOUT_EFFECT,
    "train.micro_batch_size",
    "train.loss_chunk_tokens",
    "model.attention",
    "model.liger",
    "optim.lr",
    "deepspeed.",
)

# What cannot change: the checkpoint has the parameters of one architecture, and the run lies where it lies. What starts with
# `plan.` are numbers that the plan recorded.
FIXED = ("run.name", "run.root", "model.path", "model.revision", "model.tokenizer", "model.init", "model.config", "plan.model")
ABSENT = "-"
_NOWHERE = object()


@dataclass(frozen=True)
class Difference:
    """A value that is not what the checkpoint was saved with; values are as an error may show them."""

    key: str
    saved: str
    asked: str

    @property
    def is_fixed(self) -> bool:
        return _is_one_of(self.key, FIXED)


def differences(saved: RunConfig, asked: RunConfig) -> list[Difference]:
    """The settings that may not change freely and differ, key by key in the schema's order."""
    found = differing(saved.model_dump(mode="json"), asked.model_dump(mode="json"))
    return [difference for difference in found if not _is_one_of(difference.key, CHANGEABLE)]


def computes_alike(before: RunConfig, after: RunConfig) -> bool:
    """Whether a step has the same result under both, but for the learning rate of a schedule over another number of steps."""
    found = differing(before.model_dump(mode="json"), after.model_dump(mode="json"))
    return all(_is_one_of(difference.key, WITHOUT_EFFECT) for difference in found)


def differing(saved: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """The leaves of two nested mappings that differ, under their keys below `prefix`."""
    before, after = dict(leaves(dict(saved), prefix)), dict(leaves(dict(asked), prefix))
    return [
        Difference(key, *(shown(key, side[key]) if key in side else ABSENT for side in (before, after)))
        for key in dict.fromkeys((*before, *after))
        if before.get(key, _NOWHERE) != after.get(key, _NOWHERE)
    ]


def table(found: Sequence[Difference]) -> str:
    """A line for each difference: key, the checkpoint's value, the asked one."""
    rows = [("", "checkpoint", "asked for"), *((d.key, d.saved, d.asked) for d in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {key:<{widths[0]}}  {saved:<{widths[1]}}  {asked}".rstrip() for key, saved, asked in rows)


def require_same(found: Sequence[Difference], force: bool, run: str, checkpoint: str) -> None:
    """Refuse what makes it another run, all of it at once; `force` accepts what is not FIXED.

    Raises:
        ConfigError: with the differences key by key.
    """
    problems = []
    if fixed := [difference for difference in found if difference.is_fixed]:
        problems.append(
            Problem(
                f"this cannot change when a run is continued, not with --force either:\n{table(fixed)}",
                where=checkpoint,
                remedy=f"take it out, or start another run with these weights: python -m launcher model.path=run:{run} ...",
            )
        )
    if not force and (free := [difference for difference in found if not difference.is_fixed]):
        problems.append(
            Problem(
                f"this differs from what the checkpoint was saved with:\n{table(free)}",
                where=checkpoint,
                remedy="take it out, start another run with it, or accept the difference: resume RUN --force ...",
            )
        )
    if problems:
        raise ConfigError(problems)


def _is_one_of(key: str, known: Sequence[str]) -> bool:
    return any(key.startswith(k) if k.endswith(".") else key == k or key.startswith((f"{k}.", f"{k}[")) for k in known)


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `key=value` overrides applied, whether or not a run may be continued with them.

    Raises:
        ConfigError: for a key that does not exist or a value that cannot be.
    """
    import yaml

    values = config.model_dump(mode="json")
    problems: list[Problem] = []
    for override in overrides:
        key, equals, raw = override.lstrip("+").partition("=")
        if renamed := renamed_override(override):
            problems.append(renamed)
        elif not equals or key not in settings():
            guess = did_you_mean(key, list(settings()))
            problems.append(_problem(f"{key}: there is no such setting", guess or "settings are written key=value"))
        elif looks_secret(key, raw):
            problems.append(_secret(key))
        else:
            section, _, name = key.partition(".")
            try:
                value = yaml.safe_load(raw)
            except yaml.YAMLError:
                problems.append(_problem(f"{key}: the value cannot be read", "write it as in YAML", value=raw))
                continue
            secrets = [_secret(leaf) for leaf, found in leaves(value, key) if looks_secret(leaf, found)]
            problems += secrets
            if not secrets:
                if key == "data.path":
                    _follow_data_path(values["data"], value)
                values[section][name] = value
            if key in ("train.max_steps", "train.epochs"):
                values["train"]["epochs" if key == "train.max_steps" else "max_steps"] = None
    origins = Origins(overrides=tuple(overrides), choices={}, folders=())
    if any(override.lstrip("+").startswith("deepspeed.") for override in overrides):
        problems += extra_problems(values, origins)
    try:
        changed = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += schema_problems(error, origins, values, skip=set())
    if problems:
        raise ConfigError(problems)
    return changed


def _follow_data_path(data: dict[str, Any], path: Any) -> None:
    """The entry of data.sources that data.path is a shorthand for changes with it."""
    for source in data["sources"]:
        if data["path"] is not None and source["path"] == data["path"]:
            source["path"] = path


def _secret(key: str) -> Problem:
    remedy = "put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong in settings"
    return _problem(f"{key}: looks like a secret (a token, key or password); its value is not shown", remedy)


def _problem(what: str, remedy: str, value: str = "") -> Problem:
    return Problem(redact(what), where="command line", value=redact(value), remedy=remedy)
