"""What a mistyped key was probably meant to be."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from launcher.config.schema import RunConfig


@functools.cache
def known_keys() -> Mapping[str, str]:
    """Every setting (`data.sources[].path` for a list's items) with its description."""
    return dict(_walk(RunConfig, ""))


def _walk(model: type[BaseModel], prefix: str) -> list[tuple[str, str]]:
    keys = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        keys.append((key, field.description or ""))
        nested = section_of(field.annotation)
        if nested is not None:
            inside_list = not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
            keys += _walk(nested, f"{key}[]." if inside_list else f"{key}.")
    return keys


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class that an annotation holds, directly or as a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        if (found := section_of(part)) is not None:
            return found
    return None


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """`did you mean X? ` or nothing; a key's last part is compared too, so a wrong section is found."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not close and "." in word:
        last = word.rpartition(".")[2]
        close = [o for o in options if o.rpartition(".")[2] == last][:1]
    elif not close:
        close = [o for o in options if o.rpartition(".")[2] == word][:1]
    return f"did you mean {close[0]}? " if close else ""
