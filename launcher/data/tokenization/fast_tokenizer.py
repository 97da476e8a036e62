"""Tokenising text word by word from a cache: byte-level BPE tokenizers split text into words by a regular expression.

What a word becomes is asked of the tokenizer's own model once, so the tokens are those that the tokenizer gives. Texts and
tokenizers for which that is not certain are left to the tokenizer: of letters and signs beyond ASCII, those are served here that
every version of Unicode has in one class and that no normalisation changes.
"""

from __future__ import annotations

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

_LETTERS = "a-zA-ZÀ-ÖØ-öø-ÿ"
_SIGNS = "¢£¥§©«®°±·»×÷–—‘’“”•…€™"
_SERVED = re.compile(rf"[\x00-\x7f{_LETTERS}{_SIGNS}]*")


def _for_python(pattern: str) -> re.Pattern[str]:
    """A pattern of the tokenizers' engine for Python's; on the text that is served \\s means the same in both."""
    inside = pattern.replace(r"\p{L}\p{N}]", f"{_LETTERS}0-9]")
    return re.compile(inside.replace(r"\p{L}", f"[{_LETTERS}]").replace(r"\p{N}", "[0-9]"), re.ASCII)


# The expressions that are served, as they stand in tokenizer.json.
_PATTERNS = {pattern: _for_python(pattern) for pattern in (_GPT2, _QWEN2, _LLAMA3)}
# Digits apart from all else, one by one or not, and then _GPT2, in one: what ends before a digit ends for the latter.
_DIGITS_GPT2 = {
    one_by_one: _for_python(_GPT2.replace(r" ?\p{N}+", digits).replace(r"(?!\S)", r"(?![^\s0-9])"))
    for one_by_one, digits in ((True, r"\p{N}"), (False, r"\p{N}+"))
}
# Bytes without a glyph have one from 256 on, in their order (as in GPT-2's encoder).
_BYTE_GLYPHS = {byte: 256 + i for i, byte in enumerate([*range(33), *range(127, 161), 173])}
_PROBE = "I'm  here,\n\n  it's 1234 o'Clock!\t\r\n<|x|>(a_b) HE'LL--go  \n end \u2013 d\u00e9j\u00e0 \u00d77 12  3   "


class Words:
    """Encodes texts as `tokenizer` does without special tokens around them."""

    def __init__(self, tokenizer: Tokenizer, splitter: re.Pattern[str], added: dict[str, int]) -> None:
        self._split = splitter.findall
        self._added = {text: np.uint32(token).tobytes() for text, token in added.items()}
        # The longest of those that begin at one place is taken, as the tokenizer does.
        self._at_added = re.compile(f"({'|'.join(re.escape(text) for text in sorted(added, key=len, reverse=True))})")
        self._known = _Known(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._num_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        self._num_bytes[list(vocabulary.values())] = [len(token) for token in vocabulary]
        self._num_bytes[list(added.values())] = [len(text.encode()) for text in added]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(token ids uint32, number of the text's bytes up to each token's end); None where the tokenizer must be asked."""
        if not text.isascii() and not _SERVED.fullmatch(text):
            return None
        found: list[bytes] = []
        for part in self._at_added.split(text) if self._added else [text]:
            if (added := self._added.get(part)) is not None:
                found.append(added)
            elif part:
                found += map(self._known.__getitem__, self._split(part))
        ids = np.frombuffer(b"".join(found), dtype=np.uint32)
        ends = np.cumsum(self._num_bytes[ids])
        # A byte that the vocabulary lacks would be missing.
        return (ids, ends) if ends[-1:].sum() == _num_bytes(text) else None


class _Known(dict[str, bytes]):
    """Token ids of words, as the bytes of uint32 values: those of a text are joined without an object for each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model

    def __missing__(self, word: str) -> bytes:
        glyphs = word.encode().decode("latin-1").translate(_BYTE_GLYPHS)
        ids = np.asarray([token.id for token in self._model.tokenize(glyphs)], dtype=np.uint32).tobytes()
        # Encoded binaries and the like are long, and hardly come again.
        if len(word) <= MAX_WORD_CHARS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def tokens_before(text: str, borders: Sequence[int], ends: np.ndarray) -> list[int] | None:
    """Number of tokens before each of `borders`, which are positions in the text; None where one falls inside a token.

    `ends` is what Words.encode gives.
    """
    places = borders if text.isascii() else [_num_bytes(text[:border]) for border in borders]
    cuts = ends.searchsorted(places, side="right").tolist()
    exact = all(place == (ends[cut - 1] if cut else 0) for place, cut in zip(places, cuts, strict=True))
    return cuts if exact else None


def words_of(tokenizer: Tokenizer) -> Words | None:
    """The cache of words for `tokenizer`; None where it does not split ASCII text in one of the ways known here."""
    parts = json.loads(tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    splitter = _splitter(parts["pre_tokenizer"])
    plain_text = parts["normalizer"] is None or parts["normalizer"] == {"type": "NFC"}
    plain_added = not any(token[key] for token in added for key in ("lstrip", "rstrip", "single_word", "normalized"))
    if model["type"] != "BPE" or model.get("dropout") or splitter is None or not plain_text or not plain_added:
        return None
    if tokenizer.encode_special_tokens:
        return None
    words = Words(tokenizer, splitter, {token["content"]: token["id"] for token in added})
    probe = _PROBE + "".join(token["content"] for token in added if token["content"].isascii())
    found = words.encode(probe)
    return words if found and found[0].tolist() == tokenizer.encode(probe, add_special_tokens=False).ids else None


def _splitter(pre_tokenizer: dict[str, Any] | None) -> re.Pattern[str] | None:
    """An expression whose matches, one after the other, are the words; None where this cannot be told."""
    if pre_tokenizer is None:
        return None
    match pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _PATTERNS[_GPT2]
        case [
            {"type": "Digits", "individual_digits": one_by_one},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return _DIGITS_GPT2[one_by_one]
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return _PATTERNS.get(pattern)
    return None
