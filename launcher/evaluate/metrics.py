"""How an answer is scored against its reference: the table of metrics, and scoring by them and by a user's functions.

Every score is a fraction from 0 to 1, and higher is better. To add a metric, add a row to METRICS and its name to `MetricName`
in launcher/config/sections/evaluation.py. Words, numbers and JSON are extracted in the same way on every side, including the
reference.

Metrics that may take forever, such as a user's function, have a time limit. Without torch.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import signal
import sys
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config.sections.evaluation import AnswerMetrics, split_function
from launcher.errors import ConfigError, DataError, Problem, describe
from launcher.runs import atomic_files

_MAX_SHOWN = 3
TIME_LIMIT_S = 10.0
_MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer, `num_tokens` without those that end it. `is_stopped` is False if the maximum length cut it off."""

    text: str
    is_stopped: bool
    num_tokens: int


@dataclass(frozen=True)
class MetricOptions:
    """Settings for the metrics that need them."""

    pattern: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerMetric:
    """One way to score an answer.

    Attributes:
        score: returns the score of an answer, from 0 to 1, given the reference and the options.
        reference_problem: returns why a reference is unsuitable for comparison; empty if it is suitable.
        with_thoughts: whether it scores what a reasoning model writes before its answer, too.
        may_hang: whether an answer may make it take forever, so that it has a time limit.
    """

    score: Callable[[GeneratedAnswer, str, MetricOptions], float]
    reference_problem: Callable[[str, MetricOptions], str] = lambda reference, options: ""
    with_thoughts: bool = False
    may_hang: bool = False


def _count_words(text: str) -> Counter[str]:
    # Chinese and Japanese words count as their characters.
    return Counter(part for word in normalized_words(text) for part in _SPLIT.findall(word))


def _score_number(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    number = final_number(answer.text)
    if _is_joined_number(answer.text):
        return False
    return number is not None and number == final_number(reference)


def _find_number_problem(reference: str, options: MetricOptions) -> str:
    if final_number(reference) is None:
        return "has no number"
    if _is_joined_number(reference):
        return "ends with a time, a date, a power or a decimal comma, which are not compared as numbers"
    return ""


def _score_pattern(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    """With a group named `answer`, compare its last match with the reference; without, return whether the pattern matches."""
    found = _find_last_match(answer.text, options)
    if found is None or "answer" not in found.groupdict():
        return found is not None
    expected = _find_last_match(reference, options)
    words = (found["answer"], reference if expected is None else expected["answer"])
    return normalized_words(words[0] or "") == normalized_words(words[1] or "")


def _find_last_match(text: str, options: MetricOptions) -> re.Match[str] | None:
    return max(re.finditer(options.pattern, text), key=lambda one: one.end(), default=None)


def _find_json_problem(text: str) -> str:
    try:
        parse_json(text)
    except NotJson as error:
        return f"is not JSON ({error})"
    return ""


def _score_fields(answer: GeneratedAnswer, reference: str, options: MetricOptions) -> float:
    try:
        fields = json_fields(parse_json(answer.text))
    except NotJson:
        return False
    return multiset_f1(fields, json_fields(parse_json(reference)))


def _find_label_problem(reference: str, options: MetricOptions) -> str:
    if first_label(reference, options.labels or (reference,)) is None:
        return f"has none of the labels {', '.join(options.labels[:10])}" if options.labels else "is empty"
    return ""


# Keyed by the name in evaluate.metrics.
METRICS: dict[str, AnswerMetric] = {
    "exact_match": AnswerMetric(lambda answer, reference, options: normalized_words(answer.text) == normalized_words(reference)),
    "token_f1": AnswerMetric(lambda answer, reference, options: multiset_f1(_count_words(answer.text), _count_words(reference))),
    "rouge_l": AnswerMetric(lambda answer, reference, options: rouge_l(answer.text, reference)),
    "numeric": AnswerMetric(_score_number, _find_number_problem),
    "regex": AnswerMetric(_score_pattern, may_hang=True),
    "valid_json": AnswerMetric(lambda answer, reference, options: not _find_json_problem(answer.text)),
    "field_f1": AnswerMetric(_score_fields, lambda reference, options: _find_json_problem(reference)),
    "label_accuracy": AnswerMetric(
        lambda answer, reference, options: (
            first_label(answer.text, options.labels or (reference,)) == first_label(reference, options.labels or (reference,))
        ),
        _find_label_problem,
    ),
    "stopped": AnswerMetric(lambda answer, reference, options: answer.is_stopped),
    "no_repetition": AnswerMetric(lambda answer, reference, options: 1 - repeated_share(answer.text), with_thoughts=True),
}


_ARTICLES = frozenset({"a", "an", "the"})
# Removed only at the edges of words: 3.5, C++ and -5 stay unchanged.
_EDGES = ".,;:!?\"'()[]{}<>«»“”‘’`*_…"
# Of other scripts: categories of Unicode without dashes, which may be signs of numbers; and punctuation that is a unit.
_PUNCTUATION, _UNITS = ("Po", "Ps", "Pe", "Pi", "Pf"), "‰‱′″٪"
# The sign in "5-3" is not part of a number, nor is the point in "...5", nor are the digits in "m^2" and "H2O".
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+][$€£¥]?)?(?<![A-Za-z_^0-9])"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?!\w))?"
    # A fraction, unless it is part of a date.
    r"(?:(?<![/.,][0-9])(?<![/.,][0-9]{2})(?<![/.,][0-9]{4}) ?/ ?[1-9][0-9]{0,8}(?![0-9./,]*[/][0-9])(?![.,]?[0-9]))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{\s?(-?[0-9]+)\s?\}\s?\{\s?([0-9]+)\s?\}|([0-9])\s?([0-9]))")
