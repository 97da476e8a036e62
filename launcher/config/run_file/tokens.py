"""Which word of a command line is the run's file; imports nothing that takes time."""

from __future__ import annotations

import os
from collections.abc import Sequence

SUFFIXES = (".yaml", ".yml")
# Files of rows. A .json may also hold settings.
ROW_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt", ".gz", ".zst")


def is_run_file(word: str) -> bool:
    """Return whether a word names a file: it ends in .yaml or .yml, or as a file of rows does, or there is a file of this name.

    Reading it refuses a file of rows, with how to name one, and a pipe.
    """
    if not word or "=" in word or word.startswith(("-", "+", "~")):
        return False
    return word.endswith((*SUFFIXES, *ROW_SUFFIXES)) or (os.path.exists(word) and not os.path.isdir(word))


def split_run_files(tokens: Sequence[str], flags_with_value: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that name a run's file, and the other words; the value of a flag is no file of a run."""
    files: list[str] = []
    others: list[str] = []
    for i, token in enumerate(tokens):
        is_value = i > 0 and tokens[i - 1] in flags_with_value
        (files if not is_value and is_run_file(token) else others).append(token)
    return files, others
