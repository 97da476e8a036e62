"""The file of data.exclude: the documents to leave out of training, one JSON object per line, by the hash of their content."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launcher import atomic_files
from launcher.errors import DataError, Problem

_CONTENT = re.compile(r"[0-9a-f]{16}")


def write_exclusions(file: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    """Write the file; each document has `content`, and anything else that helps a person identify it."""
    atomic_files.write_text(file, "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))


def read_exclusions(file: str | None) -> np.ndarray:
    """Return the hashes of the documents to leave out, uint64; empty without a file.

    Raises:
        DataError: if the file cannot be read, with the line.
    """
    contents = []
    try:
        # Not splitlines, which also splits at U+2028 and other characters in the texts of documents.
        lines = [] if file is None else Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "write it with: python -m launcher data --scored RUN --exclude FILE"
        raise DataError(
            Problem(f"the file of data.exclude cannot be read: {error}", "data.exclude", file or "", remedy)
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)["content"]
            is_content = isinstance(content, str) and _CONTENT.fullmatch(content)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_content = None
        if not is_content:
            message = "a line of data.exclude names no document"
            remedy = 'each line is a JSON object with "content": 16 hex digits, as data --scored RUN --exclude FILE writes it'
            raise DataError(Problem(message, f"{file}:{number}", line[:100], remedy))
        contents.append(int(content, 16))
    return np.asarray(contents, dtype=np.uint64)
