"""Finds the run's file among the words of a command line; imports nothing that loads slowly."""

from __future__ import annotations

import os
from collections.abc import Sequence

SUFFIXES = (".yaml", ".yml")
# Endings of files of rows. A .json file may also hold settings.
ROW_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt", ".gz", ".zst")


def is_run_file(word: str) -> bool:
    """Return whether a word names a file: it ends in .yaml, .yml or like a file of rows, or a file with this name exists.

    Reading the file refuses pipes, and files of rows with a remedy that shows how to name one.
    """
    if not word or "=" in word or word.startswith(("-", "+", "~")):
        return False
    return word.endswith((*SUFFIXES, *ROW_SUFFIXES)) or (os.path.exists(word) and not os.path.isdir(word))


def split_run_files(tokens: Sequence[str], flags_with_value: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that name a run's file, and the other words; the value of a flag is never a run's file."""
    files: list[str] = []
    others: list[str] = []
    for i, token in enumerate(tokens):
        is_value = i > 0 and tokens[i - 1] in flags_with_value
        (files if not is_value and is_run_file(token) else others).append(token)
    return files, others
