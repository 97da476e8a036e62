"""Which tensors of an export hold which parameters and buffers of the model; imports torch only if that must be found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import CheckpointError, ConfigError
from launcher.models.weight_files import read_header, weight_files

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredNames:
    """The stored tensors (name, shape) of each parameter or buffer that files store differently from the model.

    `are_original` is false if it is not known how the original model's files store them.
    """

    tensors: dict[str, tuple[tuple[str, Shape], ...]]
    are_original: bool


def find_stored_names(built: Any, saved: Mapping[str, Shape]) -> StoredNames:
    """Find the stored names of `saved` parameters and buffers of a transformers model, which may be on the meta device."""
    from launcher.export.original_format import find_stored_tensors

    stored = find_stored_tensors(built, saved)
    return StoredNames({name: tuple(tensors) for name, tensors in (stored or {}).items()}, are_original=stored is not None)


def try_to_find_stored_names(find_folder: Callable[[], Path], trust_remote_code: bool, saved: Mapping[str, Shape]) -> StoredNames:
    """Find the stored names by a folder's config; the names of the model if transformers cannot build it here."""
    from launcher.export.parity import build_on_meta

    try:
        return find_stored_names(build_on_meta(find_folder(), trust_remote_code), saved)
    except CheckpointError:
        return StoredNames({}, are_original=False)


def stores_as_is(model: Path | Mapping[str, Any], saved: Mapping[str, Shape]) -> bool:
    """Return whether the base model's own files store all tensors under their names in the model."""
    if not isinstance(model, Path):
        return False
    try:
        files = [file for file in weight_files(model, with_pickled=False) if file.is_file()]
        return saved.keys() <= {name for file in files for name in read_header(file)}
    except (ConfigError, OSError):
        return False