_POWER_OF_TEN = re.compile(r"\s?(?:[x×*·]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?([-+]?[0-9]{1,4})\}?(?![0-9])")
# Around a number that is part of a time, a date, a number with a decimal comma, or a power.
_JOINED_BEFORE, _JOINED_AFTER = (
    re.compile(r"[0-9][:/,]\Z|[0-9]-[0-9]{2}-\Z"),
    re.compile(r"[:/][0-9]|,[0-9]{1,2}(?![0-9])| ?(?:\^|\*\*)"),
)
# Longer numbers are repetitions, and Python refuses to convert them.
_MAX_NUMBER_CHARS = 400
_DIGITS = str.maketrans("０１２３４５６７８９−–－．，／", "0123456789---.,/")
# Signs that separate words, as in {"label":"positive"}, but not the point in 3.5.
_SEPARATORS = re.compile(r"(?<![0-9])[.,]|[.,](?![0-9])|[^\w\s'’+#.,-]|—")
_FINAL = re.compile(r"####|\banswer\s*(?:is|:|=)", re.IGNORECASE)
_FENCE = re.compile(r"```[\w-]*\r?\n(.*?)```", re.DOTALL)
# Chinese and Japanese have no spaces: each character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SPLIT = re.compile(rf"[{_UNSPACED}]|[^{_UNSPACED}]+")
# What a reasoning model writes before its answer. Some templates end a prompt with the opening mark.
_THOUGHT_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def without_thoughts(text: str) -> str:
    """Return what follows the thoughts of a reasoning model; empty if they do not end."""
    for opening, closing in _THOUGHT_MARKS:
        _, found, answer = text.rpartition(closing)
        if found:
            return answer.lstrip()
        if text.lstrip().startswith(opening):
            return ""
    return text


def normalized_words(text: str) -> list[str]:
    """Return the words in lower case, without articles and without punctuation at their edges.

    Close to the normalization of SQuAD (Rajpurkar et al., arXiv:1606.05250), except that punctuation inside a word stays.
    """
    parts, words = unicodedata.normalize("NFKC", text).casefold().split(), []
    for part in parts:
        start, end = 0, len(part)
        while start < end and _is_edge(part[start]):
            start += 1
        while start < end and _is_edge(part[end - 1]):
            end -= 1
        words += [part[start:end]] if start < end else []
    # An answer that is just the letter A keeps it, and so does one that is only punctuation.
    return [word for word in words if word not in _ARTICLES] or words or parts


def _is_edge(character: str) -> bool:
    if character in _EDGES:
        return True
    return not character.isascii() and character not in _UNITS and unicodedata.category(character) in _PUNCTUATION


