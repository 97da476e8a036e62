"""Compose settings with Hydra into a `RunConfig`, and report all mistakes at once.

Hydra composes the files under conf/. Overrides of keys become `++key=value`, so that Hydra does not stop at the first unknown
key. The schema then reports all unknown keys, each with a suggestion.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.config.command_line import (
    FLAGS_WITH_VALUE,
    GROUPS,
    override_key,
    without_unknown_flags,
    without_unreadable_overrides,
)
from launcher.config.config_files import missing_keys
from launcher.config.deepspeed_keys import extra_problems
from launcher.config.error_messages import missing, no_such_option, schema_problems
from launcher.config.hydra_composition.call import call_hydra, extra_dirs
from launcher.config.hydra_composition.guard import READS_CREDENTIAL, read_credentials
from launcher.config.hydra_composition.location import RUN_FILE_GROUP
from launcher.config.introspect import leaves
from launcher.config.origin import Origins, located_problem
from launcher.config.run_file import reading
from launcher.config.run_file.hydra_layer import OVERRIDE
from launcher.config.run_file.implied_settings import name_model_after_path, needs_own_rows, settle_alternatives
from launcher.config.run_file.reading import FileContent
from launcher.config.run_file.tokens import split_run_files
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError, LauncherError, Problem
from launcher.security.credentials import environment_secrets
from launcher.security.redaction import LOGIN_IN_ADDRESS, has_login, has_secret_name, redact, secret_problem

# The remedy for secrets in settings.
IN_ENVIRONMENT = "put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong in settings"
# The remedies for refused references, by the error's reason.
_ADVICE = {READS_CREDENTIAL: f"write the value out if it is not a secret; {IN_ENVIRONMENT}"}


@dataclass(frozen=True)
class Composed:
    """The validated settings with their origins; `overrides` are the words of the command line, the run's file first."""

    config: RunConfig
    overrides: tuple[str, ...]
    origins: Origins

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add file and line of the settings to errors raised inside the block."""
        try:
            yield
        except LauncherError as error:
            raise type(error)(located_problem(problem, self.origins) for problem in error.problems) from error


def conf_dir() -> Path:
    """Return the folder of the config groups: in the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_hydra(tokens: Sequence[str], on_composed: Callable[[Composed], None], own_flags: Sequence[str] = ()) -> None:
    """Compose `tokens` (a command line without the verb) and call `on_composed` once, or once per job with `-m`.

    A word that names a run's file adds its settings. They take precedence over groups and experiments; overrides take precedence
    over them. With --cfg, --info and similar flags Hydra only prints, and nothing is called. `own_flags` are the verb's flags,
    which `tokens` no longer contains; they serve as suggestions for mistyped flags.
    Raises:
        ConfigError: with every mistake.
        FileNotFoundError: if the working directory was deleted.
        LauncherError: whatever `on_composed` raises.
    """
    # Hydra needs the working directory, but would not report that it was deleted.
    os.getcwd()
    files, words = split_run_files(tokens, FLAGS_WITH_VALUE)
    remaining, problems = without_unknown_flags(words, own_flags)
    remaining, unknown_options = _known_group_options(remaining)
    problems += unknown_options
    try:
        content, file_problems = _read_run_file(files, words)
    except ConfigError as error:
        # Without the file, other settings may only appear to be wrong.
        raise ConfigError([*problems, *error.problems]) from error
    problems += file_problems
    if needs_own_rows(words, () if content is None else content.choices):
        remaining.append("data=jsonl")
    failure: list[BaseException] = []

    def task(cfg: Any) -> None:
        # Hydra prints its own lines about any exception that passes through it, so this function raises none.
        if failure:
            return
        try:
            composed = _checked(cfg, content)
            if not problems:
                on_composed(composed)
        except ConfigError as error:
            problems.extend(error.problems)
        except BaseException as error:
            failure.append(error)

    try:
        call_hydra(task, remaining, content, conf_dir())
    except ConfigError as error:
        readable, unreadable = without_unreadable_overrides(remaining)
        problems += unreadable
        if unreadable:
            num_before = len(problems)
            # This finds the mistakes in the other overrides.
            with suppress(ConfigError):
                call_hydra(task, readable, content, conf_dir())
            keys = {override_key(token) for token in remaining if token not in readable}
            problems[num_before:] = [p for p in problems[num_before:] if p.message.partition(":")[0] not in keys]
        # Composition may fail only because of what was split off.
        elif not problems:
            problems.extend(error.problems)
    if problems:
        held = environment_secrets(os.environ)
        raise ConfigError(_without_secrets(problem, held) for problem in dict.fromkeys(problems))
    if failure:
        raise failure[0]


def require_distinct_runs(jobs: Sequence[Composed]) -> None:
    """Refuse a sweep in which two runs would have the same directory.

    Raises:
        ConfigError: with the name that they share.
    """
    names = Counter((job.config.run.root, job.config.run.name) for job in jobs if job.config.run.name is not None)
    shared = [(name, count) for (_, name), count in names.items() if name is not None and count > 1]
    if not shared:
        return
    name, count = shared[0]
    swept = set.symmetric_difference(*(set(job.overrides) for job in jobs[:2]))
    key = next((override_key(token) for token in sorted(swept) if "." in override_key(token)), "model.name")
    raise ConfigError(
        f"run.name={name}: {count} runs of this sweep would have the same name and directory",
        where=jobs[0].origins.of("run.name"),
        value=name,
        remedy=f"leave run.name unset, or make it differ, as in 'run.name={name}-${{{key}}}'",
    )


