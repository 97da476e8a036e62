"""Hydra in, `RunConfig` out, every mistake in one pass.

Hydra composes the files under conf/. Overrides on keys are passed on as `++key=value`, so that Hydra never
stops at the first unknown key: the schema finds them all, with the key that was probably meant.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.config.origin import Origins
from launcher.config.schema import RunConfig
from launcher.config.suggest import did_you_mean, known_keys
from launcher.errors import ConfigError, Problem

GROUPS = ("model", "data", "optim", "deepspeed", "cluster", "tracking", "experiment")
_GROUP_WITH_PLUS = re.compile(rf"\+{{1,2}}({'|'.join(GROUPS)})=")
_KEY_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w.\[\]-]*)=")

# A value of one of these forms is a credential, wherever it stands.
_SECRET = re.compile(
    r"(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}"
    r"|wandb_v\d+_\w{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+|-----BEGIN [A-Z ]*PRIVATE KEY)"
)
_HEX_KEY = re.compile(r"[0-9a-f]{40}")
_SECRET_KEY = re.compile(r"(^|[._])(api_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


@dataclass(frozen=True)
class Composed:
    """The checked settings and where they came from."""

    config: RunConfig
    overrides: tuple[str, ...]


def conf_dir() -> Path:
    """The folder of the config groups: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_hydra(tokens: Sequence[str], on_composed: Callable[[Composed], None]) -> None:
    """Compose `tokens` (a command line without the verb) and call back once, or once per job with `-m`.

    With --cfg, --info and the like Hydra prints what was asked for and nothing is called back.

    Raises:
        ConfigError: with every mistake that was found.
    """
    remaining, problems = _known_group_options(list(tokens))
    failure: list[BaseException] = []

    def task(cfg: Any) -> None:
        # Hydra prints its own lines about an exception that passes through it, so none does.
        if failure:
            return
        try:
            composed = _checked(cfg)
            if not problems:
                on_composed(composed)
        except ConfigError as error:
            problems.extend(error.problems)
        except BaseException as error:
            failure.append(error)

    try:
        _call_hydra(task, [_for_hydra(token) for token in remaining])
    except ConfigError as error:
        # Composition without an unknown group option may fail for that reason alone: the first mistake counts.
        if not problems:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    if failure:
        raise failure[0]


