"""Compose settings with Hydra into a `RunConfig`, and report all mistakes in their values at once.

Groups and keys are translated to Hydra's syntax, and a run's file becomes a config of its own. Overrides of keys become
`++key=value`, so that Hydra does not stop at the first unknown key: the schema reports all of them. Only Hydra's compose
interface is used: it runs no code that a file or an override names, and writes nothing. A sweep (-m) is composed job by job.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    find_unreadable_overrides,
    is_sweep,
    names_rows_only,
    override_key,
    split_words,
)
from launcher.config.error_messages import (
    find_broken_reference,
    find_extra_problems,
    find_yaml_problems,
    list_schema_problems,
    make_hydra_problem,
    make_missing_problem,
)
from launcher.config.origin import RUN_FILE_GROUP, Origins, RunFile
from launcher.config.run_file import read_run_file
from launcher.config.schema import RunConfig, leaves
from launcher.config.sections.fields import derive_name
from launcher.errors import ConfigError, LauncherError, Problem
from launcher.security.redaction import (
    LOGIN_IN_ADDRESS,
    environment_secrets,
    has_login,
    redact,
    secret_problem,
)
from launcher.shell_commands import short_path

# Settings that replace each other.
_ALTERNATIVES = (("train", ("max_steps", "epochs")), ("data", ("eval_fraction", "eval_path")), ("data", ("path", "sources")))
# The remedy for secrets in settings.
IN_ENVIRONMENT = "put secrets into environment variables (HF_TOKEN, WANDB_API_KEY); they never belong in settings"
# Hydra needs a group and an option for each config; these exist in no folder.
_OPTION = "settings"
_FILE_OVERRIDE = f"+{RUN_FILE_GROUP}={_OPTION}"
_GROUP_WITH_PLUS = re.compile(rf"\+{{1,2}}({'|'.join(GROUPS)})=")
_KEY_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w.\[\]-]*)=")

_READS_CREDENTIAL = "a setting must not read this variable, which looks like a secret"
# The reference to an environment variable, as in ${oc.env:USER}.
_VARIABLE = "oc.env"


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

    A word that names a run's file adds its settings, which take precedence over groups and experiments; overrides come last.
    `own_flags` are the verb's flags, as suggestions for mistyped ones. Raises ConfigError with every mistake in the words and the
    files, or else in the values; FileNotFoundError if the working directory was deleted.
    """
    # Hydra needs the working directory, but would not report that it was deleted.
    os.getcwd()
    files, flags, overrides, problems = split_words(tokens, own_flags)
    run_file: RunFile | None = None
    try:
        if len(files) > 1:
            remedy = "name one file, and write what differs as overrides (key=value)"
            raise ConfigError("a run has one file", where=COMMAND_LINE, value=redact(" ".join(files)), remedy=remedy)
        if files:
            replaced = [group for group in GROUPS if any("=" in word and override_key(word) == group for word in overrides)]
            has_search_path = any(word.lstrip("+").startswith("hydra.searchpath") for word in overrides)
            # With a search path of the user's, the options of the groups are not known here.
            folders = [] if has_search_path else [conf_dir(), *config_dirs(flags)]
            run_file, file_problems = read_run_file(Path(files[0]), replaced, folders)
            problems += file_problems
    except ConfigError as error:
        # Without the file, other settings may only appear to be wrong.
        raise ConfigError([*problems, *error.problems]) from error
    if names_rows_only(overrides, () if run_file is None else run_file.choices):
        overrides.append("data=jsonl")
    jobs: list[Composed] = []
    failure: list[BaseException] = []

    def task(cfg: Any) -> None:
        # Every exception in the composition is Hydra's, so this function raises none.
        if failure:
            return
        try:
            jobs.append(_validate_settings(cfg, run_file))
        except ConfigError as error:
            problems.extend(error.problems)
        except BaseException as error:
            failure.append(error)

    try:
        _call_hydra(task, flags, overrides, run_file)
    except ConfigError as error:
        problems += find_unreadable_overrides(overrides, is_sweep(flags)) or error.problems
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
    """Compose a command line for one run. Raises ConfigError with the mistakes in it, or if it is for several runs."""
    jobs = run_hydra(tokens, own_flags)
    if len(jobs) != 1:
        remedy = "leave out -m"
        raise ConfigError("this command takes the settings of one run", where=COMMAND_LINE, value=" ".join(tokens), remedy=remedy)
    return jobs[0]


def require_distinct_runs(jobs: Sequence[Composed]) -> None:
    """Refuse a sweep in which two runs would have the same directory. Raises ConfigError with the name that they share."""
    names = Counter((job.config.run.root, job.config.run.name) for job in jobs if job.config.run.name is not None)
    for (_, name), count in names.items():
        if count > 1:
            raise ConfigError(
                f"run.name={name}: {count} runs of this sweep would have the same name and directory",
                where=jobs[0].origins.of("run.name"),
                value=str(name),
                remedy=f"leave run.name unset, or make it differ, as in 'run.name={name}-${{optim.lr}}'",
            )


