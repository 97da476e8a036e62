"""The data cache on disk: one finished folder per content key, memory-mapped by every rank and every later run.

    <root>/data/<key>/          0700
      tokens.npy      uint32    token ids; a row is the contiguous slice rows[r]:rows[r + 1]
      trained.npy     uint8     1 where the token is predicted with a loss; always 0 at a document's first token
      rows.npy        int64     row starts, and the end
      docs.npy        int64     document starts, ascending, and the end
      row_labels.npy  int64     trained tokens of each row
      doc_source.npy  uint16    source of each document, an index of data.sources; after the last: data.eval_path
      row_sources.npy int32     [rows, sources] tokens of each source in each row
      digests.bin               sizes and block digests of these seven
      origins.npy               file, line and content of each document, see launcher.data.sources.origins
      eval/                     the same nine for the held-out split
      origins.json              the files that origins.npy numbers, and digests of origins.npy
      samples.json              a few held-out examples: prompt, prompt_ids, answer
      findings.json             findings of the checks: counts and examples
      meta.json                 written last: counts, the size of every file, digests of the JSON files, and its own digest

Digests cover every byte that is trained on: the plan has the digest of digests.bin, which has those of the blocks.

The folder is built as <key>.partial under a file lock and renamed when it is complete.
No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from launcher import atomic_files
from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.data import digests
from launcher.data.cache_dir import SHARED_CACHE_VARIABLE, cache_root, convert_os_errors, mark_used, shared_cache_root
from launcher.data.cache_lock import wait_and_hold
from launcher.data.checks import findings
from launcher.data.digests import CheckedArray, DigestingWriter
from launcher.data.sources import compute_source_digest, make_eval_source
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts
from launcher.security import folders, ownership

# To be raised when the same sources give other tokens, rows or findings, or another layout; a test checks that.
FORMAT_VERSION = 12
# Formats with the arrays of the current one, which a run that records such a cache continues with.
_READABLE_FORMATS = (9, 10, 11, FORMAT_VERSION)

# The files that AutoTokenizer reads; config.json because the model type selects the class.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*", "config.json"),
)
# Libraries that tokenize text, or find near duplicates.
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "rensa", "ftfy")
# As large as the data; the index arrays are small in comparison and read at once.
_LARGE_ARRAYS = ("tokens", "trained")
_INDEX_ARRAYS = ("rows", "docs", "row_labels", "doc_source", "row_sources")
# Settings that change no token, or whose content is in the key.
_NOT_IN_KEY = {
    "name",
    "path",
    "sources",
    "eval_path",
    "chat_template",
    "group_by_length",
    "workers",
    "cache_group",
    "checks",
    "exclude",
}
_READ_SIZE = 1 << 20


def cache_dir(key: str, group: str | None = None) -> Path:
    """Return the folder of the cache with this key, among those that `group` shares if one is given."""
    if group is None:
        return cache_root() / "data" / key
    if (root := shared_cache_root()) is None:
        # Nobody else can enter this user's cache: the setting would share nothing.
        message = f"data.cache_group shares data caches in the folder {SHARED_CACHE_VARIABLE}, and that is not set"
        remedy = (
            f"export {SHARED_CACHE_VARIABLE} with a folder that the group can write to (docs/security.md), or unset the group"
        )
        raise DataError(Problem(message, "data.cache_group", group, remedy))
    return root / f"data-{group}" / key


def cache_key(data: DataSection, tokenizer_path: str) -> str:
    """Return the key of the data cache of these settings, the first of `cache_keys`."""
    return cache_keys(data, tokenizer_path)[0]


def cache_keys(data: DataSection, tokenizer_path: str) -> tuple[str, str]:
    """Return a hex digest of everything that determines the tokens: source bytes, tokenizer files, settings, library versions;
    and that of the same data with all of its held-out rows.

    Paths are left out: a moved or renamed file gives the same key.

    Raises:
        DataError: if the tokenizer's folder has no tokenizer, or a file cannot be read.
    """
    held_out = make_eval_source(data)
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "sources": [_source_key(source) for source in data.sources],
        "eval": None if held_out is None else _source_key(held_out),
        "settings": data.model_dump(exclude=_NOT_IN_KEY),
        "checks": _selecting_checks(data.checks),
        "template": None if data.chat_template is None else _file_digest(Path(data.chat_template).expanduser()),
        **({} if data.exclude is None else {"exclude": _file_digest(Path(data.exclude).expanduser())}),
        "tokenizer": [(file.name, _file_digest(file)) for file in _tokenizer_files(Path(tokenizer_path).expanduser())],
        "libraries": [version(name) for name in _LIBRARIES],
    }
    full = {**parts, "settings": {**parts["settings"], "eval_max_rows": None}}
    key, full_key = (xxhash.xxh3_128_hexdigest(json.dumps(one, sort_keys=True).encode()) for one in (parts, full))
    return key, full_key


def _source_key(source: Source) -> tuple[dict[str, Any], str]:
    return source.model_dump(exclude={"path", "revision"}), compute_source_digest(source)


def _selecting_checks(checks: ChecksSection) -> dict[str, Any]:
    """Return the checks as far as they select documents; fail only judges the finished cache."""
    settings = checks.model_dump(exclude={*findings.LIMITS.values()})
    if checks.bad_rows == "fail":
        # A cache that exists had no such rows.
        del settings["bad_rows"]
    return {name: "keep" if value == "fail" else value for name, value in settings.items()}


def _tokenizer_files(folder: Path) -> list[Path]:
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if all(file.name == "config.json" for file in files):
        remedy = "set model.tokenizer to a folder with tokenizer.json"
        raise DataError(Problem("the folder has no tokenizer", "model.tokenizer", str(folder), remedy))
    return files


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(_READ_SIZE), b""):
                digest.update(block)
    except OSError as error:
        message, remedy = f"the file cannot be read: {error.strerror or error}", "check its permissions and the disk"
        raise DataError(Problem(message, str(path), remedy=remedy)) from error
    return digest.hexdigest()


def find_built(data: DataSection, tokenizer_path: str) -> DataFacts | None:
    """Return the counts of the finished cache of these settings; None if there is none. Raises: as `cache_keys` and `read`."""
    key, full_key = cache_keys(data, tokenizer_path)
    facts = find(key, data.cache_group)
    if facts is None and key != full_key:
        full = find(full_key, data.cache_group)
        # With all held-out rows within the limit, both are the same.
        facts = full if full is not None and full.num_eval_rows <= (data.eval_max_rows or 0) else None
    return facts


def find(key: str, group: str | None = None) -> DataFacts | None:
    """Return the counts of the finished cache of `key`; None if there is none, or `read` finds a damaged file."""
    folder = cache_dir(key, group)
    facts = read(folder, group)
    if facts is not None:
        mark_used(folder)
    return facts


def read(folder: Path, group: str | None = None) -> DataFacts | None:
    """Return the counts of the finished cache in `folder`; None if there is none, or a file is damaged.

    JSON files are compared with their digests, arrays only with their sizes: `Split` verifies an array when it is used.
    Digests do not tell who wrote a cache: owner and permissions do. `group` is data.cache_group.

    Raises:
        DataError: if the cache cannot be read, or others could have written it.
    """
    with convert_os_errors(folder):
        ownership.require_cache(folder, group)
        try:
            meta = _verified_meta((folder / "meta.json").read_bytes())
            if meta is None or meta["format"] not in _READABLE_FORMATS:
                return None
            sizes = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
            intact = sizes and all(_file_digest(folder / name) == digest for name, digest in meta["digests"].items())
        except FileNotFoundError:
            return None
    return DataFacts(cache_dir=str(folder), **meta["facts"]) if intact else None


def _verified_meta(content: bytes) -> dict[str, Any] | None:
    """Return the values of a meta.json; None if it does not match its digest."""
    try:
        meta = json.loads(content)
    except ValueError:
        return None
    is_intact = isinstance(meta, dict) and meta.pop("digest", None) == _meta_digest(meta)
    return meta if is_intact else None


def _meta_digest(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())


def file_sizes(folder: str | Path) -> dict[str, int]:
    """Return the bytes of each file with which the finished cache in `folder` was built, by its path; without meta.json."""
    return dict(json.loads((Path(folder) / "meta.json").read_bytes())["files"])


def num_bytes(folder: str | Path) -> int:
    """Return the size in bytes of the finished cache in `folder`."""
    return sum(file_sizes(folder).values())


def id_problem(max_token_id: int, num_embeddings: int, tokenizer_path: str) -> Problem | None:
    """Return the problem of data with token ids beyond the model's embedding: such a lookup reads out of bounds."""
    if max_token_id < num_embeddings:
        return None
    return Problem(
        f"the data contains the token id {max_token_id}, but the model's embedding has {num_embeddings} rows",
        where="model.tokenizer",
        value=tokenizer_path,
        remedy="set model.tokenizer to the model's own tokenizer, or use a model whose vocab_size covers all token ids",
    )


