"""Compose settings with Hydra into a `RunConfig`, and report all mistakes at once.

Hydra composes the files under conf/. Overrides of keys become `++key=value`, so that Hydra does not stop at the first unknown
key. The schema then reports all unknown keys, each with a suggestion.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.config.command_line import (
    COMMAND_LINE,
    GROUPS,
    conf_dir,
    config_dirs,
    override_key,
    split_run_files,
    without_unknown_flags,
    without_unreadable_overrides,
)
from launcher.config.error_messages import find_extra_problems, list_schema_problems, make_missing_problem
from launcher.config.hydra_composition import OVERRIDE, READS_CREDENTIAL, call_hydra
from launcher.config.known_settings import leaves
from launcher.config.origin import RUN_FILE_GROUP, Origins, short_path
from launcher.config.run_file import FileContent, read_run_file, require_one_file
from launcher.config.schema import RunConfig
from launcher.config.sections.fields import derive_name
from launcher.errors import ConfigError, LauncherError, Problem
from launcher.security.redaction import LOGIN_IN_ADDRESS, environment_secrets, has_login, redact, secret_problem

# Hydra's flags that replace the files in conf/.
_OTHER_FILES = ("--config-name", "-cn", "--config-path", "-cp")
# Values of data.path and data.sources that name nothing to read.
_NO_ROWS = ("", "null", "[]")
# Settings that replace each other.
_ALTERNATIVES = (("train", ("max_steps", "epochs")), ("data", ("eval_fraction", "eval_path")), ("data", ("path", "sources")))
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
            raise type(error)(self.origins.located(problem) for problem in error.problems) from error


def run_hydra(tokens: Sequence[str], own_flags: Sequence[str] = ()) -> list[Composed]:
    """Compose `tokens` (a command line without the verb); returns the settings of one job or, with `-m`, of each.

    A word that names a run's file adds its settings. They take precedence over groups and experiments; overrides take precedence
    over them. With --cfg, --info and similar flags Hydra only prints, and nothing is returned. `own_flags` are the verb's flags,
    which `tokens` no longer contains; they serve as suggestions for mistyped flags.
    Raises:
        ConfigError: with every mistake.
        FileNotFoundError: if the working directory was deleted.
    """
    # Hydra needs the working directory, but would not report that it was deleted.
    os.getcwd()
    files, words = split_run_files(tokens)
    remaining, problems = without_unknown_flags(words, own_flags)
    content: FileContent | None = None
    try:
        if (path := require_one_file(files)) is not None:
            replaced = [group for group in GROUPS if any("=" in word and override_key(word) == group for word in words)]
            has_search_path = any(word.lstrip("+").startswith("hydra.searchpath") for word in words)
            # With a search path of the user's, the options of the groups are not known here.
            folders = [] if has_search_path else [conf_dir(), *config_dirs(words)]
            content, file_problems = read_run_file(path, replaced, folders)
            problems += file_problems
    except ConfigError as error:
        # Without the file, other settings may only appear to be wrong.
        raise ConfigError([*problems, *error.problems]) from error
    if _names_rows_only(words, () if content is None else content.choices):
        remaining.append("data=jsonl")
    jobs: list[Composed] = []
    failure: list[BaseException] = []

    def task(cfg: Any) -> None:
        # Hydra prints its own lines about any exception that passes through it, so this function raises none.
        if failure:
            return
        try:
            jobs.append(_validate_settings(cfg, content))
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
        names = [field.name for field in fields(Problem)]
        raise ConfigError(
            replace(problem, **{name: redact(getattr(problem, name), held) for name in names})
            for problem in dict.fromkeys(problems)
        )
    if failure:
        raise failure[0]
    return jobs


def compose_one(tokens: Sequence[str], own_flags: Sequence[str] = ()) -> Composed:
    """Compose a command line for one run.

    Raises:
        ConfigError: with the mistakes in it, or if it is for several runs.
    """
    jobs = run_hydra(tokens, own_flags)
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


def _validate_settings(cfg: Any, content: FileContent | None) -> Composed:
    """Validate one composed config together with the run's file `content`.

    Raises:
        ConfigError: with all problems of the config.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
    replaced = _settle_alternatives(cfg, origins)
    unresolved = dict(leaves(OmegaConf.to_container(cfg, resolve=False)))
    absent = [key for key, value in unresolved.items() if value == "???"]
    for key in absent:
        # References to the missing value must resolve, so that the other mistakes are reported too.
        OmegaConf.update(cfg, key, "./missing")
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
    values = {str(k): v for k, v in raw.items()}
    keys, model = {*map(override_key, overrides), *file_keys}, values.get("model")
    if "model.path" in keys and keys.isdisjoint(("model", "model.name", "experiment")) and isinstance(model, dict):
        # The model of the group has another name.
        last = str(model.get("path")).removeprefix("run:").rstrip("/").rpartition("/")[2]
        model["name"] = derive_name(last.partition("@")[0].removesuffix(".gguf")) or model.get("name")
    absent += [key for key in origins.missing_keys() if key in unresolved and key not in (*absent, *replaced)]
    scalars = list(leaves(values))
    held = environment_secrets(os.environ)
    secrets = {key: reason for key, value in scalars if (reason := secret_problem(key, value, held)) is not None}
    targets = [key for key, _ in scalars if "_target_" in key.split(".")]
    problems = [make_missing_problem(key, origins) for key in absent]
    problems += [Problem(reason, where=origins.of(key), remedy=IN_ENVIRONMENT) for key, reason in secrets.items()]
    problems += [
        Problem(f"{key}: a setting must not name code to run; nothing was called", where=origins.of(key), remedy=f"remove {key}")
        for key in targets
    ]
    reported = {*absent, *secrets, *targets}
    problems += find_extra_problems(values, origins, skip=reported)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += list_schema_problems(error, origins, values, skip=reported)
    # Settings that take addresses have their own messages.
    logins = [key for key, value in scalars if has_login(value) and not any(p.message.startswith(key) for p in problems)]
    problems += [Problem(f"{key}: {LOGIN_IN_ADDRESS}", where=origins.of(key), remedy=IN_ENVIRONMENT) for key in logins]
    if problems:
        raise ConfigError(problems)
    return Composed(config, overrides if file is None else (str(file.path), *overrides), origins)


