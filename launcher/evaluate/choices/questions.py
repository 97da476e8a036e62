"""Questions with choices, read from a file of JSON lines: the question, its choices, and which one is right. Without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.data.sources.files import read_lines
from launcher.errors import DataError, Problem
from launcher.plan.quantities import format_count

# Names of the three parts in data sets on the Hub. Case is ignored: `answerKey` also matches.
QUESTION_KEYS = ("question", "prompt", "ctx", "query")
CHOICE_KEYS = ("choices", "options", "endings")
ANSWER_KEYS = ("answer", "answerKey", "label", "gold", "target")
_FORM = (
    'write lines such as {"question": "2+2?", "choices": ["3", "4"], "answer": 1}, where the answer is an index from 0 or a text'
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_SHOWN = 80


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices; `answer` is the index of the right one."""

    where: str
    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, limit: int | None) -> list[ChoiceQuestion]:
    """Return the questions of a file, at most the first `limit`.

    Raises:
        DataError: with every kind of invalid line, how often it occurs, and where it occurs first.
    """
    questions: list[ChoiceQuestion] = []
    problems: dict[str, list[Problem]] = {}
    try:
        for number, line in _lines(path):
            if limit is not None and len(questions) >= limit:
                break
            where = f"{path}:{number}"
            try:
                questions.append(_parse(json.loads(line), where))
            except (ValueError, RecursionError):
                shown = line[:_MAX_SHOWN].decode(errors="replace").strip()
                problems.setdefault("json", []).append(Problem("the line is not JSON", where, shown, _FORM))
            except DataError as error:
                (problem,) = error.problems
                problems.setdefault(problem.message, []).append(problem)
    except OSError as error:
        raise DataError(Problem(f"the questions cannot be read: {error.strerror}", where=str(path))) from error
    if problems:
        raise DataError([_counted(several) for several in problems.values()])
    if not questions:
        raise DataError(Problem("the file has no questions", where=str(path), remedy=_FORM))
    return questions


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(read_lines(file, str(path)), 1) if line.strip())


def _counted(problems: Sequence[Problem]) -> Problem:
    first = problems[0]
    message = first.message if len(problems) == 1 else f"{first.message} ({format_count(len(problems), 'line')})"
    return Problem(message, first.where, first.value, first.remedy)


def _parse(row: Any, where: str) -> ChoiceQuestion:
    if not isinstance(row, dict):
        raise DataError(Problem("the line is not an object", where, remedy=_FORM))
    question = next((row[key] for key in QUESTION_KEYS if key in row), None)
    if not isinstance(question, str) or not question.strip():
        raise DataError(Problem("a line has no question", where, f"fields {', '.join(map(str, row))}"[:_MAX_SHOWN], _FORM))
    choices = next((row[key] for key in CHOICE_KEYS if key in row), None)
    labels: Any = ()
    if isinstance(choices, dict):
        labels, choices = choices.get("label", ()), choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one.strip() for one in choices):
        raise DataError(Problem("a question needs two or more choices", where, str(choices)[:_MAX_SHOWN], _FORM))
    if len({*choices}) < len(choices):
        raise DataError(Problem("a question has the same choice twice", where, str(choices)[:_MAX_SHOWN], "remove one of them"))
    value = next((row[key] for key in ANSWER_KEYS if key in row), None)
    answer = _find_answer(value, choices, [str(one) for one in labels] if isinstance(labels, list) else [])
    if answer is None:
        remedy = f"give its index from 0 to {len(choices) - 1}, its letter, or its text"
        raise DataError(Problem("the answer to a question is not one of its choices", where, str(value)[:_MAX_SHOWN], remedy))
    return ChoiceQuestion(where, question, tuple(choices), answer)


def _find_answer(value: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """Return the index of the right choice, which may be given as text, label, letter or index."""
    if isinstance(value, str):
        letters = list(_LETTERS[: len(choices)])
        digits = [str(number) for number in range(len(choices))]
        names = next((names for names in (list(choices), labels, letters, digits) if value in names), None)
        value = None if names is None else names.index(value)
    return value if type(value) is int and 0 <= value < len(choices) else None