def read_report(folder: str | Path) -> dict[str, Any]:
    """Return the counts of the build beyond DataFacts: of the training split, the held-out split, and each source."""
    report: dict[str, Any] = json.loads((Path(folder) / "meta.json").read_bytes())["report"]
    return report


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Return up to four held-out examples: `prompt` (text), `prompt_ids` (with generation prompt) and `answer` (text)."""
    samples: list[dict[str, Any]] = json.loads((Path(folder) / "samples.json").read_bytes())
    return samples


@dataclass(frozen=True)
class Split:
    """One split of a cache, as memory maps; the docstring of the module describes the arrays."""

    tokens: np.ndarray | CheckedArray
    trained: np.ndarray | CheckedArray
    rows: np.ndarray
    docs: np.ndarray
    row_labels: np.ndarray
    doc_source: np.ndarray
    row_sources: np.ndarray

    @classmethod
    def open(cls, facts: DataFacts, held_out: bool = False) -> Split:
        """Map the training or the held-out split of the finished cache that `facts` describe.

        Each block of `tokens` and `trained` is verified before its first use; their first blocks and all other arrays here.

        Raises:
            DataError: if the cache cannot be read, is not the one that `facts` describe, or is damaged.
        """
        cache = Path(facts.cache_dir)
        folder = cache / "eval" if held_out else cache
        digest = facts.digest.split("-")[-1 if held_out else 0]
        names = (*_LARGE_ARRAYS, *_INDEX_ARRAYS)
        arrays: dict[str, Any] = {}
        try:
            files = digests.open_files(folder, cache, [f"{name}.npy" for name in names], digest)
            for name, file in zip(names, files, strict=True):
                is_large = name in _LARGE_ARRAYS
                # The first block has the header, which numpy reads to map the file.
                file.verify(0, 1 if is_large else None)
                values = np.load(file.path, mmap_mode="r")
                arrays[name] = CheckedArray(values, file) if is_large else values
        # Other storage errors may be temporary, and the ranks are restarted for them.
        except (FileNotFoundError, ValueError) as error:
            remedy = "`python -m launcher data ...` with the same settings builds it again"
            raise DataError(Problem(f"the data cache cannot be read: {error}", str(folder), remedy=remedy)) from error
        return cls(**arrays)

    def verify(self) -> None:
        """Verify all blocks that are not verified yet. Raises: DataError if a block is damaged."""
        for array in (self.tokens, self.trained):
            if isinstance(array, CheckedArray):
                array.verify()

    @property
    def num_rows(self) -> int:
        return len(self.rows) - 1

    @property
    def num_docs(self) -> int:
        return len(self.docs) - 1

    def row_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each of `rows`."""
        return np.asarray(self.rows[rows + 1] - self.rows[rows])

    def row_tokens(self, row: int) -> slice:
        """Return the positions of the tokens of `row`."""
        return slice(self.rows[row], self.rows[row + 1])

    def row_docs(self, row: int) -> slice:
        """Return the indices of the documents of `row`."""
        return slice(*np.searchsorted(self.docs, self.rows[row : row + 2]).tolist())

    def doc_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each document in `rows`, row by row."""
        first, last = (np.searchsorted(self.docs, self.rows[starts]) for starts in (rows, rows + 1))
        counts = last - first
        docs = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        return np.asarray(self.docs[docs + 1] - self.docs[docs])

    def doc_offsets(self, row: int) -> np.ndarray:
        """Return the start of each document relative to the start of `row`, and the length of the row."""
        docs = self.row_docs(row)
        return np.asarray(self.docs[docs.start : docs.stop + 1] - self.rows[row])


def write_split(folder: Path, tokens: Iterable[np.ndarray], trained: Iterable[np.ndarray], **others: np.ndarray) -> str:
    """Write the arrays of a split and their digests into `folder`; return the hex digest of the digests.

    `tokens` and `trained` are iterables of parts, since a whole split may not fit in memory.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    num_tokens = int(others["rows"][-1])
    of_arrays = [
        _write_array(folder / "tokens.npy", np.dtype(np.uint32), (num_tokens,), tokens),
        _write_array(folder / "trained.npy", np.dtype(np.uint8), (num_tokens,), trained),
        *(_write_array(folder / f"{n}.npy", others[n].dtype, others[n].shape, [others[n]]) for n in _INDEX_ARRAYS),
    ]
    return digests.write(folder, of_arrays)