def _call_hydra(task: Callable[[Any], None], argv: list[str]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["launcher", *argv], "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_problem(error, argv)) from error
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("Hydra could not read the command line", remedy="see python -m launcher --help") from stop
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


def strip_group_plus(token: str) -> str:
    """`+cluster=slurm` means `cluster=slurm`: our groups stand in the defaults list already."""
    return token.lstrip("+") if _GROUP_WITH_PLUS.match(token) else token


def _for_hydra(token: str) -> str:
    token = strip_group_plus(token)
    match = _KEY_OVERRIDE.match(token)
    if not match or match[2] in GROUPS or match[2].startswith("hydra"):
        return token
    return f"++{match[2]}={token[match.end() :]}"


def _known_group_options(tokens: list[str]) -> tuple[list[str], list[Problem]]:
    """Split off overrides that name a group option which exists in no config folder."""
    folders = [conf_dir(), *_extra_dirs(tokens)]
    if any(t.lstrip("+").startswith("hydra.searchpath") for t in tokens):
        return tokens, []
    remaining, problems = [], []
    for token in tokens:
        match = re.fullmatch(rf"\+{{0,2}}({'|'.join(GROUPS)})=([\w,./-]+)", token)
        if not match:
            remaining.append(token)
            continue
        options = sorted({p.stem for folder in folders for p in (folder / match[1]).glob("*.yaml")})
        unknown = [option for option in match[2].split(",") if option not in options and "/" not in option and option != "null"]
        if not unknown:
            remaining.append(token)
        for option in unknown:
            guess = did_you_mean(option, options)
            problems.append(
                Problem(
                    f"{match[1]}={option}: there is no such option",
                    where="command line",
                    value=redact(token),
                    remedy=f"{guess}choose one of: {', '.join(options)}",
                )
            )
    return remaining, problems


def _extra_dirs(tokens: Sequence[str]) -> Iterator[Path]:
    for i, token in enumerate(tokens):
        if token in ("--config-dir", "-cd") and i + 1 < len(tokens):
            yield Path(tokens[i + 1])
        elif token.startswith("--config-dir="):
            yield Path(token.split("=", 1)[1])


def _checked(cfg: Any) -> Composed:
    """Validate one composed config; raise ConfigError with all of its problems."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra_config = HydraConfig.get()
    overrides = tuple(_user_form(o) for o in hydra_config.overrides.task)
    origins = Origins(
        overrides=overrides,
        choices=dict(hydra_config.runtime.choices),
        folders=tuple(Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path),
    )
    OmegaConf.set_readonly(cfg, False)
    missing = [key for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)) if value == "???"]
    for key in missing:
        # Whatever refers to the missing value must still resolve for the other mistakes to be found.
        OmegaConf.update(cfg, key, "./missing")
    values = {str(k): v for k, v in _resolved(cfg).items()}
    _let_the_command_line_choose_the_length(values, overrides)
    secrets = [key for key, value in _leaves(values) if looks_secret(key, value)]
    problems = [
        Problem(
            f"{key}: a value is required and none was given", where=origins.of(key), remedy=f"add {key}=... to the command line"
        )
        for key in missing
    ]
    problems += [
        Problem(
            f"{key}: looks like a secret (a token, key or password); its value is not shown",
            where=origins.of(key),
            remedy="put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong into settings",
        )
        for key in secrets
    ]
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _schema_problems(error, origins, skip={*missing, *secrets})
    if problems:
        raise ConfigError(problems)
    return Composed(config, overrides)


def _resolved(cfg: Any) -> dict[Any, Any]:
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(raw, dict):
        raise ConfigError("the configuration is not a mapping", where="conf/config.yaml")
    return raw


def _let_the_command_line_choose_the_length(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Setting one of train.max_steps and train.epochs on the command line unsets the files' choice of the other."""
    given = {o.split("=", 1)[0].lstrip("+") for o in overrides}
    steps, epochs = "train.max_steps" in given, "train.epochs" in given
    train = values.get("train")
    if isinstance(train, dict) and steps != epochs:
        chosen, other = ("max_steps", "epochs") if steps else ("epochs", "max_steps")
        if train.get(chosen) is not None:
            train[other] = None


def _schema_problems(error: ValidationError, origins: Origins, skip: set[str]) -> Iterator[Problem]:
    keys = known_keys()
    seen: set[str] = set()
    items = [(_key_of(item["loc"]), item) for item in error.errors(include_url=False)]
    for key, item in items:
        # One problem a key: a list with a bad item is also "too short", a union reports each of its branches.
        if key in skip or key in seen or (item["type"] == "too_short" and any(k.startswith(f"{key}[") for k, _ in items)):
            continue
        seen.add(key)
        value = "" if isinstance(item["input"], dict | list) else _shown(key, item["input"])
        where = origins.of(key)
        if item["type"] == "extra_forbidden":
            siblings = sorted(k for k in keys if k.rpartition(".")[0] == re.sub(r"\[\d+\]", "[]", key).rpartition(".")[0])
            guess = did_you_mean(key, sorted(keys)) or (f"known here: {', '.join(siblings)}" if siblings else "")
            yield Problem(
                f"{key}: there is no such setting",
                where=where,
                value=value,
                remedy=guess.strip() or "docs/config.md lists every setting",
            )
        elif item["type"] == "missing":
            yield Problem(
                f"{key}: a value is required and none was given", where=where, remedy=f"add {key}=... to the command line"
            )
        else:
            text = item["msg"].removeprefix("Value error, ")
            text = text[:1].lower() + text[1:]
            what = text if not key or key in GROUPS else f"{key}: {text}"
            remedy = keys.get(re.sub(r"\[\d+\]", "[]", key), "")
            yield Problem(what, where=where, value=value, remedy=f"meaning: {remedy}" if remedy else "")


def _key_of(location: tuple[int | str, ...]) -> str:
    key = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in location).replace(".[", "[")
    # pydantic appends the branch of a union to the location; the user knows only the key.
    return re.sub(r"\.(constrained-\w+|literal\[.*\]|int|float|str|bool|function-\S+)$", "", key)


def _hydra_problem(error: Exception, tokens: Sequence[str]) -> Problem:
    text = redact(str(error)).strip()
    first = text.splitlines()[0].replace("++", "") if text else type(error).__name__
    culprit = _user_form(next((t for t in tokens if t.split("=")[0] and t in text), ""))
    return Problem(
        f"Hydra cannot compose these settings: {first}",
        where="command line" if culprit else "",
        value=redact(culprit),
        remedy="quote values that hold spaces, commas, brackets or '=' twice, as in 'run.name=\"a b\"'; see python -m launcher --help",
    )


def _user_form(override: str) -> str:
    return override[2:] if override.startswith("++") else override


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _leaves(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{key}[{i}]")
    else:
        yield key, value


def looks_secret(key: str, value: Any) -> bool:
    """True where a string has the form of a credential, or stands under a key that names one."""
    if not isinstance(value, str) or not value:
        return False
    if _SECRET.search(value) or (_HEX_KEY.fullmatch(value) and key != "model.revision"):
        return True
    return bool(_SECRET_KEY.search(key)) and len(value) >= 8


def redact(text: str) -> str:
    """`text` with everything that has the form of a credential replaced."""
    text = _SECRET.sub("<redacted>", text)
    return re.sub(rf"(?<!revision=)\b{_HEX_KEY.pattern}\b", "<redacted>", text)


def _shown(key: str, value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return "<redacted>" if looks_secret(key, value) else redact(text)[:200]
