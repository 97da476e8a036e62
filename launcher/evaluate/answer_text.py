"""What is read out of an answer: words, numbers, JSON. The same for every side, the reference included. Without torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

_ARTICLES = frozenset({"a", "an", "the"})
# At the edges of words only: 3.5, C++ and -5 stay what they are.
_EDGES = ".,;:!?\"'()[]{}<>«»“”‘’`*_…"
# The sign of "5-3" belongs to no number. Digits are those of ASCII.
_NUMBER = re.compile(r"(?:(?<!\w)[-−+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_FINAL = re.compile(r"####|\banswer\s*(?:is|:|=)", re.IGNORECASE)
_FENCE = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
_WORD = re.compile(r"\w+")


def normalized_words(text: str) -> list[str]:
    """Return the words in lower case, without articles and without punctuation at their edges.

    Close to the normalization of SQuAD (Rajpurkar et al., arXiv:1606.05250), except that punctuation inside a word stays.
    """
    words = [word.strip(_EDGES) for word in unicodedata.normalize("NFKC", text).casefold().split()]
    words = [word for word in words if word]
    # An answer that is the letter A keeps it.
    return [word for word in words if word not in _ARTICLES] or words


def final_number(text: str) -> Decimal | None:
    """Return the number that an answer ends with, as in GSM8K; None where it has none.

    That is the first number after the last `####` or `answer is`, or else the last number.
    """
    ends = [match.end() for match in _FINAL.finditer(text)]
    after = _NUMBER.search(text, ends[-1]) if ends else None
    numbers = [after[0]] if after else _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


class NotJson(ValueError):
    """The text is not JSON."""


def parse_json(text: str) -> Any:
    """Parse a text that is JSON, or the JSON in its only block between Markdown fences.

    Raises:
        NotJson: where it is neither. NaN and infinities are no JSON.
    """
    blocks = _FENCE.findall(text)
    try:
        return json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def json_fields(value: Any) -> Counter[tuple[str, str]]:
    """Return how often each pair of a path and a value occurs. The order of lists does not count."""
    return Counter(_fields(value, ""))


def _fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, f"{path}[]")
    elif isinstance(value, str):
        yield path, f"text {' '.join(normalized_words(value))}"
    elif isinstance(value, bool) or value is None:
        yield path, json.dumps(value)
    elif isinstance(value, int | float):
        yield path, f"number {float(value)!r}"
    else:
        yield path, "empty object" if isinstance(value, dict) else "empty list"


def multiset_f1(answer: Counter[Any], reference: Counter[Any]) -> float:
    """Return the harmonic mean of precision and recall of two multisets; 1 where both are empty."""
    if not answer and not reference:
        return 1.0
    shared = (answer & reference).total()
    return 2 * shared / (answer.total() + reference.total())


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of ROUGE-L: the longest common subsequence of words (Lin, 2004), without stemming."""
    first, second = (_WORD.findall(unicodedata.normalize("NFKC", text).casefold()) for text in (answer, reference))
    if not first or not second:
        return float(first == second)
    return 2 * _common_length(first, second) / (len(first) + len(second))


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, 64 and more columns of the table at a time.

    The bit-vector algorithm of Hyyrö, "Bit-Parallel LCS-length Computation Revisited" (2004).
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        matches = row & positions.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(first) - row.bit_count()


def repeated_share(text: str, size: int = 4) -> float:
    """Return the share of the runs of `size` words that occurred in the text before."""
    words = text.casefold().split()
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that the text is, or else the one that it names first; None where it names none.

    Labels are found as whole words, without regard to case; of several at the same place, the longest.
    """
    words = normalized_words(text)
    best: tuple[int, int, str] | None = None
    for label in labels:
        wanted = normalized_words(label)
        for start in range(len(words) - len(wanted) + 1):
            if wanted and words[start : start + len(wanted)] == wanted:
                place = (start, -len(wanted), label)
                best = place if best is None else min(best, place)
                break
    return None if best is None else best[2]