def final_number(text: str) -> Fraction | None:
    """Return the number that an answer ends with, as in GSM8K; None if it has none.

    This is the first number after the last `####`, `answer is` or `answer:`, or else the last number. Fractions and powers of ten
    are numbers too, such as 3/4, \\frac{3}{4} and 3 x 10^8.
    """
    found = _find_final_number(_write_plain_numbers(text))
    if found is None:
        return None
    if len(found[0]) > _MAX_NUMBER_CHARS:
        return None
    number, _, divisor = re.sub(r"[ ,$€£¥]", "", found[0]).partition("/")
    return Fraction(number) / int(divisor or 1)


def _is_joined_number(text: str) -> bool:
    """Return whether the final number belongs to a time, a date, a number with a decimal comma or a power."""
    plain = _write_plain_numbers(text)
    found = _find_final_number(plain)
    if found is None:
        return False
    return bool(_JOINED_BEFORE.search(plain, 0, found.start()) or _JOINED_AFTER.match(plain, found.end()))


def _write_plain_numbers(text: str) -> str:
    """Return the text with fractions as 3/4 and powers of ten as 3e8."""

    def fraction(match: re.Match[str]) -> str:
        whole = " " if match.start() and match.string[match.start() - 1].isdigit() else ""
        return f"{whole}{match[1] or match[3]}/{match[2] or match[4]}"

    return _POWER_OF_TEN.sub(r"e\1", _FRACTION.sub(fraction, text.translate(_DIGITS)))


def _find_final_number(text: str) -> re.Match[str] | None:
    ends = [match.end() for match in _FINAL.finditer(text)]
    after = _NUMBER.search(text, ends[-1]) if ends else None
    return after or max(_NUMBER.finditer(text), key=lambda match: match.start(), default=None)


class NotJson(ValueError):
    """The text is not JSON."""


def parse_json(text: str) -> Any:
    """Parse a text that is JSON, or that contains JSON in its only fenced Markdown block.

    Raises:
        NotJson: if it is neither. NaN and infinities are not JSON.
    """

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    blocks = _FENCE.findall(text)
    try:
        return json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None


def json_fields(value: Any) -> Counter[tuple[str, str]]:
    """Return how often each pair of a path and a value occurs. The order of lists is ignored.

    Raises:
        NotJson: if it is nested too deeply.
    """
    try:
        return Counter(_list_fields(value, ""))
    except RecursionError:
        raise NotJson("it is nested too deeply") from None


