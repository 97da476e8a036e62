"""Calls Hydra for a command line, and restricts it to composing settings: it runs no code that a file or an override names.

Groups and keys are translated to Hydra's syntax, the run's file becomes a config of Hydra's, and Hydra's errors become
ConfigErrors. When composing, Hydra calls the classes that `hydra.callbacks`, `hydra.job_logging` and `hydra.hydra_logging` name.
For a sweep it also calls those in `hydra.sweeper` and `hydra.launcher`, and each job of a sweep has its own section `hydra`.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from launcher.config.command_line import COMMAND_LINE, GROUPS, config_dirs, flags_first
from launcher.config.error_messages import find_broken_reference, find_yaml_problems, make_hydra_problem
from launcher.config.known_settings import leaves
from launcher.config.origin import RUN_FILE_GROUP, short_path
from launcher.config.run_file import FileContent
from launcher.errors import ConfigError, causes
from launcher.security.redaction import REDACTED, environment_secrets, looks_secret, redact

# Hydra needs a group and an option for each config; these exist in no folder.
_OPTION = "settings"
OVERRIDE = f"+{RUN_FILE_GROUP}={_OPTION}"
_GROUP_WITH_PLUS = re.compile(rf"\+{{1,2}}({'|'.join(GROUPS)})=")
# A key before its value in YAML or in an override, the first line of a value, and how the line of a value ends.
_NAMED_VALUE = re.compile(r"(?P<key>[\w.-]+)(?:: ?|=)(?=[^\s=:])")
_NEW_ENTRY = re.compile(r"\S|\s+(?:- |[\w.-]+:(?: |$))")
_VALUE_END = re.compile(r"'?\n?\Z")
_KEY_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w.\[\]-]*)=")

# Values from conf/config.yaml and from Hydra. Other values would change the environment, or make Hydra write its own files.
_NEUTRAL: dict[str, Any] = {
    **{"hydra.job.env_set": {}, "hydra.job.env_copy": [], "hydra.job.chdir": None},
    **{"hydra.output_subdir": None, "hydra.run.dir": ".", "hydra.sweep.subdir": "."},
}
# The classes that run a sweep, with Hydra's values.
_PLUGINS = {
    "hydra.launcher": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra.sweeper": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
READS_CREDENTIAL = "a setting must not read this variable, which looks like a secret"
# The reference to an environment variable, as in ${oc.env:USER}.
_VARIABLE = "oc.env"
# Hydra's modules that hold the function that configures logging.
_LOGGING = ("hydra._internal.hydra", "hydra._internal.core_plugins.basic_launcher", "hydra.core.utils")
# Hydra's modules that hold the function that runs a job.
_JOBS = ("hydra._internal.hydra", "hydra._internal.core_plugins.basic_launcher")


def call_hydra(task: Callable[[Any], None], tokens: Sequence[str], content: FileContent | None, conf: Path) -> None:
    """Compose `tokens` with the run's file `content` over the config groups in `conf`, and call `task` for each job.

    Hydra's own flags may start a sweep, or only print. `task` must not raise.

    Raises:
        ConfigError: if Hydra cannot compose them.
    """
    file = None if content is None else content.file.path
    with _store_run_file(content) as file_overrides:
        argv = []
        for token in flags_first([*file_overrides, *tokens]):
            # The launcher's groups are already in the defaults list.
            token = token.lstrip("+") if _GROUP_WITH_PLUS.match(token) else token
            match = _KEY_OVERRIDE.match(token)
            if match and match[2] not in GROUPS and not match[2].startswith("hydra") and token != OVERRIDE:
                token = f"++{match[2]}={token[match.end() :]}"
            argv.append(token)
        if any(token.startswith("-") or token.lstrip("+~").startswith("hydra") for token in argv):
            _run_hydra_main(task, argv, file, conf)
            return
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import open_dict

        try:
            # As in hydra.main, which composes a first time just to read hydra.mode.
            with _guard_composition(), hydra.initialize_config_dir(str(conf), job_name="launcher", version_base="1.3"):
                cfg = hydra.compose("config", argv, return_hydra_config=True)
                _require_composing_only(cfg)
                HydraConfig.instance().set_config(cfg)
                with open_dict(cfg):
                    del cfg["hydra"]
                task(cfg)
        # The task raises nothing, so every other exception here is Hydra's; not all of them are HydraExceptions.
        except Exception as error:
            raise _as_config_error(error, argv, [conf], file) from error


def _run_hydra_main(task: Callable[[Any], None], argv: Sequence[str], run_file: Path | None, conf: Path) -> None:
    """Let Hydra handle its own flags, which may start a sweep or only print."""
    import hydra

    printed, usage = io.StringIO(), io.StringIO()
    saved_state = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["launcher", *argv], "1"
    try:
        # A sweep always writes a multirun.yaml.
        with _guard_composition(), tempfile.TemporaryDirectory() as sweep, redirect_stdout(printed), redirect_stderr(usage):
            # The flag --info would take the next word as its value, and composes no sweep.
            sys.argv += [] if {"-i", "--info"} & set(argv) else [f"hydra.sweep.dir='{sweep}'"]
            hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(task)()
    except SystemExit as stop:
        if stop.code:
            reason = usage.getvalue().strip().rpartition("error: ")[2]
            raise ConfigError(
                f"Hydra cannot read the command line: {reason}",
                where=COMMAND_LINE,
                remedy="see python -m launcher --help",
            ) from stop
    # The task raises nothing, so every other exception here is Hydra's; not all of them are HydraExceptions.
    except Exception as error:
        raise _as_config_error(error, argv, [*config_dirs(argv), conf], run_file) from error
    finally:
        sys.argv = saved_state[0]
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if saved_state[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved_state[1]
        print(_redact_settings(printed.getvalue(), environment_secrets(os.environ)), end="")


def _redact_settings(text: str, secrets: Mapping[str, str]) -> str:
    """Return what Hydra prints for --cfg and --info, with `<redacted>` for each value that looks like a credential."""

    def names_secret(key: str) -> bool:
        # Hydra joins all overrides in override_dirname. Names in capitals are those of a job's variables.
        names = (key, f"cluster.env.{key}") if key.isupper() else (key,)
        return key.endswith("override_dirname") or any(looks_secret(name, "?") for name in names)

    lines, is_cut = list[str](), False
    for line in text.splitlines(keepends=True):
        if is_cut and not _NEW_ENTRY.match(line):
            continue
        match = next((match for match in _NAMED_VALUE.finditer(line) if names_secret(match["key"])), None)
        is_cut = match is not None
        lines.append(f"{line[: match.end()]}{REDACTED}{_VALUE_END.findall(line)[0]}" if match else line)
    return redact("".join(lines), secrets)


def _as_config_error(error: Exception, argv: Sequence[str], folders: Sequence[Path], run_file: Path | None) -> ConfigError:
    """Return the refusal that caused an error of Hydra, or the problems that the error stands for."""
    refusal = next((cause for cause in causes(error) if isinstance(cause, ConfigError)), None)
    return refusal or ConfigError(find_yaml_problems(error) or [make_hydra_problem(error, argv, folders, run_file)])


@contextmanager
def _store_run_file(content: FileContent | None) -> Iterator[list[str]]:
    """Let Hydra compose the content of a run's file within this block; yield the override that includes it.

    Raises:
        ConfigError: if the file has a key or a value of a kind that settings cannot have.
    """
    if content is None:
        yield []
        return
    from hydra.core.config_store import ConfigStore
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    try:
        store.store(group=RUN_FILE_GROUP, name=_OPTION, node=content.for_hydra(), package="_global_")
    except (OmegaConfBaseException, RecursionError) as error:
        reason = redact(str(error).splitlines()[0])
        remedy = "write keys as texts, and a reference as ${section.name}"
        where = f"{short_path(content.file.path)}:{find_broken_reference(content.file.path) or 1}"
        raise ConfigError(f"the file is not read: {reason}", where=where, remedy=remedy) from None
    try:
        yield [OVERRIDE]
    finally:
        store.repo.pop(RUN_FILE_GROUP, None)


@contextmanager
def _guard_composition() -> Iterator[None]:
    """Guard the composition within this block. Hydra's errors about refused settings become ConfigErrors."""
    from hydra._internal import hydra
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    class RefusedCallbacks(hydra.Callbacks):
        def __init__(self, config: Any = None) -> None:
            if config is not None:
                _require_composing_only(config)
            super().__init__(None)

    def check_first(run_job: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run_job)
        def run_checked(*args: Any, **kwargs: Any) -> Any:
            _require_composing_only(kwargs["config"])
            return run_job(*args, **kwargs)

        return run_checked

    def read_variable(name: str, *default: Any) -> Any:
        # Within a value, no check would find a credential for certain.
        if environment_secrets({name: os.environ.get(name, "")}):
            raise ValueError(f"{name}: {READS_CREDENTIAL}")
        return oc.env(name, *default)

    replacements: list[tuple[Any, str, Any]] = [
        (hydra, "Callbacks", RefusedCallbacks),
        *((importlib.import_module(module), "configure_log", lambda *_, **__: None) for module in _LOGGING),
        *((module, "run_job", check_first(module.run_job)) for module in map(importlib.import_module, _JOBS)),
    ]
    originals = [getattr(owner, name) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        OmegaConf.register_new_resolver(_VARIABLE, read_variable, replace=True)
        yield
    finally:
        OmegaConf.register_new_resolver(_VARIABLE, oc.env, replace=True)
        for (owner, name, _), original in zip(replacements, originals, strict=True):
            setattr(owner, name, original)


def _require_composing_only(config: Any) -> None:
    """Refuse composed settings, including Hydra's own section, that make Hydra call, set or write something.

    Raises:
        ConfigError: listing the settings.
    """
    from omegaconf import OmegaConf

    changed = [key for key, value in _NEUTRAL.items() if (OmegaConf.select(config, key) or value) != value]
    if changed:
        raise ConfigError(
            f"{changed[0]}: Hydra composes settings here, and neither sets variables nor writes files",
            where=", ".join(changed),
            remedy="remove it from the command line and from the files of the chosen options",
        )
    for key, name in _PLUGINS.items():
        # Hydra instantiates everything inside these, so they may name no class but its own, and nothing below it.
        values = leaves(OmegaConf.to_container(OmegaConf.select(config, key), resolve=True))
        targets = {inner: value for inner, value in values if "_target_" in inner.split(".")}
        if targets != {"_target_": name}:
            called = next((inner for inner in targets if inner != "_target_"), "_target_")
            raise ConfigError(
                f"{key}: a setting must not name code to run; nothing was called",
                where=f"{key}.{called}",
                value=str(targets.get(called, "")),
                remedy=f"remove {key} from the command line and from the files of the chosen options",
            )
    callbacks = OmegaConf.select(config, "hydra.callbacks")
    if callbacks:
        raise ConfigError(
            "hydra.callbacks: a setting must not name code to run; nothing was called",
            where="hydra.callbacks",
            value=", ".join(map(str, callbacks)),
            remedy="remove hydra.callbacks from the command line and from the files of the chosen options",
        )
