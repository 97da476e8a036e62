"""Formats counts, sizes and lists of names for texts and messages."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun, such as `1 row` or `3,000 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_size(num_bytes: int) -> str:
    """Return a number of bytes in a suitable unit."""
    fitting = (f"{num_bytes / factor:,.2f} {unit}" for unit, factor in _UNITS if num_bytes >= factor)
    return next(fitting, format_count(num_bytes, "byte"))


def list_first(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first names, at most `most`, and how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
