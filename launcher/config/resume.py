"""Which settings of a run may change when it is continued, and how."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from launcher.config.compose import leaves
from launcher.config.origin import Origins
from launcher.config.problems import schema_problems
from launcher.config.schema import RunConfig
from launcher.config.secret import looks_secret, redact
from launcher.config.settings import settings
from launcher.config.suggest import did_you_mean
from launcher.errors import ConfigError, Problem

# What may change without changing what the run is: how long, how often, where, and where it is told.
CHANGEABLE = (
    "train.max_steps",
    "train.epochs",
    "train.micro_batch_size",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.log_every",
    "train.sample",
    "train.sample_max_tokens",
    "train.export",
    "train.mirror",
    "train.loss_chunk_tokens",
    "run.max_hours",
    "run.max_usd",
    "model.attention",
    "model.activation_checkpointing",
    "model.liger",
    "optim.lr",
    "cluster.",
    "deepspeed.",
    "tracking.",
)


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `key=value` overrides applied.

    Raises:
        ConfigError: for a key that does not exist or that would make it another run.
    """
    import yaml

    values = config.model_dump(mode="json")
    problems: list[Problem] = []
    for override in overrides:
        key, equals, raw = override.lstrip("+").partition("=")
        if not equals or key not in settings():
            guess = did_you_mean(key, list(settings()))
            problems.append(_problem(f"{key}: there is no such setting", guess or "settings are written key=value"))
        elif looks_secret(key, raw):
            problems.append(_secret(key))
        elif not key.startswith(CHANGEABLE):
            changeable = ", ".join(f"{k}*" if k.endswith(".") else k for k in CHANGEABLE)
            remedy = f"start another run with it; what may change: {changeable}"
            problems.append(_problem(f"{key}: cannot change when a run is continued", remedy))
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
                values[section][name] = value
            if key in ("train.max_steps", "train.epochs"):
                values["train"]["epochs" if key == "train.max_steps" else "max_steps"] = None
    try:
        changed = RunConfig.model_validate(values)
    except ValidationError as error:
        origins = Origins(overrides=tuple(overrides), choices={}, folders=())
        problems += schema_problems(error, origins, values, skip=set())
    if problems:
        raise ConfigError(problems)
    return changed


def _secret(key: str) -> Problem:
    remedy = "put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong in settings"
    return _problem(f"{key}: looks like a secret (a token, key or password); its value is not shown", remedy)


def _problem(what: str, remedy: str, value: str = "") -> Problem:
    return Problem(redact(what), where="command line", value=redact(value), remedy=remedy)
