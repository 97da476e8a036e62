"""Decoded texts for the report on a cache: the tokenizer decodes them once, and they are stored next to the cache.

Loading a tokenizer takes longer than the rest of a report. The cache's key covers the tokenizer's files and libraries, so decoded
texts are valid as long as the cache has the same tokens.
No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from launcher import atomic_files
from launcher.errors import DataError
from launcher.plan.launch_plan import DataFacts

# Increase this when the same tokens decode to different texts.
_VERSION = 1
# Every report reads the whole file.
_MAX_BYTES = 4 << 20


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that are used here."""

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...


class TextsMissing(LookupError):
    """A text is not stored, and there is no tokenizer to decode it."""


class DecodedTexts:
    """Texts of tokens and of training documents of one cache: stored texts, and others if there is a tokenizer.

    `load_tokenizer` is called once, when a text is not stored.
    """

    def __init__(self, facts: DataFacts, load_tokenizer: Callable[[], Tokenizer] | None = None) -> None:
        self._facts = facts
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._stored: dict[str, Any] = _read(facts)
        self._used: dict[str, Any] = {}

    def token(self, token_id: int) -> str:
        """Return the token as it is in the vocabulary.

        Raises:
            TextsMissing: if it is not stored and there is no tokenizer.
        """
        token: str = self._text(f"token {token_id}", lambda tokenizer: tokenizer.convert_ids_to_tokens(token_id))
        return token

    def document(self, number: int, tokens: np.ndarray, offsets: Sequence[int]) -> list[str]:
        """Return the texts of the parts of the training document `number`; `offsets` are their boundaries in `tokens`.

        Raises:
            TextsMissing: if they are not stored and there is no tokenizer.
        """

        def decode(tokenizer: Tokenizer) -> list[str]:
            return [_decoded(tokenizer, tokens, first, end) for first, end in itertools.pairwise(offsets)]

        texts: list[str] = self._text(f"document {number}", decode)
        return texts

    def store(self) -> None:
        """Store the used texts for the next report; does nothing if nothing was decoded, or if the file cannot be written."""
        if self._tokenizer is None:
            return
        for texts in ({**self._stored, **self._used}, self._used):
            content = json.dumps({"digest": _digest(self._facts, texts), "texts": texts}).encode()
            if len(content) <= _MAX_BYTES:
                # The report does not need the file.
                with contextlib.suppress(OSError):
                    # Readable only by the owner, because rows may hold secrets.
                    atomic_files.write_bytes(_file(self._facts), content, mode=0o600)
                return

    def _text(self, name: str, decode: Callable[[Tokenizer], Any]) -> Any:
        if name not in self._used:
            self._used[name] = self._stored[name] if name in self._stored else decode(self._require_tokenizer(name))
        return self._used[name]

    def _require_tokenizer(self, name: str) -> Tokenizer:
        if self._tokenizer is None:
            if self._load_tokenizer is None:
                raise TextsMissing(name)
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer


def _decoded(tokenizer: Tokenizer, tokens: np.ndarray, first: int, end: int) -> str:
    """Return the text of tokens first:end, decoded after the previous token: some tokenizers drop the first space of a text."""
    before = max(0, first - 1)
    text, prefix = (tokenizer.decode(tokens[before:stop].tolist(), clean_up_tokenization_spaces=False) for stop in (end, first))
    return str(text[len(prefix) :])


def _file(facts: DataFacts) -> Path:
    """Return the file of the texts, next to the cache, whose folder never changes after the build."""
    folder = Path(facts.cache_dir)
    return folder.with_name(f"{folder.name}.texts.json")


def _digest(facts: DataFacts, texts: dict[str, Any]) -> str:
    """Return a digest of the texts and of the tokens that they were decoded from."""
    return xxhash.xxh3_128_hexdigest(json.dumps([_VERSION, facts.digest, texts], sort_keys=True).encode())


def _read(facts: DataFacts) -> dict[str, Any]:
    """Return the stored texts; empty if the file is missing, damaged, or belongs to other tokens."""
    file = _file(facts)
    try:
        # Members of data.cache_group store texts next to the same cache.
        content = json.loads(file.read_bytes())
        texts: dict[str, Any] = content["texts"]
        return texts if content["digest"] == _digest(facts, texts) else {}
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return {}
