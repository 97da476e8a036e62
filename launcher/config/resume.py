"""Which settings of a run may change when it is continued, and how."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from launcher.config.schema import RunConfig
from launcher.config.suggest import did_you_mean, known_keys
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
    problems = []
    for override in overrides:
        key, equals, raw = override.lstrip("+").partition("=")
        if not equals or key not in known_keys():
            problems.append(
                Problem(
                    f"{key}: there is no such setting",
                    where="command line",
                    remedy=did_you_mean(key, sorted(known_keys())) or "settings are written key=value",
                )
            )
        elif not key.startswith(CHANGEABLE):
            problems.append(
                Problem(
                    f"{key}: cannot change when a run is continued: it would be another run",
                    where="command line",
                    remedy=f"start a new run with it; what may change: {', '.join(k.rstrip('.') for k in CHANGEABLE)}",
                )
            )
        else:
            section, _, name = key.partition(".")
            values[section][name] = yaml.safe_load(raw)
            if key in ("train.max_steps", "train.epochs"):
                values["train"]["epochs" if key == "train.max_steps" else "max_steps"] = None
    if problems:
        raise ConfigError(problems)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            Problem(
                item["msg"].removeprefix("Value error, "), where=".".join(str(part) for part in item["loc"]) or "command line"
            )
            for item in error.errors(include_url=False)
        ) from None
