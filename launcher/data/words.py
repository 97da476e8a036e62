"""Tokenising ASCII text word by word from a cache: byte-level BPE tokenizers split text into words by a regular expression.

What a word becomes is asked of the tokenizer's own model once, so the tokens are those that the tokenizer gives. Texts and
tokenizers for which that is not certain are left to the tokenizer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Words in the cache; where more come, it begins anew.
MAX_WORDS = 1 << 19
MAX_WORD_CHARS = 64

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _for_ascii(pattern: str) -> re.Pattern[str]:
    """A pattern of the tokenizers' engine for Python's; on ASCII text \\s means the same in both."""
    inside = pattern.replace(r"\p{L}\p{N}]", "a-zA-Z0-9]")
    return re.compile(inside.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]"), re.ASCII)


# The expressions that are served, as they stand in tokenizer.json.
_ASCII = {pattern: _for_ascii(pattern) for pattern in (_GPT2, _QWEN2, _LLAMA3)}
_DIGITS = {True: re.compile("[0-9]|[^0-9]+"), False: re.compile("[0-9]+|[^0-9]+")}
# Bytes without a glyph have one from 256 on, in their order (as in GPT-2's encoder).
_BYTE_GLYPHS = {byte: 256 + i for i, byte in enumerate([*range(33), 127])}
_PROBE = "I'm  here,\n\n  it's 1234 o'Clock!\t\r\n<|x|>(a_b) HE'LL--go  \n end   "


class Words:
    """Encodes ASCII texts as `tokenizer` does without special tokens around them."""

    def __init__(self, tokenizer: Tokenizer, splitters: list[re.Pattern[str]], added: dict[str, int]) -> None:
        self._splitters = splitters
        self._added = added
        # The longest of those that begin at one place is taken, as the tokenizer does.
        self._at_added = re.compile(f"({'|'.join(re.escape(text) for text in sorted(added, key=len, reverse=True))})")
        self._known = _Known(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._num_chars = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        self._num_chars[list(vocabulary.values())] = [len(token) for token in vocabulary]

    def encode(self, text: str) -> tuple[list[int], np.ndarray] | None:
        """(token ids, position behind each token in the text); None where the tokenizer must be asked."""
        if not text.isascii():
            return None
        ids: list[int] = []
        for part in self._at_added.split(text) if self._added else [text]:
            if (added := self._added.get(part)) is not None:
                ids.append(added)
            elif part:
                ids += itertools.chain.from_iterable(map(self._known.__getitem__, self._split(part)))
        ends = np.cumsum(self._num_chars[ids])
        # A byte that the vocabulary lacks would be missing.
        return (ids, ends) if ends[-1:].sum() == len(text) else None

    def _split(self, text: str) -> list[str]:
        words = [text]
        for splitter in self._splitters:
            words = splitter.findall(words[0]) if len(words) == 1 else [w for word in words for w in splitter.findall(word)]
        return words


class _Known(dict[str, tuple[int, ...]]):
    """Token ids of words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.translate(_BYTE_GLYPHS)))
        # Encoded binaries and the like are long, and hardly come again.
        if len(word) <= MAX_WORD_CHARS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def tokens_before(borders: Sequence[int], ends: np.ndarray) -> list[int] | None:
    """Number of tokens before each of `borders`, which are positions in the text; None where one falls inside a token."""
    cuts = np.searchsorted(ends, borders, side="right")
    exact = np.concatenate([[0], ends])[cuts] == borders
    return cuts.tolist() if exact.all() else None


def words_of(tokenizer: Tokenizer) -> Words | None:
    """The cache of words for `tokenizer`; None where it does not split ASCII text in one of the ways known here."""
    parts = json.loads(tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    splitters = _splitters(parts["pre_tokenizer"])
    plain_text = parts["normalizer"] is None or parts["normalizer"] == {"type": "NFC"}
    plain_added = not any(token[key] for token in added for key in ("lstrip", "rstrip", "single_word", "normalized"))
    if model["type"] != "BPE" or model.get("dropout") or splitters is None or not plain_text or not plain_added:
        return None
    if tokenizer.encode_special_tokens:
        return None
    words = Words(tokenizer, splitters, {token["content"]: token["id"] for token in added})
    probe = _PROBE + "".join(token["content"] for token in added if token["content"].isascii())
    found = words.encode(probe)
    return words if found and found[0] == tokenizer.encode(probe, add_special_tokens=False).ids else None


def _splitters(pre_tokenizer: dict[str, Any] | None) -> list[re.Pattern[str]] | None:
    """Expressions whose matches, one after the other, are the words; None where this cannot be told."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found: list[re.Pattern[str]] = []
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex} if step is steps[-1]:
                return [*found, _ASCII[_GPT2]] if use_regex else found or None
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} if pattern in _ASCII:
                found.append(_ASCII[pattern])
            case {"type": "Digits", "individual_digits": individual}:
                found.append(_DIGITS[individual])
            case _:
                return None
    return None
