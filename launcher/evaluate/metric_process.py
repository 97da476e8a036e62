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
from multiprocessing.pool import Pool
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
    if file and (problem := _call(_import, _IMPORT_S, file, metric)):
        return f"its file cannot be imported: {problem}"
    return _call(_compute, TIME_LIMIT_S, metric, file, answer, reference, options)


def _call(function: Callable[..., Any], limit_s: float, *arguments: object) -> Any:
    try:
        return _pool().apply_async(function, arguments).get(limit_s)
    except multiprocessing.TimeoutError:
        _pool().terminate()
        _pool.cache_clear()
        return f"it took more than {limit_s:g} s for one answer, or ended its process"


@functools.cache
def _pool() -> Pool:
    return multiprocessing.get_context("spawn").Pool(1, _begin, (os.getpid(),))


def _begin(parent: int) -> None:
    """Let this process end with its parent, even if a function hangs, and print to standard error."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(2, 1)


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
