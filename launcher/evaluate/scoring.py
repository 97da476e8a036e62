"""Scores answers by the configured metrics, including a user's own functions. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher import atomic_files, json_records
from launcher.config.sections.answer_metrics import AnswerMetrics, split_function
from launcher.errors import ConfigError, DamagedRun, DataError, Problem
from launcher.evaluate.answer_text import without_thoughts
from launcher.evaluate.json_schema import schema_validator
from launcher.evaluate.metric_process import MetricProcess
from launcher.evaluate.metrics import METRICS, GeneratedAnswer, MetricOptions
from launcher.evaluate.statistics import Scores
from launcher.security import ownership

_FILES = "metric-files.json"
_MAX_SHOWN = 3
_MAX_FILE_BYTES = 2**20
_MAX_VALUE_CHARS = 80


@dataclass(frozen=True)
class CopiedFunction:
    """A user's function: the file of its copy in the folder of the evaluation, the file's SHA-256, and the function's name."""

    file: str
    sha256: str
    function: str


@dataclass(frozen=True)
class MetricFiles:
    """metric-files.json: files that an evaluation's metrics use, as at its start: a JSON schema, functions by metric."""

    schema: str = ""
    functions: dict[str, CopiedFunction] = field(default_factory=dict)


def copy_metric_files(settings: AnswerMetrics, folder: Path) -> None:
    """Copy the schema and the functions that the configured metrics name into the folder of an evaluation.

    Every process scores with the copies: the files may change, and a path may lead to another file on other nodes.

    Raises:
        ConfigError: if a file is missing or invalid, or another user could have changed it.
    """
    schema = _read_schema(settings.json_schema, settings.metric_time_limit_s) if "json_schema" in settings.metrics else ""
    functions, contents = {}, {}
    for metric in settings.metrics:
        if metric not in METRICS and (parts := split_function(metric)):
            content = _read_function(metric, Path(parts[0]).expanduser(), parts[1])
            digest = hashlib.sha256(content).hexdigest()
            functions[metric] = CopiedFunction(f"{Path(parts[0]).stem}-{digest[:16]}.py", digest, parts[1])
            contents[functions[metric].file] = content
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        atomic_files.write_bytes(folder / name, content)
    json_records.write(folder / _FILES, MetricFiles(schema, functions))


class AnswerScorer:
    """Scores answers by each configured metric, with the files that `copy_metric_files` has put into `folder`.

    Raises:
        DamagedRun: if they are missing, or a function's copy has changed.
    """

    def __init__(self, settings: AnswerMetrics, folder: Path) -> None:
        self.metrics = settings.metrics
        self._limit_s = settings.metric_time_limit_s
        self._folder = folder
        needs_files = any(metric not in METRICS or metric == "json_schema" for metric in settings.metrics)
        remedy = "start the evaluation again"
        self._files = json_records.read(MetricFiles, folder / _FILES, remedy) if needs_files else MetricFiles()
        self._options = MetricOptions(settings.pattern or "", self._files.schema, settings.labels, self._limit_s)
        for one in self._files.functions.values():
            copy = folder / one.file
            if not copy.is_file() or hashlib.sha256(copy.read_bytes()).hexdigest() != one.sha256:
                raise DamagedRun("the copy of a metric has changed", where=str(copy), remedy=remedy)

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
                        remedy="choose other metrics with evaluate.metrics, or correct the rows",
                    )
                )
        if problems:
            raise DataError(problems)

    def score(self, metric: str, answers: Sequence[GeneratedAnswer], references: Sequence[str], places: Sequence[str]) -> Scores:
        """Return the score of each answer by a configured metric, without the thoughts that precede answers and references.

        Raises:
            DataError: if a user's function fails or takes too long, or a regular expression takes too long; with the row.
        """
        if metric not in METRICS or not METRICS[metric].with_thoughts:
            answers = [replace(answer, text=without_thoughts(answer.text)) for answer in answers]
            references = [without_thoughts(one) for one in references]
        if metric in METRICS:
            table = METRICS[metric]
            scores = []
            for answer, reference, place in zip(answers, references, places, strict=True):
                try:
                    scores.append(table.score(answer, reference, self._options))
                except DataError as error:
                    raise DataError(f"{error.problems[0].message}, in row {place}", **_parts(error.problems[0])) from None
            return np.array(scores, np.float64)
        copied = self._files.functions[metric]
        with MetricProcess(metric, self._folder / copied.file, copied.function, self._limit_s) as process:
            rows = zip(answers, references, places, strict=True)
            return np.array([process.score(answer, reference, place) for answer, reference, place in rows], np.float64)


