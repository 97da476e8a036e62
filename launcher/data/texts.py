"""The texts that a report shows of a cache: decoded by the tokenizer once, then kept beside the cache.

Loading a tokenizer takes longer than everything else that a report needs. The cache's key covers the tokenizer's files and
libraries, so a text that was decoded stays right as long as the cache holds the same tokens.
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
from launcher.plan.launch_plan import DataFacts

# Raised whenever the same tokens give other texts.
_VERSION = 1
# The file is read as a whole for every report.
_MAX_BYTES = 4 << 20


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...


class TextsMissing(LookupError):
    """A text is not kept, and there is no tokenizer to decode it."""


class DecodedTexts:
    """Texts of tokens and of training documents of one cache: the kept ones, and others where there is a tokenizer.

    `load_tokenizer` is called once, when a text is not kept.
    """

    def __init__(self, facts: DataFacts, load_tokenizer: Callable[[], Tokenizer] | None = None) -> None:
        self._facts = facts
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._kept: dict[str, Any] = _read(facts)
        self._used: dict[str, Any] = {}

    def token(self, token_id: int) -> str:
        """The token as its vocabulary writes it.

        Raises:
            TextsMissing: where it is not kept and there is no tokenizer.
        """
        token: str = self._text(f"token {token_id}", lambda tokenizer: tokenizer.convert_ids_to_tokens(token_id))
        return token

    def document(self, number: int, tokens: np.ndarray, borders: Sequence[int]) -> list[str]:
        """The parts of the training document `number` with these tokens, which begin and end at `borders`.

        Raises:
            TextsMissing: where they are not kept and there is no tokenizer.
        """

        def decode(tokenizer: Tokenizer) -> list[str]:
            return [_decoded(tokenizer, tokens, first, end) for first, end in itertools.pairwise(borders)]

        texts: list[str] = self._text(f"document {number}", decode)
        return texts

    def keep(self) -> None:
        """Keep what was used for the next report; without effect where nothing was decoded, or where it cannot be written."""
        if self._tokenizer is None:
            return
        for texts in ({**self._kept, **self._used}, self._used):
            content = json.dumps({"digest": _digest(self._facts, texts), "texts": texts}).encode()
            if len(content) <= _MAX_BYTES:
                # A report is whole without it.
                with contextlib.suppress(OSError):
                    # Readable by the owner only: rows may hold secrets.
                    atomic_files.write_bytes(_file(self._facts), content, mode=0o600)
                return

    def _text(self, name: str, decode: Callable[[Tokenizer], Any]) -> Any:
        if name not in self._used:
            self._used[name] = self._kept[name] if name in self._kept else decode(self._require_tokenizer(name))
        return self._used[name]

    def _require_tokenizer(self, name: str) -> Tokenizer:
        if self._tokenizer is None:
            if self._load_tokenizer is None:
                raise TextsMissing(name)
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer


def _decoded(tokenizer: Tokenizer, tokens: np.ndarray, first: int, end: int) -> str:
    """The text of tokens first:end as it stands behind the token before: some tokenizers leave out a text's first space."""
    before = max(0, first - 1)
    whole, own = (tokenizer.decode(tokens[before:until].tolist(), clean_up_tokenization_spaces=False) for until in (end, first))
    return str(whole[len(own) :])


def _file(facts: DataFacts) -> Path:
    """Beside the cache: what is in its folder was written by the builder and never changes."""
    folder = Path(facts.cache_dir)
    return folder.with_name(f"{folder.name}.texts.json")


def _digest(facts: DataFacts, texts: dict[str, Any]) -> str:
    """Digest of the texts together with the tokens that they were decoded from."""
    return xxhash.xxh3_128_hexdigest(json.dumps([_VERSION, facts.digest, texts], sort_keys=True).encode())


def _read(facts: DataFacts) -> dict[str, Any]:
    """The kept texts; none where the file is not there, is damaged, or belongs to other tokens."""
    try:
        content = json.loads(_file(facts).read_bytes())
        texts: dict[str, Any] = content["texts"]
        return texts if content["digest"] == _digest(facts, texts) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
