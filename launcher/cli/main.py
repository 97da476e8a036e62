"""The command line: the first word without `=` is the verb; the other words are its arguments."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from launcher import collect_garbage_rarely
from launcher.config.command_line import is_run_file
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, ConfigError, LauncherError, Problem
from launcher.security.printable_stream import printable_output, raw

# Each verb, and the module of launcher.cli whose function `run(verb, tokens)` executes it.
VERBS: Mapping[str, str] = {
    "train": "launch",
    "plan": "launch",
    "data": "data",
    "init": "init",
    "config": "config",
    "ls": "status",
    "status": "status",
    "report": "report",
    "dashboard": "dashboard",
    "why": "why",
    "drift": "drift",
    "logs": "runs",
    "cancel": "runs",
    "resume": "runs",
    "export": "export",
    "evaluate": "evaluate",
    "checkpoints": "checkpoints",
    "diff": "diff",
    "rm": "rm",
    "clean": "clean",
    "schema": "schema",
    "completion": "completion",
    "drill": "drill",
    "doctor": "doctor",
}
# Other programs' verbs, and the verb that does the same here.
_VERBS_ELSEWHERE = {
    "train": "run start launch submit fit sft finetune fine-tune",
    "data": "prepare preprocess tokenize dataset",
    "plan": "validate dry-run estimate",
    "init": "new create",
    "ls": "list runs ps",
    "status": "show info describe watch monitor",
    "logs": "log tail",
    "cancel": "stop kill abort interrupt",
    "resume": "continue restart",
    "export": "convert merge push upload",
    "evaluate": "eval test",
    "diff": "compare",
    "rm": "remove delete del",
    "clean": "prune cache",
    "doctor": "check env",
    "--version": "version",
}
# The verbs that compose settings.
COMPOSING = ("train", "plan", "data", "doctor")
# The same value as in launcher.security.owners, which only commands with the flag import here.
_TRUST_OWNER = "--trust-owner"
# Variables with paths that libraries read in a run's processes, which work in the run directory.
_PATH_VARIABLES = (
    *("LAUNCHER_CACHE", "LAUNCHER_SHARED_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "NETRC", "SSL_CERT_FILE"),
    *("WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CREDENTIALS_FILE", "REQUESTS_CA_BUNDLE"),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS"),
)
_PACKAGES = ("torch", "deepspeed", "transformers", "ray", "wandb")

HELP = """\
Full-parameter fine-tuning of Hugging Face models with DeepSpeed ZeRO-3.

  python -m launcher [train] [FILE] [overrides]
                                               plan, prepare data, start; follows a run on this machine (--detach returns);
                                               without train, at least one FILE or override
  python -m launcher plan [FILE] [overrides]   show the complete plan; start nothing
  python -m launcher data [FILE] [--show N] [--html FILE] [overrides]
                                               build the data cache and report on it: sizes, problems, trained tokens
  python -m launcher data --scored RUN [--step N] [--exclude FILE]
                                               rank a run's documents: likely mislabeled, memorized, nothing to learn

  python -m launcher init [--data FILE] [--model NAME] [--out FILE] [overrides]
                                               write a commented file of settings that fits data, model and machine
  python -m launcher config [RUN] [--all] [overrides]
                                               print the settings of a run, or of a command line, as a file for train FILE

  python -m launcher ls                        the runs under ./runs, newest first
  python -m launcher status RUN [--watch]      state, step, loss, throughput, cost, alerts
  python -m launcher report RUN [RUN ...] [--html FILE]
                                               curves, goodput, attempts, checkpoints and cost as one page
  python -m launcher dashboard RUN|PROJECT [--dry-run]
                                               create or update the W&B workspace of a run or a project
  python -m launcher why RUN STEP              the documents of a step, their losses, and what happened around it
  python -m launcher drift RUN PROMPTS         are prompts of today like those the run was trained on? exit code 3: no
  python -m launcher logs RUN [-f] [--rank N]  the output of a rank
  python -m launcher cancel RUN                save and stop; a second cancel kills the run
  python -m launcher resume RUN [overrides]    continue from the newest checkpoint; RUN may be an address in a mirror;
                                               --force accepts data and settings that differ from the checkpoint's,
                                               --yes a cost above run.confirm_usd
  python -m launcher export RUN [--step N] [--dtype bf16] [--out DIR] [--replace]
                                               write the Hugging Face folder of a checkpoint
  python -m launcher evaluate RUN [--step N] [--min-gain METRIC:BASELINE:GAIN] [overrides]
                                               does it answer better than the base model? scores and verdict on held-out prompts
  python -m launcher checkpoints RUN [--verify] [--prune]
                                               list checkpoints; verify their digests; remove those that are not kept
  python -m launcher diff RUN RUN              what differs: settings, data, code, versions, machines, results
  python -m launcher rm RUN [RUN ...] [--yes]  remove runs with all their files, after a question
  python -m launcher clean [--older-than 30d] [--only KIND] [--dry-run]
                                               remove parts of the cache that no unfinished run uses, after a question

  python -m launcher drill --fault FAULT [overrides]
                                               rehearse a fault on a short run: does it save and continue, what is lost
  python -m launcher schema                    the JSON Schema of a run's file, for editors
  python -m launcher completion bash|zsh|fish  completion of commands, groups, settings and names of runs

  python -m launcher doctor [FILE] [overrides] check what a run needs, on this machine or on every node of a cluster

