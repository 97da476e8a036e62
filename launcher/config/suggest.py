"""What a mistyped word was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """`did you mean X?` or nothing.

    For a dotted key the neighbours in its section come first, then the same last part in another section.
    """
    section, _, leaf = word.rpartition(".")
    neighbours = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(leaf, neighbours, n=1, cutoff=0.7):
        return f"did you mean {neighbours[close[0]]}?"
    # An item of a list is not what a key on the command line can name.
    same = [option for option in options if option.rpartition(".")[2] == leaf and "[]" not in option][:3]
    # `train` is close to `train.x` and no help to anyone who wrote that.
    distant = difflib.get_close_matches(word, [o for o in options if not word.startswith(f"{o}.")], n=1, cutoff=0.75)
    found = same or distant
    return f"did you mean {' or '.join(found)}?" if found else ""