def _settle_alternatives(cfg: Any, origins: Origins) -> list[str]:
    """Of settings that replace each other, keep those that the latest layer sets; unset the others and return their keys.

    The layers are the command line, the run's file, and the files in conf/ from the last composed one to the first.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(cfg, resolve=False)
    layers = [COMMAND_LINE, *(short_path(file) for file, _ in origins.files())]
    replaced = []
    for section, names in _ALTERNATIVES:
        content = values.get(section) if isinstance(values.get(section), dict) else {}
        if "sources" in names and "${data.path}" in str(content.get("sources")):
            continue
        where = {name: origins.written_at(f"{section}.{name}") for name in names if content.get(name) is not None}
        layer = {name: layers.index(text.rpartition(":")[0] or text) for name, text in where.items() if text}
        for name in layer:
            # Without data.sources, nothing would read data.path.
            if layer[name] > min(layer.values()) and name != "sources":
                OmegaConf.update(cfg, f"{section}.{name}", 0.0 if name == "eval_fraction" else None)
                replaced.append(f"{section}.{name}")
    return replaced


def _names_rows_only(words: Sequence[str], file_choices: Collection[str]) -> bool:
    """Return whether a command line names rows but no group option that reads them; a run's file may select one.

    `file_choices` are the groups whose option the run's file selects.
    """
    values = {override_key(word): word.partition("=")[2] for word in words if not word.startswith(("-", "~"))}
    if not values.keys().isdisjoint(("data", "experiment")) or any(word.partition("=")[0] in _OTHER_FILES for word in words):
        return False
    if all(values.get(key, "") in _NO_ROWS for key in ("data.path", "data.sources")):
        return False
    return "data" not in file_choices and "experiment" not in file_choices