def _write_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> list[int]:
    """Write an array in parts; return its size in bytes and the digests of its blocks."""
    with path.open("wb") as file:
        writer = DigestingWriter(file)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(writer, header)
        for part in parts:
            writer.write(np.ascontiguousarray(part).data)
        _flush_to_disk(file)
    return writer.digests()


def write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        _flush_to_disk(file)


def finish(folder: Path, facts: DataFacts, report: dict[str, Any]) -> None:
    """Write meta.json, the last file of a cache."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in (folder, folder / "eval"):
        atomic_files.fsync_directory(path)
    meta = {
        "format": FORMAT_VERSION,
        "facts": facts.model_dump(mode="json", exclude={"cache_dir"}),
        "report": report,
        "files": files,
        "digests": {name: _file_digest(folder / name) for name in files if name.endswith(".json")},
    }
    # The digest of the values as they are read back.
    meta["digest"] = _meta_digest(json.loads(json.dumps(meta)))
    write_json(folder / "meta.json", meta)


def _flush_to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def building(key: str, group: str | None = None) -> Iterator[Path | None]:
    """Lock the cache of `key`; yield an empty folder to fill, or None if another process has finished the cache.

    The folder must have `meta.json` when the block ends; then it becomes the cache. It is removed if the block raises; if the
    process dies, the next builder removes it. With `group`, its members can read the cache.

    Raises:
        DataError: if the folder cannot be written, others could write to it, or another process takes too long.
    """
    final = cache_dir(key, group)
    # In a shared folder users cannot lock each other's files: several may build at once, and the first to finish wins.
    own = key if group is None else f"{key}-{os.geteuid()}"
    partial = final.with_name(f"{own}.partial")
    with convert_os_errors(final.parent):
        if group is None:
            final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            folders.make_shared_folder(final.parent, group)
    with contextlib.ExitStack() as stack:
        with convert_os_errors(final.parent):
            stack.enter_context(wait_and_hold(final.with_name(f"{own}.lock"), "builds this data cache"))
        if find(key, group) is not None:
            yield None
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with convert_os_errors(partial):
                partial.mkdir(mode=0o700)
                # Storage may give what root writes to nobody: the finished cache would be refused after hours of work.
                descriptor = stack.enter_context(folders.open_folder(partial))
                ownership.require_cache(partial, group)
                yield partial
                if group is not None:
                    folders.share(descriptor, partial, group)
                    if find(key, group) is not None:
                        return
                shutil.rmtree(final, ignore_errors=True)
                atomic_files.rename(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