def _without_secrets(problem: Problem, held: Mapping[str, str]) -> Problem:
    return replace(problem, **{field.name: redact(getattr(problem, field.name), held) for field in fields(problem)})


def _known_group_options(tokens: list[str]) -> tuple[list[str], list[Problem]]:
    """Split off overrides with a group option that no config folder contains."""
    folders = [conf_dir(), *extra_dirs(tokens)]
    if any(t.lstrip("+").startswith("hydra.searchpath") for t in tokens) or not all(folder.is_dir() for folder in folders):
        # Hydra finds the options, or refuses the folder.
        return tokens, []
    remaining, problems = [], []
    for token in tokens:
        match = re.fullmatch(rf"\+{{0,2}}({'|'.join(GROUPS)})=([\w,./:@~-]*)", token)
        if not match:
            remaining.append(token)
            continue
        options = sorted({p.stem for folder in folders for p in (folder / match[1]).glob("*.yaml")})
        # An option may be in a subfolder of its group.
        files = {option: f"{match[1]}/{option}.yaml" for option in match[2].split(",") if option != "null"}
        unknown = [option for option, file in files.items() if not any((folder / file).is_file() for folder in folders)]
        if not unknown:
            remaining.append(token)
        problems += [no_such_option(match[1], option, options, token) for option in unknown]
    return remaining, problems


def _read_run_file(files: Sequence[str], tokens: Sequence[str]) -> tuple[FileContent | None, list[Problem]]:
    """Read the run's file of a command line, whose other words are `tokens`; return its content and its problems."""
    path = reading.the_only(files)
    if path is None:
        return None, []
    replaced = [group for group in GROUPS if any("=" in token and override_key(token) == group for token in tokens)]
    has_search_path = any(token.lstrip("+").startswith("hydra.searchpath") for token in tokens)
    return reading.read(path, replaced, [] if has_search_path else [conf_dir(), *extra_dirs(tokens)])


def _checked(cfg: Any, content: FileContent | None) -> Composed:
    """Validate one composed config together with the run's file `content`.

    Raises:
        ConfigError: with all problems of the config.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra_config = HydraConfig.get()
    # Unresolved, because the text of an override such as a=${b} is not one of Hydra's references.
    tokens: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    overrides = tuple(str(token).removeprefix("++") for token in tokens if token != OVERRIDE)
    file = None if content is None else content.file
    file_keys = () if file is None else file.keys
    origins = Origins(
        overrides=overrides,
        choices={group: option for group, option in hydra_config.runtime.choices.items() if group != RUN_FILE_GROUP},
        folders=tuple(Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path),
        run_file=file,
    )
    OmegaConf.set_readonly(cfg, False)
    replaced = settle_alternatives(cfg, origins)
    unresolved = dict(leaves(OmegaConf.to_container(cfg, resolve=False)))
    absent = [key for key, value in unresolved.items() if value == "???"]
    for key in absent:
        # References to the missing value must resolve, so that the other mistakes are reported too.
        OmegaConf.update(cfg, key, "./missing")
    values = {str(k): v for k, v in _resolved(cfg, unresolved, origins).items()}
    name_model_after_path(values, {*map(override_key, overrides), *file_keys})
    absent += [key for key in missing_keys(origins) if key in unresolved and key not in (*absent, *replaced)]
    scalars = list(leaves(values))
    held = environment_secrets(os.environ)
    secrets = {key: reason for key, value in scalars if (reason := secret_problem(key, value, held)) is not None}
    targets = [key for key, _ in scalars if "_target_" in key.split(".")]
    problems = [missing(key, origins) for key in absent]
    if has_secret_name(values, held):
        message = "the name of a setting looks like a secret (a token, key or password); it is not shown"
        problems.append(Problem(message, where="the settings, or a reference in them", remedy=IN_ENVIRONMENT))
    if not secrets and (read := read_credentials()):
        message, remedy = f"{', '.join(read)}: {READS_CREDENTIAL}", _ADVICE[READS_CREDENTIAL]
        problems.append(Problem(message, where="a reference in the settings", remedy=remedy))
    problems += [Problem(reason, where=origins.of(key), remedy=IN_ENVIRONMENT) for key, reason in secrets.items()]
    problems += [
        Problem(f"{key}: a setting must not name code to run; nothing was called", where=origins.of(key), remedy=f"remove {key}")
        for key in targets
    ]
    reported = {*absent, *secrets, *targets}
    problems += extra_problems(values, origins, skip=reported)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += schema_problems(error, origins, values, skip=reported)
    # Settings that take addresses have their own messages.
    logins = [key for key, value in scalars if has_login(value) and not any(p.message.startswith(key) for p in problems)]
    problems += [Problem(f"{key}: {LOGIN_IN_ADDRESS}", where=origins.of(key), remedy=IN_ENVIRONMENT) for key in logins]
    if problems:
        raise ConfigError(problems)
    return Composed(config, overrides if file is None else (str(file.path), *overrides), origins)


def _resolved(cfg: Any, unresolved: Mapping[str, Any], origins: Origins) -> dict[Any, Any]:
    """Return the settings with their references resolved; `unresolved` are their values before."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        raw = OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        advice = next(
            (text for mark, text in _ADVICE.items() if mark in str(error)), "write the key of a setting between ${ and }"
        )
        raise ConfigError(
            f"{key}: the reference in this value cannot be resolved: {str(error).splitlines()[0]}",
            where=origins.written_at(key),
            remedy=advice,
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError("the configuration is not a mapping", where="conf/config.yaml")
    return raw
