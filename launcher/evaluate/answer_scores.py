"""Scores answers by the configured metrics, including a user's own functions. Without torch.

Metrics that may take forever, such as a user's function, run in a process that is ended after a time limit. It is started once
and ends with this one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from launcher import atomic_files
from launcher.config.sections.evaluation import AnswerMetrics, split_function
from launcher.errors import ConfigError, DataError, Problem
from launcher.evaluate.metrics import METRICS, GeneratedAnswer, MetricOptions, schema_validator, without_thoughts
from launcher.evaluate.verdict import Scores

_SCHEMA = "metric-schema.json"
_MAX_SHOWN = 3
_MAX_VALUE_CHARS = 80
TIME_LIMIT_S = 10.0
# The file of a function may import large packages.
_IMPORT_S = 120.0
_MAX_REASON_CHARS = 500


def copy_metric_files(settings: AnswerMetrics, folder: Path) -> None:
    """Copy the schema and the functions that the configured metrics name into the folder of an evaluation.

    Every process scores with the copies: the files may change, and a path may lead to another file on other nodes.

    Raises:
        ConfigError: if a file is missing or invalid.
    """
    contents = {}
    for metric in settings.metrics:
        if metric == "json_schema":
            contents[_SCHEMA] = _read_schema(Path(settings.json_schema or "").expanduser())
        elif parts := split_function(metric):
            contents[_name_copy(settings, metric)] = _read_function(metric, Path(parts[0]).expanduser(), parts[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        atomic_files.write_bytes(folder / name, content)


def _name_copy(settings: AnswerMetrics, metric: str) -> str:
    return f"metric-{settings.metrics.index(metric)}.py"


class AnswerScorer:
    """Scores answers by each configured metric, with the files that `copy_metric_files` has put into `folder`."""

    def __init__(self, settings: AnswerMetrics, folder: Path) -> None:
        self.metrics = settings.metrics
        self._settings, self._folder = settings, folder
        schema = (folder / _SCHEMA).read_text(encoding="utf-8") if "json_schema" in settings.metrics else ""
        self._options = MetricOptions(settings.pattern or "", schema, settings.labels)

    def check_references(self, references: Sequence[str], places: Sequence[str]) -> None:
        """Refuse references that a metric cannot be computed with; `places` names the row of each, as file and line.

        Raises:
            DataError: one problem for each metric, with the first rows.
        """
        problems = []
        for metric in self.metrics:
            if metric not in METRICS:
                continue
            reasons = [METRICS[metric].reference_problem(without_thoughts(one), self._options) for one in references]
            bad = [(place, reason) for place, reason in zip(places, reasons, strict=True) if reason]
            if bad:
                shown = ", ".join(place for place, _ in bad[:_MAX_SHOWN])
                problems.append(
                    Problem(
                        f"{metric} cannot score {len(bad):,} of {len(references):,} references: the first one {bad[0][1]}",
                        where=f"{shown}{' and more' if len(bad) > _MAX_SHOWN else ''}",
                        remedy=f"choose others of {', '.join(METRICS)} with evaluate.metrics, or correct the rows",
                    )
                )
        if problems:
            raise DataError(problems)

    def score(self, metric: str, answers: Sequence[GeneratedAnswer], references: Sequence[str], places: Sequence[str]) -> Scores:
        """Return the score of each answer by a configured metric, without the thoughts that precede answers and references.

        Raises:
            DataError: with the row, if a user's function fails, or a metric takes too long.
        """
        known, function = METRICS.get(metric), split_function(metric)
        if known is None or not known.with_thoughts:
            answers = [replace(answer, text=without_thoughts(answer.text)) for answer in answers]
            references = [without_thoughts(one) for one in references]
        if known is not None and not known.may_hang:
            scores = [known.score(answer, one, self._options) for answer, one in zip(answers, references, strict=True)]
            return np.array(scores, np.float64)
        name, file = (metric, "") if function is None else (function[1], str(self._folder / _name_copy(self._settings, metric)))
        scores = []
        for answer, reference, place in zip(answers, references, places, strict=True):
            score = score_in_process(name, file, answer, reference, self._options)
            if isinstance(score, str):
                remedy = "correct what it names; nested repetitions such as (a+)+ in a pattern take very long"
                if function is not None:
                    remedy = "correct the function; it takes an answer and its reference, both texts, and returns a number"
                raise DataError(f"a metric failed: {score}", where=place, value=metric, remedy=remedy)
            scores.append(score)
        return np.array(scores, np.float64)


def _read_schema(file: Path) -> bytes:
    """Return the content of a JSON schema file that the validator accepts."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    where = "evaluate.json_schema"
    try:
        content = file.read_bytes()
        schema: Any = json.loads(content)
        validator_for(schema).check_schema(schema)
        # Finds references that lead nowhere, or only to themselves.
        schema_validator(content.decode()).is_valid({})
    except OSError as error:
        problem = Problem(f"the JSON schema cannot be read: {error.strerror}", where, str(file), "check the path")
        raise ConfigError(problem) from None
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "the root"
        message = f"the JSON schema is wrong at {place}: {error.message[:_MAX_VALUE_CHARS]}"
        raise ConfigError(message, where=where, value=str(file), remedy="correct it; see json-schema.org/learn") from None
    # An unresolvable reference is an exception of its own kind.
    except Exception as error:
        message = f"the JSON schema cannot be used: {error}"
        raise ConfigError(message, where=where, value=str(file), remedy="correct it; other files are not read") from None
    return content


