"""Formats counts and sizes for texts and messages."""

from __future__ import annotations

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 row` or `3,000 rows`; `plural` is for nouns with an irregular plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or f'{noun}s'}"


def format_size(num_bytes: int) -> str:
    """Return a number of bytes in a suitable unit."""
    fitting = (f"{num_bytes / factor:,.2f} {unit}" for unit, factor in _UNITS if num_bytes >= factor)
    return next(fitting, format_count(num_bytes, "byte"))
