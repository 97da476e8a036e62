"""The command line: the first word without `=` is the verb; the other words are its arguments."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from launcher import collect_garbage_rarely
from launcher.cli.verbs import VERBS, find_verb, overall_help, unknown_verb
from launcher.config.command_line import is_run_file
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, ConfigError, LauncherError, Problem
from launcher.security.redaction import printable_output, raw

# The same value as in launcher.security.folders, which only commands with the flag import here.
_TRUST_OWNER = "--trust-owner"
# Variables with paths that libraries read in a run's processes, which work in the run directory.
_PATH_VARIABLES = (
    *("LAUNCHER_CACHE", "LAUNCHER_SHARED_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "NETRC", "SSL_CERT_FILE"),
    *("WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CREDENTIALS_FILE", "REQUESTS_CA_BUNDLE"),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS"),
)
_PACKAGES = ("torch", "deepspeed", "transformers", "ray", "wandb")

_FIRST_STEPS = """\
Full-parameter fine-tuning of Hugging Face models with DeepSpeed ZeRO-3. With rows of your own, type first:

  python -m launcher init --data rows.jsonl --model qwen3_8b    write rows.yaml, a commented file of settings
  python -m launcher data rows.yaml                             build the data cache, and see what is trained
  python -m launcher plan rows.yaml                             memory, steps, hours, cost; starts nothing
  python -m launcher train rows.yaml                            train

  python -m launcher train                                      a demonstration: a small model on Python's documentation
  python -m launcher --help                                     all commands
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; user errors are printed, not raised."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    with printable_output():
        collect_garbage_rarely()
        # A reader that closes the pipe early, such as `head`, must not cause a traceback.
        logging.raiseExceptions = False
        for stream in (sys.stdout, sys.stderr):
            # A terminal with another encoding shows unsupported characters as escapes.
            if isinstance(stream := raw(stream), io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            exit_code = _run_reporting(tokens)
            # If the reader has gone, the interpreter's final flush would raise an error.
            sys.stdout.flush()
            return exit_code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE


def _run_reporting(tokens: Sequence[str]) -> int:
    """Run a command and print its error."""
    debug, as_json = "--debug" in tokens, "--json" in tokens
    try:
        return _run_command([token for token in tokens if token != "--debug"])  # noqa: S105
    except LauncherError as error:
        if debug:
            raise
        return _report(type(error).__name__, error.problems, error.exit_code, as_json)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if debug or name in ("", "launcher"):
            raise
        remedy = "install the launcher with its packages (in its clone: pip install .), or use the Python that has them"
        problem = Problem(f"the package {name} is not installed", where=sys.executable, remedy=remedy)
        return _report("ModuleNotFoundError", [problem], EXIT_REFUSED, as_json)
    except OSError as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        what = f"a file cannot be read or written: {error.strerror or error}"
        remedy = "check the storage and the permissions, then try again; --debug shows a traceback"
        # os.getcwd reports a deleted folder without its path.
        where = str(error.filename or "the working directory")
        return _report("OSError", [Problem(what, where=where, remedy=remedy)], EXIT_FAILED, as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _report(kind: str, problems: Sequence[Problem], exit_code: int, as_json: bool) -> int:
    """Print an error: as text, or with --json as one object with the first problem and all of them; returns the exit code."""
    if as_json:
        import json
        from dataclasses import asdict

        every = [asdict(problem) for problem in problems]
        print(json.dumps({"kind": kind, **every[0], "exit_code": exit_code, "problems": every}, indent=2))
    else:
        print(*problems, sep="\n", file=sys.stderr)
    return exit_code


def _run_command(tokens: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(_TRUST_OWNER, dest="owners", action="append")
    known, tokens = parser.parse_known_args(tokens)
    if tokens[:1] in (["--help"], ["-h"]):
        return _print(overall_help())
    if "--version" in tokens or tokens == ["-V"]:
        return _print(_list_versions())
    if not tokens:
        _print(_FIRST_STEPS)
        return EXIT_REFUSED
    first = tokens[0]
    has_verb = first in VERBS or not (first.startswith(("-", "+", "~")) or "=" in first or is_run_file(first))
    name, words = (first, tokens[1:]) if has_verb else ("train", tokens)
    # A deleted working directory is reported by what needs it.
    with suppress(FileNotFoundError):
        _make_paths_absolute()
    if known.owners:
        from launcher.security.folders import add_to_environ

        add_to_environ(known.owners)
    if name == "help" and words[:1] and words[0] in VERBS:
        name, words = words[0], ["--help"]
    if name == "help":
        return _print(overall_help())
    if name not in VERBS:
        raise ConfigError(unknown_verb(name))
    verb = find_verb(name, words)
    if {"--help", "-h"} & {*words} or (verb.takes_settings and words == ["help"]):
        return _print(verb.help())
    return verb.execute(words)


def _make_paths_absolute() -> None:
    """Make relative paths in variables absolute, because they start from this command's working directory."""
    for name in _PATH_VARIABLES:
        # Libraries expand ~ and variables.
        if (path := os.environ.get(name, ""))[:1] not in ("", "/", "~", "$"):
            os.environ[name] = os.path.abspath(path)
    if paths := os.environ.get("PYTHONPATH"):
        # Empty parts are allowed.
        os.environ["PYTHONPATH"] = os.pathsep.join(path and os.path.abspath(path) for path in paths.split(os.pathsep))


def _list_versions() -> str:
    """Return the versions of the launcher, Python and a run's packages, one per line, without importing them."""
    import platform
    from importlib import metadata

    from launcher import __version__

    versions = {"launcher": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return "".join(f"{name:<13}{version}\n" for name, version in versions.items())


def _print(text: str) -> int:
    print(text, end="")
    return 0
