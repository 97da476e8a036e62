"""Unicode normalization in bounded time: Python sorts the combining marks of a character with the square of their number.

A row of a megabyte, all of it marks on one letter, would take an hour, during which the process reacts to no signal.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

# No text has as many marks on a character. The grapheme joiner after so many is that of the Stream-Safe Text Format, UAX #15.
_MAX_MARKS = 30
_JOINER = "\u034f"


def to_nfkc(text: str) -> str:
    """Return a text in the normalization form NFKC, with a grapheme joiner after each 30 marks on one character."""
    # The check alone takes linear time, and is true for most texts.
    if unicodedata.is_normalized("NFKC", text):
        return text
    return unicodedata.normalize("NFKC", _many_marks().sub(rf"\g<0>{_JOINER}", text))


@functools.cache
def _many_marks() -> Any:
    import regex

    return regex.compile(rf"\p{{M}}{{{_MAX_MARKS}}}(?=\p{{M}})")
