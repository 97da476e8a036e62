"""The origin of each document in a data cache: its file, its line, and the hash of its content.

    origins.npy         file uint32, line int64, content uint64: one entry for each document of the training split
    eval/origins.npy    the same for the held-out split
    origins.json        the texts before the line numbers, indexed by `file`

No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from launcher.data.cache import cache_store
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
    def open(cls, cache_dir: str, held_out: bool = False) -> DocumentOrigins:
        """Read the origins of a split. Raises DataError if a file is damaged."""
        name = f"eval/{FILE}" if held_out else FILE
        content = Path(cache_dir, name).read_bytes()
        if xxhash.xxh3_128_hexdigest(content) != cache_store.read_meta(cache_dir)["digests"][name]:
            where, remedy = str(Path(cache_dir, name)), "remove the cache, and build it again with: python -m launcher data"
            raise DataError(Problem("the data cache is damaged: its record of the documents' origins", where, remedy=remedy))
        return cls(tuple(json.loads(Path(cache_dir, TABLE).read_bytes())), np.load(io.BytesIO(content)))

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
    for path, documents in zip((folder, folder / "eval"), documents_by_split, strict=True):
        with (path / FILE).open("wb") as file:
            np.save(file, entries[documents])
            file.flush()
            os.fsync(file.fileno())
    cache_store.write_json(folder / TABLE, [*numbers])