def _read_function(metric: str, file: Path, function: str) -> bytes:
    """Return the content of the file of a user's function, without running it."""
    import ast

    where = "evaluate.metrics"
    # Check before opening: a pipe would never end.
    if not file.is_file():
        raise ConfigError("the file of a metric does not exist", where=where, value=metric, remedy="check the path")
    try:
        content = file.read_bytes()
        names = [node.name for node in ast.parse(content, str(file)).body if isinstance(node, ast.FunctionDef)]
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"the file of a metric cannot be read: {error}", where=str(file), remedy="correct it") from None
    if function not in names:
        remedy = f"functions there are: {', '.join(names) or 'none'}"
        raise ConfigError(f"{file} defines no function {function}", where=where, value=metric, remedy=remedy)
    return content


def score_in_process(metric: str, file: str, answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float | str:
    """Return the score of an answer, or why there is none.

    `metric` is a metric of the table or, if `file` is not empty, the name of a function in this file.
    """
    # The start of the process, which may import torch again from slow storage, does not count as time for an answer.
    if problem := _ask_process(_IMPORT_S, file, metric):
        return f"its file cannot be imported: {problem}" if file else str(problem)
    return _ask_process(TIME_LIMIT_S, file, metric, answer, reference, options)


def _ask_process(limit_s: float, *request: object) -> float | str:
    """Return the reply of the process, or why there is none."""
    process, connection = _start_process()
    try:
        connection.send(request)
        if connection.poll(limit_s):
            reply: float | str = connection.recv()
            return reply
        problem = f"it took more than {limit_s:g} s for one answer"
    except (EOFError, OSError):
        problem = "it ended its process"
    process.kill()
    process.join()
    connection.close()
    _start_process.cache_clear()
    return problem


@functools.cache
def _start_process() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_serve_scores, args=(other_end, os.getpid()), daemon=True)
    process.start()
    other_end.close()
    return process, connection


def _serve_scores(connection: Connection, parent: int) -> None:
    """Import the function of each request, score its answer, if it has one, and reply with the score or why there is none."""
    # Otherwise a function that hangs would outlive a parent that is killed.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # Standard output is for the result of the command.
    os.dup2(2, 1)
    # The functions' files lie in the folder of the evaluation, which needs no bytecode.
    sys.dont_write_bytecode = True
    functions: dict[tuple[str, str], Callable[[str, str], Any]] = {}
    while os.getppid() == parent:
        try:
            file, metric, *case = connection.recv()
        except EOFError:
            return
        reply: float | str = ""
        try:
            if file and (file, metric) not in functions:
                spec = importlib.util.spec_from_file_location("user_metric", file)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = module
                spec.loader.exec_module(module)
                functions[file, metric] = getattr(module, metric)
            if case:
                answer, reference, _ = case
                value = functions[file, metric](answer.text, reference) if file else METRICS[metric].score(*case)
                is_number = not isinstance(value, str | bytes) and hasattr(value, "__float__") and math.isfinite(float(value))
                reply = float(value) if is_number else f"it returned {value!r:.60}, which is not a finite number"
        except BaseException as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            reply = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS] + (f" (line {lines[-1]})" if lines else "")
        connection.send(reply)
