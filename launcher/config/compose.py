"""Compose settings with Hydra into a `RunConfig`, and report all mistakes at once.

Hydra composes the files under conf/. Overrides of keys become `++key=value`, so that Hydra does not stop at the first unknown
key. The schema then reports all unknown keys, each with a suggestion.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from launcher.config.deepspeed_keys import extra_problems
from launcher.config.error_messages import missing, schema_problems
from launcher.config.hydra_composition.call import call_hydra, extra_dirs
from launcher.config.hydra_composition.guard import READS_CREDENTIAL
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
from launcher.security.redaction import LOGIN_IN_ADDRESS, has_login, redact, secret_problem

# The remedy for secrets in settings.
IN_ENVIRONMENT = "put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong in settings"


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

    removed: set[str] = set()
    # Hydra stops at the first mistake: without the overrides in question, it finds the others.
    while True:
        try:
            call_hydra(task, remaining, content, conf_dir())
            break
        except ConfigError as error:
            readable, found = without_unreadable_overrides(remaining)
            if not found:
                named = {problem.value for problem in error.problems}
                readable = [token for token in remaining if token.lstrip("+") not in named]
                # Composition may fail only because of what was removed.
                found = list(error.problems) if not problems or len(readable) < len(remaining) else []
            problems += found
            if len(readable) == len(remaining):
                break
            removed |= {override_key(token) for token in remaining if token not in readable}
            first_later, remaining = len(problems), readable
    if removed:
        problems[first_later:] = [p for p in problems[first_later:] if p.message.partition(":")[0] not in removed]
    if problems:
        held = environment_secrets(os.environ)
        raise ConfigError(_without_secrets(problem, held) for problem in dict.fromkeys(problems))
    if failure:
        raise failure[0]


def compose_one(tokens: Sequence[str], own_flags: Sequence[str] = ()) -> Composed:
    """Compose a command line for one run.

    Raises:
        ConfigError: with the mistakes in it, or if it is for several runs.
    """
    jobs: list[Composed] = []
    run_hydra(tokens, jobs.append, own_flags)
    if len(jobs) != 1:
        remedy = "leave out -m and Hydra's own flags"
        raise ConfigError(
            "this command takes the settings of one run", where="command line", value=" ".join(tokens), remedy=remedy
        )
    return jobs[0]


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
    raise ConfigError(
        f"run.name={name}: {count} runs of this sweep would have the same name and directory",
        where=jobs[0].origins.of("run.name"),
        value=name,
        remedy=f"leave run.name unset, or make it differ, as in 'run.name={name}-${{optim.lr}}'",
    )


def _without_secrets(problem: Problem, held: Mapping[str, str]) -> Problem:
    return replace(problem, **{field.name: redact(getattr(problem, field.name), held) for field in fields(problem)})


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
    values = {str(k): v for k, v in _resolved(cfg, origins).items()}
    name_model_after_path(values, {*map(override_key, overrides), *file_keys})
    absent += [key for key in origins.missing_keys() if key in unresolved and key not in (*absent, *replaced)]
    scalars = list(leaves(values))
    held = environment_secrets(os.environ)
    secrets = {key: reason for key, value in scalars if (reason := secret_problem(key, value, held)) is not None}
    targets = [key for key, _ in scalars if "_target_" in key.split(".")]
    problems = [missing(key, origins) for key in absent]
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


def _resolved(cfg: Any, origins: Origins) -> dict[Any, Any]:
    """Return the settings with their references resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        raw = OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        is_refused = READS_CREDENTIAL in str(error)
        raise ConfigError(
            f"{key}: the reference in this value cannot be resolved: {str(error).splitlines()[0]}",
            where=origins.written_at(key),
            remedy=IN_ENVIRONMENT if is_refused else "write the key of a setting between ${ and }",
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError("the configuration is not a mapping", where="conf/config.yaml")
    return raw
