"""Calls Hydra for a command line: translates groups and keys to Hydra's syntax, and Hydra's errors to ConfigErrors."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from launcher.config.command_line import GROUPS, flags_first
from launcher.config.error_messages import hydra_problems
from launcher.config.hydra_composition.guard import guarded, require_composing_only
from launcher.config.origin import COMMAND_LINE
from launcher.config.run_file.hydra_layer import OVERRIDE, composable
from launcher.config.run_file.reading import FileContent
from launcher.errors import ConfigError, causes
from launcher.security.credentials import environment_secrets
from launcher.security.redaction import REDACTED, looks_secret, redact

_GROUP_WITH_PLUS = re.compile(rf"\+{{1,2}}({'|'.join(GROUPS)})=")
# A key before its value in YAML or in an override, the first line of a value, and how the line of a value ends.
_NAMED_VALUE = re.compile(r"(?P<key>[\w.-]+)(?:: ?|=)(?=[^\s=:])")
_NEW_ENTRY = re.compile(r"\S|\s+(?:- |[\w.-]+:(?: |$))")
_VALUE_END = re.compile(r"'?\n?\Z")
_KEY_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w.\[\]-]*)=")


def call_hydra(task: Callable[[Any], None], tokens: Sequence[str], content: FileContent | None, conf: Path) -> None:
    """Compose `tokens` with the run's file `content` over the config groups in `conf`, and call `task` for each job.

    Hydra's own flags may start a sweep, or only print. `task` must not raise.

    Raises:
        ConfigError: if Hydra cannot compose them.
    """
    file = None if content is None else content.file.path
    with composable(content) as file_overrides:
        argv = [_for_hydra(token) for token in flags_first([*file_overrides, *tokens])]
        if any(token.startswith("-") or token.lstrip("+~").startswith("hydra") for token in argv):
            _run_hydra_main(task, argv, file, conf)
        else:
            _compose_once(task, argv, file, conf)


def _run_hydra_main(task: Callable[[Any], None], argv: Sequence[str], run_file: Path | None, conf: Path) -> None:
    """Let Hydra handle its own flags, which may start a sweep or only print."""
    import hydra

    printed, usage = io.StringIO(), io.StringIO()
    saved_state = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["launcher", *argv], "1"
    try:
        # A sweep always writes a multirun.yaml.
        with guarded(), tempfile.TemporaryDirectory() as sweep, redirect_stdout(printed), redirect_stderr(usage):
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
        raise _refusal_within(error) or ConfigError(hydra_problems(error, argv, [*extra_dirs(argv), conf], run_file)) from error
    finally:
        sys.argv = saved_state[0]
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if saved_state[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved_state[1]
        print(redact_settings(printed.getvalue(), environment_secrets(os.environ)), end="")


def redact_settings(text: str, secrets: Mapping[str, str]) -> str:
    """Return what Hydra prints for --cfg and --info, with `<redacted>` for each value that looks like a credential."""
    lines, is_cut = list[str](), False
    for line in text.splitlines(keepends=True):
        if is_cut and not _NEW_ENTRY.match(line):
            continue
        match = next((match for match in _NAMED_VALUE.finditer(line) if _names_secret(match["key"])), None)
        is_cut = match is not None
        lines.append(f"{line[: match.end()]}{REDACTED}{_VALUE_END.findall(line)[0]}" if match else line)
    return redact("".join(lines), secrets)


def _names_secret(key: str) -> bool:
    # Hydra joins all overrides in override_dirname. Names in capitals are those of a job's variables.
    names = (key, f"cluster.env.{key}") if key.isupper() else (key,)
    return key.endswith("override_dirname") or any(looks_secret(name, "?") for name in names)


def _compose_once(task: Callable[[Any], None], overrides: list[str], run_file: Path | None, conf: Path) -> None:
    """Compose as hydra.main does, but only once: hydra.main composes a first time just to read hydra.mode."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    try:
        with guarded(), hydra.initialize_config_dir(str(conf), job_name="launcher", version_base="1.3"):
            cfg = hydra.compose("config", overrides, return_hydra_config=True)
            require_composing_only(cfg)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            task(cfg)
    # The task raises nothing, so every other exception here is Hydra's; not all of them are HydraExceptions.
    except Exception as error:
        raise _refusal_within(error) or ConfigError(hydra_problems(error, overrides, [conf], run_file)) from error


def _refusal_within(error: BaseException) -> ConfigError | None:
    """Return the guard's refusal that caused an error of Hydra; None without one."""
    return next((cause for cause in causes(error) if isinstance(cause, ConfigError)), None)


def _for_hydra(token: str) -> str:
    # The launcher's groups are already in the defaults list.
    token = token.lstrip("+") if _GROUP_WITH_PLUS.match(token) else token
    match = _KEY_OVERRIDE.match(token)
    if not match or match[2] in GROUPS or match[2].startswith("hydra") or token == OVERRIDE:
        return token
    return f"++{match[2]}={token[match.end() :]}"


def extra_dirs(tokens: Sequence[str]) -> Iterator[Path]:
    """Yield the folders that --config-dir names."""
    for i, token in enumerate(tokens):
        if token in ("--config-dir", "-cd") and i + 1 < len(tokens):
            yield Path(tokens[i + 1])
        elif token.startswith("--config-dir="):
            yield Path(token.split("=", 1)[1])