FILE is a YAML file with a run's settings (docs/run-file.md); overrides win over it.
Overrides are key=value (train.max_steps=100) or group=option (model=qwen3_8b); docs/settings.md lists them all.
Flags: --json with commands that report, --debug for tracebacks, COMMAND --help for more, --version;
--trust-owner OWNER (repeatable) accepts files of other users: a NAME, UID, group:NAME, or anyone; docs/security.md.
Hydra's own flags work with train, plan and data: --cfg job, --info, -m, --config-dir DIR.
Exit codes: 0 done, 1 the run failed or doctor found a failure, 2 refused before anything started,
3 a check that was asked for (--min-gain, drift) does not hold, 130 interrupted.
"""


_FIRST_STEPS = """\
Full-parameter fine-tuning of Hugging Face models with DeepSpeed ZeRO-3. With rows of your own, type first:

  python -m launcher init --data rows.jsonl --model qwen3_8b    write rows.yaml, a commented file of settings
  python -m launcher data rows.yaml                             build the data cache, and see what is trained
  python -m launcher plan rows.yaml                             memory, steps, hours, cost; starts nothing
  python -m launcher train rows.yaml                            train

  python -m launcher train                                      a demonstration: a small model on Python's documentation
  python -m launcher --help                                     all commands
"""


class _VerbModule(Protocol):
    """A module of launcher.cli that executes verbs."""

    def run(self, verb: str, tokens: list[str]) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; user errors are printed, not raised."""
    with printable_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    tokens = list(sys.argv[1:] if argv is None else argv)
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
    for problem in problems if not as_json else ():
        print(problem, file=sys.stderr)
    return exit_code


def _run_command(tokens: list[str]) -> int:
    tokens, owners = _without_trusted_owners(tokens)
    if tokens[:1] in (["--help"], ["-h"]):
        return _print(HELP)
    if "--version" in tokens or tokens == ["-V"]:
        return _print(_versions())
    if not tokens:
        _print(_FIRST_STEPS)
        return EXIT_REFUSED
    verb = tokens.pop(0) if _is_verb(tokens[0]) else "train"
    # A deleted working directory is reported by what needs it.
    with suppress(FileNotFoundError):
        _make_paths_absolute()
    if owners:
        from launcher.security.owners import add_to_environ

        add_to_environ(owners)
    return _run(verb, tokens)


def _without_trusted_owners(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off --trust-owner NAME and --trust-owner=NAME, which every verb accepts; returns the other words and the names."""
    rest, owners = [], []
    words = iter(tokens)
    for word in words:
        name, equals, value = word.partition("=")
        if name == _TRUST_OWNER:
            owners.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return rest, owners


def _make_paths_absolute() -> None:
    """Make relative paths in variables absolute, because they start from this command's working directory."""
    for name in _PATH_VARIABLES:
        # Libraries expand ~ and variables.
        if (path := os.environ.get(name, ""))[:1] not in ("", "/", "~", "$"):
            os.environ[name] = os.path.abspath(path)
    if paths := os.environ.get("PYTHONPATH"):
        # Empty parts are allowed.
        os.environ["PYTHONPATH"] = os.pathsep.join(path and os.path.abspath(path) for path in paths.split(os.pathsep))


def _is_verb(token: str) -> bool:
    is_word = "=" not in token and not token.startswith(("-", "+", "~"))
    return is_word and (token in VERBS or not is_run_file(token))


def _run(verb: str, tokens: list[str]) -> int:
    if verb == "help" and tokens[:1] and tokens[0] in VERBS:
        verb, tokens = tokens[0], ["--help"]
    elif verb in COMPOSING and tokens == ["help"]:
        tokens = ["--help"]
    if verb == "help":
        return _print(HELP)
    if verb not in VERBS:
        raise ConfigError(_unknown_verb(verb))
    module: _VerbModule = importlib.import_module(f"launcher.cli.{VERBS[verb]}")
    return module.run(verb, tokens)


def _unknown_verb(verb: str) -> Problem:
    import difflib

    from launcher.security.redaction import redact

    name = verb.lower()
    meant = next((own for own, others in _VERBS_ELSEWHERE.items() if name in others.split()), "")
    matches = [meant] if meant else difflib.get_close_matches(name, VERBS, n=1)
    guess = f"did you mean {matches[0]}? " if matches else ""
    return Problem(
        f"there is no command {redact(verb)}",
        where="command line",
        value=redact(verb),
        remedy=f"{guess}commands are {', '.join(VERBS)}; settings are written key=value",
    )


def _versions() -> str:
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
        if package == "torch":
            versions["torch-cuda"] = _torch_cuda()
    return "".join(f"{name:<13}{version}\n" for name, version in versions.items())


def _torch_cuda() -> str:
    """Return the CUDA version that torch was built for, from its version.py: importing torch takes seconds."""
    import re
    from importlib import metadata
    from pathlib import Path

    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (OSError, metadata.PackageNotFoundError):
        return "unknown"
    build = re.search(r"^cuda\b[^=]*=\s*(?:None|['\"]([\d.]+)['\"])", text, re.MULTILINE)
    return "unknown" if build is None else build[1] or "none"


def _print(text: str) -> int:
    print(text, end="")
    return 0
