"""Worker-side processes that a command runs before it starts anything: they may import torch, the command does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher import facts
from launcher.clusters.node_command import blocked_signals
from launcher.config.schema import RunConfig
from launcher.data.cache_dir import cache_root
from launcher.data.sources.reading import find_path_problem
from launcher.errors import ConfigError, DataError, Problem, RunError, raise_reported
from launcher.plan.launch_plan import DataFacts
from launcher.security.folders import make_own_folder, private_variables

_PREPARE = "launcher.worker.prepare"
# A worker that is ended removes what it has written so far.
_TERMINATION_S = 10.0


def prepare(config: RunConfig, show: int | None = None) -> dict[str, Any]:
    """Download and convert the model and build the data cache, in another process; with `show`, report that many rows."""
    return run_reporting(_PREPARE, config, *([f"--report={show}"] if show is not None else []))


def prepare_eval_sets(config: RunConfig, kept: dict[str, DataFacts], tokenizer_path: str | None) -> dict[str, DataFacts]:
    """Return `kept`, the facts of data caches by the name of their set, and those of the other eval.sets, built where missing."""
    missing = {key: one for key, one in config.eval.sets_by_setting.items() if one.name not in kept}
    if not missing:
        return kept
    if problems := [p for key, one in missing.items() if (p := find_path_problem(f"{key}.path", one))]:
        raise ConfigError(problems)
    run_reporting(_PREPARE, config, "--eval-sets")
    built = facts.eval_set_facts(config, tokenizer_path)
    for key, one in missing.items():
        if one.name not in built:
            raise DataError(Problem("the data cache is missing or damaged right after it was built", key, remedy="try again"))
    return {**built, **kept}


def check_extra(config: RunConfig) -> None:
    """Have DeepSpeed validate `deepspeed.extra` in another process, unless it has already accepted the same value."""
    if facts.is_extra_accepted(config):
        return
    answer = run_worker_module("launcher.worker.checks.deepspeed_check", config)
    if answer["problems"]:
        raise ConfigError([Problem(*parts) for parts in answer["problems"]])


def run_worker_module(module: str, config: RunConfig | None, *arguments: str, timeout_s: float | None = None) -> dict[str, Any]:
    """Run a worker-side module with `config` on standard input; returns the JSON object in its last line.

    Raises:
        RunError: if it prints no JSON object, fails without reporting problems, or has not ended after `timeout_s`.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        code, output = run_worker(command, "" if config is None else config.model_dump_json(), subprocess.PIPE, timeout_s)
    except subprocess.TimeoutExpired:
        raise RunError(f"python -m {module} did not end within {timeout_s:.0f} s") from None
    failed = RunError(f"python -m {module} ended with exit code {code}; its messages are above")
    try:
        answer: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise failed from None
    if code and "problems" not in answer:
        raise failed
    return answer


def run_reporting(module: str, config: RunConfig | None, *arguments: str) -> dict[str, Any]:
    """Run a worker-side module that prints its answer or its problems, which become an error."""
    answer = run_worker_module(module, config, *arguments)
    raise_reported(answer)
    return answer


def run_worker(
    command: Sequence[str], stdin: str = "", stdout: int | None = None, timeout_s: float | None = None
) -> tuple[int, str]:
    """Run a worker-side process to its end; returns its exit code, and its output if `stdout` is a pipe.

    Ctrl-C reaches only this process, which ends the other one: otherwise each of its workers would print a traceback.

    Raises:
        KeyboardInterrupt: after the process has ended.
        subprocess.TimeoutExpired: if it has not ended after `timeout_s`, after it was ended.
    """
    # The process inherits the mask until it ignores the signal.
    with blocked_signals(signal.SIGINT):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, text=True, env=worker_environment())
    with process:
        try:
            output, _ = process.communicate(stdin, timeout=timeout_s)
        except BaseException:
            process.terminate()
            try:
                process.wait(_TERMINATION_S)
            except BaseException:
                process.kill()
            raise
    return process.returncode, output or ""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make TERM and HUP end the command like Ctrl-C, so that it cancels its allocation and ends its processes."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def worker_environment() -> dict[str, str]:
    """Return the environment for a worker-side module's process: this package comes first in PYTHONPATH.

    Nothing is imported from the working directory, which may belong to another user, and compiled code is loaded from this
    user's folders. Libraries' progress bars and warnings are off: they would break up the lines of launcher.tracking.progress.
    """
    # The process itself reports a folder that cannot be created.
    with suppress(OSError):
        make_own_folder(cache_root())
    root = str(Path(facts.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environ = {**quiet, **os.environ, **private_variables(os.environ)}
    return {**environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