def _parts(problem: Problem) -> dict[str, str]:
    return {"where": problem.where, "value": problem.value, "remedy": problem.remedy}


def _read_schema(path: str | None, time_limit_s: float) -> str:
    """Return the text of a JSON schema file that the validator accepts and whose references all lead to a schema."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable

    where, file = "evaluate.json_schema", Path(path or "").expanduser()
    # It decides the scores, and a relative path may lead into another user's working directory.
    if problem := ownership.file_problem("the JSON schema", file):
        raise ConfigError(problem)
    try:
        text = atomic_files.read_short_text(file, _MAX_FILE_BYTES + 1)
        schema: Any = json.loads(text)
        validator_for(schema).check_schema(schema)
        _check_references(schema)
    except OSError as error:
        problem = Problem(f"the JSON schema cannot be read: {error.strerror}", where, str(path), "check the path")
        raise ConfigError(problem) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema is not JSON: {error}", where=where, value=str(path), remedy="correct it") from None
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "the root"
        message = f"the JSON schema is wrong at {place}: {error.message[:_MAX_VALUE_CHARS]}"
        raise ConfigError(message, where=where, value=str(path), remedy="correct it; see json-schema.org/learn") from None
    except Unresolvable as error:
        message = f"the JSON schema has a reference that cannot be resolved: {error.ref[:_MAX_VALUE_CHARS]}"
        remedy = "move the schema that it names into $defs of this file: other files and addresses are not read"
        raise ConfigError(message, where=where, value=str(path), remedy=remedy) from None
    try:
        for example in ("{}", "[]", '""', "0", "null"):
            schema_validator(text, time_limit_s).is_valid(json.loads(example))
    except RecursionError:
        message = "the JSON schema has circular references"
        raise ConfigError(message, where=where, value=str(path), remedy="correct it; see json-schema.org/learn") from None
    return text


def _check_references(schema: Any) -> None:
    """Check every schema that a JSON schema's references lead to.

    Raises:
        Unresolvable: if a reference leads nowhere.
        SchemaError: if a reference leads to something that is not a schema.
    """
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    dialect = schema.get("$schema", "") if isinstance(schema, dict) else ""
    specification = specification_with(dialect, default=DRAFT202012)
    root = specification.create_resource(schema)
    resolver = REGISTRY.with_resource(root.id() or "", root).resolver(root.id() or "")
    waiting = [(root, resolver)]
    # Compared by identity, because a schema may refer to itself.
    checked: set[int] = set()
    while waiting:
        part, resolver = waiting.pop()
        if id(part.contents) in checked or not isinstance(part.contents, dict):
            continue
        checked.add(id(part.contents))
        for key in ("$ref", "$dynamicRef"):
            if isinstance(reference := part.contents.get(key), str):
                try:
                    named = resolver.lookup(reference)
                except (Unresolvable, ValueError):
                    # The error may name only a part of the reference.
                    raise Unresolvable(ref=reference) from None
                if not isinstance(named.contents, dict | bool):
                    raise Unresolvable(ref=reference)
                validator_for(schema).check_schema(named.contents)
                waiting.append((specification.create_resource(named.contents), named.resolver))
        waiting += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


def _read_function(metric: str, file: Path, function: str) -> bytes:
    """Return the content of the file of a user's function, without running it."""
    import ast

    where = "evaluate.metrics"
    # Check before opening: a pipe would never end.
    if not file.is_file():
        raise ConfigError("the file of a metric does not exist", where=where, value=metric, remedy="check the path")
    if problem := ownership.file_problem("the file of a metric", file):
        raise ConfigError(problem)
    try:
        content = file.read_bytes()
        tree = ast.parse(content, str(file))
    except OSError as error:
        message = f"the file of a metric cannot be read: {error.strerror}"
        raise ConfigError(message, where=where, value=metric, remedy="check its permissions") from None
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"the file of a metric is not Python: {error}", where=f"{file}{line}", remedy="correct it") from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in names:
        shown = f"functions there are {', '.join(names)}" if names else "the file defines no function at its top level"
        raise ConfigError(f"{file} defines no function {function}", where=where, value=metric, remedy=shown)
    return content
