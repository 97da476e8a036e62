"""Tokenizes text with a cache of words: byte-level BPE tokenizers split text into words by a regular expression.

The tokenizer's own model tokenizes each word once, so the tokens are the same. If that is not certain for a text or tokenizer,
the tokenizer itself is used. Beyond ASCII, only letters and signs are supported that have the same class in every version of
Unicode and that no normalization changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The cache is cleared when it reaches this many words.
MAX_WORDS = 1 << 19
MAX_WORD_CHARS = 64

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")

_LETTERS = "a-zA-ZÀ-ÖØ-öø-ÿ"
_SIGNS = "¢£¥§©«®°±·»×÷–—‘’“”•…€™"
_SUPPORTED = re.compile(rf"[\x00-\x7f{_LETTERS}{_SIGNS}]*")


def _translate_pattern(pattern: str) -> re.Pattern[str]:
    """Translate a pattern of the tokenizers library to Python; for supported text, \\s means the same in both."""
    inside = pattern.replace(r"\p{L}\p{N}]", f"{_LETTERS}0-9]")
    return re.compile(inside.replace(r"\p{L}", f"[{_LETTERS}]").replace(r"\p{N}", "[0-9]"), re.ASCII)


# The supported expressions, as in tokenizer.json.
_PATTERNS = {pattern: _translate_pattern(pattern) for pattern in (_GPT2, _QWEN2, _LLAMA3)}
# Digits are split off first, one by one or not, followed by _GPT2, in one expression: for _GPT2, text ends before a digit.
_DIGITS_GPT2 = {
    one_by_one: _translate_pattern(_GPT2.replace(r" ?\p{N}+", digits).replace(r"(?!\S)", r"(?![^\s0-9])"))
    for one_by_one, digits in ((True, r"\p{N}"), (False, r"\p{N}+"))
}
# Bytes without a printable character map to 256 and above, in their order (as in GPT-2's encoder).
_BYTE_GLYPHS = {byte: 256 + i for i, byte in enumerate([*range(33), *range(127, 161), 173])}
_PROBE = "I'm  here,\n\n  it's 1234 o'Clock!\t\r\n<|x|>(a_b) HE'LL--go  \n end \u2013 d\u00e9j\u00e0 \u00d77 12  3   "


class CachedTokenizer:
    """Encodes texts as `tokenizer` does, without adding special tokens."""

    def __init__(self, tokenizer: Tokenizer, splitter: re.Pattern[str], added: dict[str, int]) -> None:
        self._split = splitter.findall
        self._added = {text: np.uint32(token).tobytes() for text, token in added.items()}
        # Of several added tokens at one position, the longest wins, as in the tokenizer.
        self._at_added = re.compile(f"({'|'.join(re.escape(text) for text in sorted(added, key=len, reverse=True))})")
        self._word_ids = _WordCache(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._num_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        self._num_bytes[list(vocabulary.values())] = [len(token) for token in vocabulary]
        self._num_bytes[list(added.values())] = [len(text.encode()) for text in added]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (token ids uint32, byte offset of each token's end); None if the tokenizer itself must encode the text."""
        if not text.isascii() and not _SUPPORTED.fullmatch(text):
            return None
        parts: list[bytes] = []
        for part in self._at_added.split(text) if self._added else [text]:
            if (added := self._added.get(part)) is not None:
                parts.append(added)
            elif part:
                parts += map(self._word_ids.__getitem__, self._split(part))
        ids = np.frombuffer(b"".join(parts), dtype=np.uint32)
        ends = np.cumsum(self._num_bytes[ids])
        # A byte that is not in the vocabulary has no token.
        return (ids, ends) if ends[-1:].sum() == _count_bytes(text) else None


class _WordCache(dict[str, bytes]):
    """Token ids of words, as the bytes of uint32 values: joining them creates no object per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model

    def __missing__(self, word: str) -> bytes:
        glyphs = word.encode().decode("latin-1").translate(_BYTE_GLYPHS)
        ids = np.asarray([token.id for token in self._model.tokenize(glyphs)], dtype=np.uint32).tobytes()
        # Long words, such as encoded binaries, hardly ever recur.
        if len(word) <= MAX_WORD_CHARS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _count_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def count_tokens_before(text: str, boundaries: Sequence[int], ends: np.ndarray) -> list[int] | None:
    """Return the number of tokens before each boundary in the text, by the byte offsets `ends`; None if one is inside a token."""
    offsets = boundaries if text.isascii() else [_count_bytes(text[:boundary]) for boundary in boundaries]
    counts = ends.searchsorted(offsets, side="right").tolist()
    is_exact = all(offset == (ends[count - 1] if count else 0) for offset, count in zip(offsets, counts, strict=True))
    return counts if is_exact else None


def make_cached(tokenizer: Tokenizer) -> CachedTokenizer | None:
    """Return a cached tokenizer with the same tokens; None if `tokenizer` splits text in an unsupported way."""
    parts = json.loads(tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    before = parts["pre_tokenizer"] or {"type": None}
    # An expression whose consecutive matches are the words.
    splitter = None
    match before["pretokenizers"] if before["type"] == "Sequence" else [before]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            splitter = _PATTERNS[_GPT2]
        case [
            {"type": "Digits", "individual_digits": one_by_one},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            splitter = _DIGITS_GPT2[one_by_one]
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            splitter = _PATTERNS.get(pattern)
    has_plain_text = parts["normalizer"] is None or parts["normalizer"] == {"type": "NFC"}
    has_plain_added = not any(token[key] for token in added for key in ("lstrip", "rstrip", "single_word", "normalized"))
    if model["type"] != "BPE" or model.get("dropout") or splitter is None or not has_plain_text or not has_plain_added:
        return None
    if tokenizer.encode_special_tokens:
        return None
    cached = CachedTokenizer(tokenizer, splitter, {token["content"]: token["id"] for token in added})
    probe = _PROBE + "".join(token["content"] for token in added if token["content"].isascii())
    encoded = cached.encode(probe)
    return cached if encoded and encoded[0].tolist() == tokenizer.encode(probe, add_special_tokens=False).ids else None
