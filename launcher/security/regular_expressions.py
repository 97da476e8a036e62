"""Compiles untrusted regular expressions within bounds: nested counts, as in ((a{999}){999}){999}, multiply.

The module `regex`, unlike `re`, has a time limit for each search.
"""

from __future__ import annotations

import functools
from typing import Any

from launcher.security.memory_limit import bounded_memory

_MAX_CHARS, _MAX_BYTES = 10_000, 512 << 20


@functools.cache
def compile_bounded(pattern: str) -> Any:
    """Compile a regular expression whose searches take a `timeout`.

    Raises:
        ValueError: with the reason, if it is invalid or takes too much memory.
    """
    import regex

    if len(pattern) > _MAX_CHARS:
        raise ValueError(f"it has more than {_MAX_CHARS:,} characters")
    try:
        with bounded_memory(_MAX_BYTES):
            return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(str(error)) from None
    except (MemoryError, OverflowError, RecursionError):
        raise ValueError("it is nested too deeply, or its repetitions take too much memory") from None
