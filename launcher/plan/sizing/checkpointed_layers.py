"""Which layers recompute their activations in the backward pass: the values of model.activation_checkpointing. Pure."""

from __future__ import annotations

import re

ALL, NONE, AUTO = "all", "none", "auto"
_EVERY = re.compile(r"every ([1-9][0-9]{0,3})")


def interval(checkpointing: str) -> int:
    """Return N if every Nth layer is recomputed: 1 for `all`, 0 for `none`.

    Raises:
        ValueError: for any other value, including `auto`.
    """
    if checkpointing in (ALL, NONE):
        return int(checkpointing == ALL)
    match = _EVERY.fullmatch(checkpointing)
    if match is None:
        raise ValueError(f"{checkpointing} is not all, none or every N")
    return int(match[1])


def checkpointed_layers(checkpointing: str, num_layers: int) -> tuple[bool, ...]:
    """Return, for each layer, whether it is recomputed: with `every N`, layers 0, N, 2N and so on.

    A recomputed layer needs the memory of a layer's activations a second time. If the last layer is not recomputed, its own
    activations are free by then.
    """
    every = interval(checkpointing)
    return tuple(every > 0 and layer % every == 0 for layer in range(num_layers))
