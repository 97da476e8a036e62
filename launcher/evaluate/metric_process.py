"""Runs metrics that may take forever, such as a user's own function, in a process that is ended after a time limit.

Without torch. The process is started once and ends with this one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from launcher.evaluate.metrics import METRICS, GeneratedAnswer, MetricOptions

TIME_LIMIT_S = 10.0
# The file of a function may import large packages.
_IMPORT_S = 120.0
_MAX_REASON_CHARS = 500


def score_in_process(metric: str, file: str, answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float | str:
    """Return the score of an answer, or why there is none.

    `metric` is a metric of the table or, if `file` is not empty, the name of a function in this file.
    """
    # The start of the process, which may import torch again from slow storage, does not count as time for an answer.
    if problem := _call(_IMPORT_S, _import, file, metric):
        return f"its file cannot be imported: {problem}" if file else problem
    return _call(TIME_LIMIT_S, _compute, metric, file, answer, reference, options)


def _call(limit_s: float, function: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of a function in the process, or why there is none."""
    process, connection = _start()
    try:
        connection.send((function, arguments))
        if connection.poll(limit_s):
            return connection.recv()
        problem = f"it took more than {limit_s:g} s for one answer"
    except (EOFError, OSError):
        problem = "it ended its process"
    process.kill()
    process.join()
    connection.close()
    _start.cache_clear()
    return problem


@functools.cache
def _start() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_serve, args=(other_end, os.getpid()), daemon=True)
    process.start()
    other_end.close()
    return process, connection


def _serve(connection: Connection, parent: int) -> None:
    # Otherwise a function that hangs would outlive a parent that is killed.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # Standard output is for the result of the command.
    os.dup2(2, 1)
    while os.getppid() == parent:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(function(*arguments))


@functools.cache
def _load(file: str, function: str) -> Callable[[str, str], Any]:
    spec = importlib.util.spec_from_file_location("user_metric", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # The file lies in the folder of the evaluation, which needs no bytecode.
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    loaded: Callable[[str, str], Any] = getattr(module, function)
    return loaded


def _import(file: str, function: str) -> str:
    try:
        if file:
            _load(file, function)
    except BaseException as error:
        return _describe(error, file)
    return ""


def _compute(metric: str, file: str, answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float | str:
    try:
        value = _load(file, metric)(answer.text, reference) if file else METRICS[metric].score(answer, reference, options)
        if isinstance(value, str | bytes) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
            return f"it returned {value!r:.60}, which is not a finite number"
        return float(value)
    except BaseException as error:
        return _describe(error, file)


def _describe(error: BaseException, file: str) -> str:
    """Return the exception, with the line of the user's file that raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS] + (f" (line {lines[-1]})" if lines else "")