def _list_fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _list_fields(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _list_fields(item, f"{path}[]")
    elif isinstance(value, str):
        yield path, f"text {' '.join(normalized_words(value))}"
    elif isinstance(value, bool) or value is None:
        yield path, json.dumps(value)
    elif isinstance(value, int | float):
        # Do not convert to float, because an integer may be too large for it.
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        yield path, f"number {number!r}"
    else:
        yield path, "empty object" if isinstance(value, dict) else "empty list"


def multiset_f1(answer: Counter[Any], reference: Counter[Any]) -> float:
    """Return the harmonic mean of precision and recall of two multisets; 1 if both are empty."""
    if not answer and not reference:
        return 1.0
    shared = (answer & reference).total()
    return 2 * shared / (answer.total() + reference.total())


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of ROUGE-L: the longest common subsequence of words (Lin, 2004), without stemming."""
    first, second = (_WORD.findall(unicodedata.normalize("NFKC", text).casefold()) for text in (answer, reference))
    if not first and not second:
        return float(normalized_words(answer) == normalized_words(reference))
    # The length of the longest common subsequence, computing at least 64 columns of the table at a time: the bit-vector
    # algorithm of Hyyrö, "Bit-Parallel LCS-length Computation Revisited" (2004).
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    row = every = (1 << len(first)) - 1
    for word in second:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & every
    return 2 * (len(first) - row.bit_count()) / (len(first) + len(second))


def repeated_share(text: str) -> float:
    """Return the share of the runs of four words that occurred earlier in the text."""
    words = text.casefold().split()
    runs = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that equals the text, or else the label that it names first; None if it names none.

    Labels match whole words, ignoring case; of several at the same position, the longest wins. If an article is a label, such as
    the letter A, it matches only as written, or where no word can follow.
    """
    own_words = {label: normalized_words(label) for label in labels}
    articles = [label.strip(f"{_EDGES} ") for label, words in own_words.items() if len(words) == 1 and words[0] in _ARTICLES]
    if not any(_SEPARATORS.search(word) for words in own_words.values() for word in words):
        # A sign after the letter A shows that it is not an article.
        text = _SEPARATORS.sub(r"\g<0> " if articles else " ", text)
    words = [] if articles else normalized_words(text)
    parts = unicodedata.normalize("NFKC", text).split() if articles else []
    for number, part in enumerate(parts, start=1):
        word = part.strip(_EDGES)
        folded = word.casefold()
        can_stand_before_a_word = number < len(parts) and part[-1] not in _EDGES
        if word and (folded not in _ARTICLES or word in articles or not can_stand_before_a_word):
            words.append(folded)
    best: tuple[int, int, str] | None = None
    for label, wanted in own_words.items():
        for start in range(len(words) - len(wanted) + 1):
            if wanted and words[start : start + len(wanted)] == wanted:
                place = (start, -len(wanted), label)
                best = place if best is None else min(best, place)
                break
    return None if best is None else best[2]


def copy_metric_files(settings: AnswerMetrics, folder: Path) -> None:
    """Copy the functions of the configured metrics into an evaluation's folder: files may change, or differ on other nodes."""
    contents = {}
    for metric in settings.metrics:
        if parts := split_function(metric):
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
        self._options = MetricOptions(settings.pattern or "", settings.labels)

    def check_references(self, references: Sequence[str], places: Sequence[str]) -> None:
        """Refuse references that a metric cannot be computed with; `places` names the row of each, as file and line."""
        problems = []
        # A user's own functions come without a check.
        for metric in filter(METRICS.__contains__, self.metrics):
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

    def score(
        self, metric: str, answers: Sequence[GeneratedAnswer], references: Sequence[str], places: Sequence[str]
    ) -> np.ndarray:
        """Return the score of each answer by a configured metric, without the thoughts that precede answers and references."""
        known = METRICS.get(metric)
        if known is None or not known.with_thoughts:
            answers = [replace(answer, text=without_thoughts(answer.text)) for answer in answers]
            references = [without_thoughts(one) for one in references]
        if known is not None and not known.may_hang:
            scores = [known.score(answer, one, self._options) for answer, one in zip(answers, references, strict=True)]
            return np.array(scores, np.float64)
        where = file = "" if known else str(self._folder / _name_copy(self._settings, metric))
        scores = []
        try:
            compute = known.score if known else _import_function(file, metric.rpartition(":")[2])
            for answer, reference, place in zip(answers, references, places, strict=True):
                where = place
                with _time_limit():
                    value = compute(answer, reference, self._options)
                if isinstance(value, str | bytes) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
                    raise ValueError(f"it returned {value!r:.60}, which is not a finite number")
                scores.append(float(value))
        # A function may raise anything, and may exit.
        except (Exception, SystemExit) as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            reason = describe(error)[:_MAX_REASON_CHARS] + (f" (line {lines[-1]})" if lines else "")
            remedy = "correct the function; it takes an answer and its reference, both texts, and returns a number"
            if known:
                remedy = "correct the pattern; nested repetitions such as (a+)+ take very long"
            raise DataError(f"a metric failed: {reason}", where=where, value=metric, remedy=remedy) from None
        return np.array(scores, np.float64)


def _read_function(metric: str, file: Path, function: str) -> bytes:
    """Return the content of the file of a user's function, without running it."""
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


def _import_function(file: str, function: str) -> Callable[[GeneratedAnswer, str, MetricOptions], Any]:
    """Import a function from a file; the result scores an answer by its text."""
    spec = importlib.util.spec_from_file_location("user_metric", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The folder of the evaluation needs no bytecode.
    sys.dont_write_bytecode = True
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    own = getattr(module, function)
    return lambda answer, reference, options: own(answer.text, reference)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in the block, which must be in the main thread, once it takes longer than TIME_LIMIT_S."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it took more than {TIME_LIMIT_S:g} s for one answer")

    earlier = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