def _validate_settings(cfg: Any, run_file: RunFile | None) -> Composed:
    """Validate one composed config together with the run's file."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    hydra_config = HydraConfig.get()
    # Unresolved, because the text of an override such as a=${b} is not one of Hydra's references.
    tokens: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    overrides = tuple(str(token).removeprefix("++") for token in tokens if token != _FILE_OVERRIDE)
    origins = Origins(
        overrides=overrides,
        choices={group: option for group, option in hydra_config.runtime.choices.items() if group != RUN_FILE_GROUP},
        folders=tuple(Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path),
        run_file=run_file,
    )
    OmegaConf.set_readonly(cfg, False)
    replaced = _settle_alternatives(cfg, origins)
    unresolved = dict(leaves(OmegaConf.to_container(cfg, resolve=False)))
    absent = [key for key, value in unresolved.items() if value == "???"]
    for key in absent:
        # References to the missing value must resolve, so that the other mistakes are reported too.
        OmegaConf.update(cfg, key, "./missing")
    try:
        resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        is_refused = _READS_CREDENTIAL in str(error)
        raise ConfigError(
            f"{key}: the reference in this value cannot be resolved: {str(error).splitlines()[0]}",
            where=origins.written_at(key),
            remedy=IN_ENVIRONMENT if is_refused else "write the key of a setting between ${ and }",
        ) from error
    values: dict[str, Any] = {str(key): value for key, value in resolved.items()}
    keys, model = {*map(override_key, overrides), *(() if run_file is None else run_file.keys)}, values.get("model")
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
    return Composed(config, overrides if run_file is None else (str(run_file.path), *overrides), origins)


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


def _call_hydra(task: Callable[[Any], None], flags: Sequence[str], overrides: Sequence[str], run_file: RunFile | None) -> None:
    """Compose the overrides with a run's file over the config groups, and call `task`, which must not raise, for each job."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    conf, own_folders = conf_dir(), [*config_dirs(flags)]
    with _store_run_file(run_file) as file_overrides, _refuse_credentials():
        words = [f"hydra.searchpath=[{','.join(_quote_folder(folder) for folder in own_folders)}]"] if own_folders else []
        for token in (*file_overrides, *overrides):
            # The launcher's groups are already in the defaults list.
            token = token.lstrip("+") if _GROUP_WITH_PLUS.match(token) else token
            match = _KEY_OVERRIDE.match(token)
            if match and match[2] not in GROUPS and not match[2].startswith("hydra") and token != _FILE_OVERRIDE:
                token = f"++{match[2]}={token[match.end() :]}"
            words.append(token)
        try:
            with hydra.initialize_config_dir(str(conf), job_name="launcher", version_base="1.3"):
                for job in _list_jobs(words) if is_sweep(flags) else [words]:
                    cfg = hydra.compose("config", [*job], return_hydra_config=True)
                    HydraConfig.instance().set_config(cfg)
                    with open_dict(cfg):
                        del cfg["hydra"]
                    task(cfg)
        # Not all of Hydra's exceptions are HydraExceptions.
        except Exception as error:
            path, folders = None if run_file is None else run_file.path, [*own_folders, conf]
            raise ConfigError(find_yaml_problems(error) or [make_hydra_problem(error, words, folders, path)]) from error


def _quote_folder(folder: Path) -> str:
    """Return a folder of --config-dir as an entry of Hydra's search path."""
    text = str(folder.absolute()).replace("'", "\\'")
    return f"'file://{text}'"


def _list_jobs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of each job of a sweep: every combination of the listed values."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([*words])
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()] if one.is_sweep_override() else [word]
        for one, word in zip(parsed, words, strict=True)
    ]
    yield from itertools.product(*values)


@contextmanager
def _store_run_file(run_file: RunFile | None) -> Iterator[list[str]]:
    """Let Hydra compose the content of a run's file within this block; yield the override that includes it."""
    if run_file is None:
        yield []
        return
    from hydra.core.config_store import ConfigStore
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    try:
        store.store(group=RUN_FILE_GROUP, name=_OPTION, node=run_file.for_hydra(), package="_global_")
    except (OmegaConfBaseException, RecursionError) as error:
        reason = redact(str(error).splitlines()[0])
        remedy = "write keys as texts, and a reference as ${section.name}"
        where = f"{short_path(run_file.path)}:{find_broken_reference(run_file.path) or 1}"
        raise ConfigError(f"the file is not read: {reason}", where=where, remedy=remedy) from None
    try:
        yield [_FILE_OVERRIDE]
    finally:
        store.repo.pop(RUN_FILE_GROUP, None)


@contextmanager
def _refuse_credentials() -> Iterator[None]:
    """Within this block, references to environment variables that hold a credential fail."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    def read_variable(name: str, *default: Any) -> Any:
        # Within a value, no check would find a credential for certain.
        if environment_secrets({name: os.environ.get(name, "")}):
            raise ValueError(f"{name}: {_READS_CREDENTIAL}")
        return oc.env(name, *default)

    OmegaConf.register_new_resolver(_VARIABLE, read_variable, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver(_VARIABLE, oc.env, replace=True)
