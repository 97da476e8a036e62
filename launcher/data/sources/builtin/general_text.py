"""English text of several kinds for measuring what a model forgets: novels, laws and computing, about 200 KB.

general_text.NOTICE.txt lists the origins of the texts, all of which are in the public domain.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import xxhash

_FILE = Path(__file__).with_name("general_text.jsonl")


@cache
def list_texts() -> tuple[str, ...]:
    """Return the texts, each about 1,500 characters long."""
    return tuple(json.loads(line)["text"] for line in _FILE.read_text(encoding="utf-8").splitlines())


def digest() -> str:
    """Return a digest of the texts."""
    return xxhash.xxh3_128_hexdigest(_FILE.read_bytes())
