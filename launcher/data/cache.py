"""The data cache on disk: one finished folder per content key, memory-mapped by every rank and every later run.

    <root>/data/<key>/          0700
      tokens.npy      uint32    token ids; a row is the contiguous slice rows[r]:rows[r + 1]
      trained.npy     uint8     1 where the token is predicted with a loss; always 0 at a document's first token
      rows.npy        int64     row starts, and the end
      docs.npy        int64     document starts, ascending, and the end
      row_labels.npy  int64     trained tokens of each row
      eval/                     the same five for the held-out split
      samples.json              a few held-out examples: prompt, prompt_ids, answer
      meta.json                 written last: counts, and the size of every file

The folder is built as <key>.partial under a file lock and renamed when it is complete.
No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
import xxhash

from launcher.config.data import DataSection
from launcher.data.sources import STDLIB_DOCS
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts

# Raised whenever the same sources would give other tokens, other rows or another layout.
FORMAT_VERSION = 1
LOCK_TIMEOUT_S = 2 * 3600.0

# What AutoTokenizer reads from its folder; config.json because the model type picks the class.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*", "config.json"),
)
_SPLIT_ARRAYS = ("tokens", "trained", "rows", "docs", "row_labels")
_READ_SIZE = 1 << 20


def cache_root() -> Path:
    """$LAUNCHER_CACHE, else $XDG_CACHE_HOME/launcher, else ~/.cache/launcher."""
    if root := os.environ.get("LAUNCHER_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "launcher"


def cache_dir(key: str) -> Path:
    return cache_root() / "data" / key


def cache_key(data: DataSection, tokenizer_path: str) -> str:
    """Hex digest of everything that decides the tokens: source bytes, tokenizer files, settings, library versions.

    Names and places are left out: a moved or renamed file gives the same key.
    Errors: DataError where the tokenizer's folder holds no tokenizer; OSError where a source cannot be read.
    """
    sources = [(s.format, _source_digest(s.path)) for s in data.sources]
    parts = {
        "format": FORMAT_VERSION,
        "sources": sources,
        "eval": None if data.eval_path is None else _source_digest(data.eval_path),
        "settings": [data.max_length, data.packing, data.eval_fraction, data.eval_max_rows],
        "tokenizer": [(file.name, _file_digest(file)) for file in _tokenizer_files(Path(tokenizer_path).expanduser())],
        "libraries": [version("transformers"), version("tokenizers")],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _source_digest(path: str) -> str:
    return f"{STDLIB_DOCS} of Python {sys.version}" if path == STDLIB_DOCS else _file_digest(Path(path).expanduser())


def _tokenizer_files(folder: Path) -> list[Path]:
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if all(file.name == "config.json" for file in files):
        remedy = "set model.tokenizer to a folder with tokenizer.json"
        raise DataError(Problem("the folder holds no tokenizer", "model.tokenizer", str(folder), remedy))
    return files


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_READ_SIZE), b""):
            digest.update(block)
    return digest.hexdigest()


def find(key: str) -> DataFacts | None:
    """Counts of the finished cache of `key`; None where there is none, or where one of its files is missing or cut."""
    return read(cache_dir(key))


def read(folder: Path) -> DataFacts | None:
    """Counts of the finished cache in `folder`, as `find` gives them."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        intact = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except FileNotFoundError:
        return None
    return DataFacts(cache_dir=str(folder), **meta["facts"]) if intact else None


def read_report(folder: str | Path) -> dict[str, Any]:
    """What the builder counted beyond DataFacts: dropped_docs, docs_with_turn_end, truncated_docs and the like."""
    report: dict[str, Any] = json.loads((Path(folder) / "meta.json").read_bytes())["report"]
    return report


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Up to four held-out examples: `prompt` (text), `prompt_ids` (with generation prompt) and `answer` (text)."""
    samples: list[dict[str, Any]] = json.loads((Path(folder) / "samples.json").read_bytes())
    return samples


@dataclass(frozen=True)
class Split:
    """One split of a cache, as memory maps; see the module's docstring for types and meaning."""

    tokens: np.ndarray
    trained: np.ndarray
    rows: np.ndarray
    docs: np.ndarray
    row_labels: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, held_out: bool = False) -> Split:
        """Map the training or the held-out split of the finished cache in `folder`; takes the same time for every size."""
        base = Path(folder) / "eval" if held_out else Path(folder)
        try:
            return cls(**{name: np.load(base / f"{name}.npy", mmap_mode="r") for name in _SPLIT_ARRAYS})
        except (OSError, ValueError) as error:
            remedy = "run `python -m launcher data` to build it again"
            raise DataError(Problem(f"the data cache cannot be read: {error}", str(base), remedy=remedy)) from error

    @property
    def num_rows(self) -> int:
        return len(self.rows) - 1

    @property
    def num_docs(self) -> int:
        return len(self.docs) - 1

    def save(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in _SPLIT_ARRAYS:
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, getattr(self, name))
                _flush_to_disk(file)

    def row_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of `rows`."""
        return np.asarray(self.rows[rows + 1] - self.rows[rows])

    def doc_borders(self, row: int) -> np.ndarray:
        """Document starts within `row`, counted from the row's start, and the row's length."""
        start, end = self.rows[row], self.rows[row + 1]
        first, last = np.searchsorted(self.docs, (start, end))
        return np.asarray(self.docs[first : last + 1] - start)


def write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        _flush_to_disk(file)


def finish(folder: Path, facts: DataFacts, report: dict[str, Any]) -> None:
    """Write meta.json, the last file of a cache."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in (folder, folder / "eval"):
        _sync_folder(path)
    write_json(folder / "meta.json", {"facts": facts.model_dump(exclude={"cache_dir"}), "report": report, "files": files})


def _flush_to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def building(key: str) -> Iterator[Path | None]:
    """Yields an empty folder to fill, or None where a finished cache exists by now; only one process at a time is inside.

    The folder must hold `meta.json` when the block ends; then it becomes the cache. Where the block raises, it is removed;
    where the process dies, the next builder removes it.
    """
    final = cache_dir(key)
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = filelock.FileLock(final.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S, mode=0o600)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        what, remedy = "another process has held this data cache for too long", "wait for it, or end it and try again"
        raise DataError(Problem(what, lock.lock_file, remedy=remedy)) from error
    try:
        if find(key) is not None:
            yield None
            return
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            yield partial
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            _sync_folder(final.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock.release()
