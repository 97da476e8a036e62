"""The origin of each document in a data cache: its file, its line, and the hash of its content.

    origins.npy         file uint32, line int64, content uint64: one entry for each document of the training split
    eval/origins.npy    the same for the held-out split
    origins.json        the texts before the line numbers, indexed by `file`; digests of the two arrays

No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from launcher import atomic_files
from launcher.errors import DataError, Problem

FILE = "origins.npy"
TABLE = "origins.json"
_DTYPE = np.dtype([("file", "<u4"), ("line", "<i8"), ("content", "<u8")])
# The line of a document whose place does not end in a number.
_NO_LINE = -1
_PLACE = re.compile(r"(.*?)(\d{1,18})", re.DOTALL)


@dataclass(frozen=True)
class DocumentOrigins:
    """The origins of the documents of one split, in their order. `files` are the texts before the line numbers."""

    files: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def open(cls, cache_dir: str, held_out: bool = False) -> DocumentOrigins | None:
        """Read the origins of a split; None if an earlier launcher built the cache without origins.

        Raises:
            DataError: if the file is damaged.
        """
        folder = Path(cache_dir)
        file = folder / ("eval" if held_out else "") / FILE
        try:
            table = json.loads((folder / TABLE).read_bytes())
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        if xxhash.xxh3_128_hexdigest(content) != table["digests"][int(held_out)]:
            remedy = "remove the cache, and build it again with: python -m launcher data"
            raise DataError(Problem("the data cache is damaged: its record of the documents' origins", str(file), remedy=remedy))
        return cls(tuple(table["files"]), np.load(file))

    def where(self, document: int) -> str:
        """Return the file and line of a document, as the report on the data names it."""
        value = self.values[document]
        return self.files[value["file"]] + ("" if value["line"] == _NO_LINE else str(value["line"]))

    def content_id(self, document: int) -> str:
        """Return the hash of a document's text, ignoring case, white space and punctuation: 16 hex digits."""
        return f"{int(self.values[document]['content']):016x}"


def write(folder: Path, documents_by_split: Sequence[np.ndarray], wheres: Sequence[str], contents: np.ndarray) -> None:
    """Write the origins of the training and the held-out split into the folder of a cache.

    `documents_by_split` are the indices of each split's documents in `wheres` and `contents` (uint64).
    """
    numbers: dict[str, int] = {}
    entries = np.zeros(len(wheres), _DTYPE)
    entries["content"] = contents
    for i, where in enumerate(wheres):
        match = _PLACE.fullmatch(where)
        # A number with leading zeros would not be restored exactly.
        is_line = match is not None and str(int(match[2])) == match[2]
        prefix, line = (match[1], int(match[2])) if match is not None and is_line else (where, _NO_LINE)
        entries["file"][i], entries["line"][i] = numbers.setdefault(prefix, len(numbers)), line
    splits = zip((folder, folder / "eval"), documents_by_split, strict=True)
    digests = [_write_array(path / FILE, entries[documents]) for path, documents in splits]
    _write_table(folder, [*numbers], digests)


def write_held_out(folder: Path, full: Path, origins: DocumentOrigins, documents: np.ndarray) -> None:
    """Write the origins of the held-out `documents` of the cache `full` that are also in the cache in `folder`."""
    digest = json.loads((full / TABLE).read_bytes())["digests"][0]
    _write_table(folder, origins.files, [digest, _write_array(folder / "eval" / FILE, origins.values[documents])])


def _write_array(path: Path, values: np.ndarray) -> str:
    """Write an array, and return the digest of the file."""
    with path.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _write_table(folder: Path, files: Sequence[str], digests: Sequence[str]) -> None:
    atomic_files.write_text(folder / TABLE, json.dumps({"files": [*files], "digests": [*digests]}))
