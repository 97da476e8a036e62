"""The data cache on disk: its key, and one finished folder per key, memory-mapped by all ranks and later runs.

    <root>/data/<key>/          0700
      tokens.npy      uint32    token ids; a row is the contiguous slice rows[r]:rows[r + 1]
      trained.npy     uint8     1 where the token is predicted with a loss; always 0 at a document's first token
      rows.npy        int64     row starts, and the end
      docs.npy        int64     document starts, ascending, and the end
      source.npy, num_trained.npy, ...: the columns of documents, see launcher.data.schema
      digests.bin               sizes and block digests of these arrays
      origins.npy               file, line and content of each document, see launcher.data.split
      eval/                     the same for the held-out split
      origins.json              the files that origins.npy numbers
      samples.json              a few held-out examples: prompt, prompt_ids, answer
      findings.json             findings of the checks: counts and examples
      meta.json                 written last: counts, all sizes, and digests of the origins and JSON files

Digests cover every byte that is trained on: the plan has the digest of digests.bin, which has the block digests.

The folder is built as <key>.partial under a file lock and renamed when it is complete.
No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from launcher.config.sections.data import DataSection, Source
from launcher.data.cache_dir import SHARED_CACHE_VARIABLE, cache_root, convert_os_errors, mark_used, shared_cache_root
from launcher.data.sources.reading import compute_source_digest, make_eval_source
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import DataFacts
from launcher.runs import atomic_files
from launcher.runs.locks import wait_and_hold
from launcher.security import folders
from launcher.security.redaction import redacted_command_line

# Increase this when the same sources give other tokens, rows or findings, or another layout; a test checks that.
FORMAT_VERSION = 15

# The files that AutoTokenizer reads, including config.json, because the model type selects the class.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*", "config.json"),
)
# Libraries that tokenize text, or find near duplicates.
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "rensa", "ftfy")
# Settings that change no token, or whose content is part of the key.
_NOT_IN_KEY = {"name", "path", "sources", "eval_path", "chat_template", "workers", "cache_group", "checks", "exclude"}


def cache_key(data: DataSection, tokenizer_path: str) -> str:
    """Return a hex digest of everything that determines the tokens: source bytes, tokenizer files, settings, library versions.

    Paths are excluded, so a moved or renamed file gives the same key. Raises DataError if the tokenizer's folder has no
    tokenizer, or a file cannot be read.
    """
    held_out = make_eval_source(data)
    checks = data.checks.model_dump()
    if data.checks.bad_rows == "fail":
        # An existing cache had no such rows.
        del checks["bad_rows"]
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "sources": [_make_source_key(source) for source in data.sources],
        "eval": None if held_out is None else _make_source_key(held_out),
        "settings": data.model_dump(exclude=_NOT_IN_KEY),
        # fail only judges the finished cache.
        "checks": {name: "keep" if value == "fail" else value for name, value in checks.items()},
        "template": None if data.chat_template is None else compute_file_digest(Path(data.chat_template).expanduser()),
        **({} if data.exclude is None else {"exclude": compute_file_digest(Path(data.exclude).expanduser())}),
        "libraries": [version(name) for name in _LIBRARIES],
    }
    folder = Path(tokenizer_path).expanduser()
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    # A template alone is not a tokenizer.
    if all(file.name == "config.json" or "chat_template" in file.relative_to(folder).parts[0] for file in files):
        remedy = "set model.tokenizer to a folder with tokenizer.json"
        raise DataError("the folder has no tokenizer", "model.tokenizer", str(folder), remedy)
    parts["tokenizer"] = [(file.name, compute_file_digest(file)) for file in files]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def compute_file_digest(path: Path) -> str:
    """Return a hex digest of the file's bytes. Raises DataError if it cannot be read."""
    try:
        return atomic_files.digest_file(path).xxh3_128
    except OSError as error:
        remedy = f"check the path, and the file's permissions; relative paths start at {Path.cwd()}"
        raise DataError(f"the file cannot be read: {error.strerror or error}", str(path), remedy=remedy) from error


def _make_source_key(source: Source) -> tuple[dict[str, Any], str]:
    return source.model_dump(exclude={"path", "revision"}), compute_source_digest(source)


def cache_dir(key: str, group: str | None = None) -> Path:
    """Return the folder of the cache with this key, among the caches that `group` shares if it is given."""
    if group is None:
        return cache_root() / "data" / key
    if (root := shared_cache_root()) is None:
        # No other user can enter this user's cache, so the setting would share nothing.
        message = f"data.cache_group needs a shared folder, and {SHARED_CACHE_VARIABLE} is not set"
        remedy = f"set {SHARED_CACHE_VARIABLE} to a folder that the group can write to (docs/security.md), or unset the group"
        raise DataError(message, "data.cache_group", group, remedy)
    folders.require_cache(root / f"data-{group}", group)
    return root / f"data-{group}" / key


def find_built(data: DataSection, tokenizer_path: str) -> DataFacts | None:
    """Return the counts of the finished cache for these settings; None if there is none. Raises as `cache_key` and `read` do."""
    return find(cache_key(data, tokenizer_path), data.cache_group)


def find(key: str, group: str | None = None) -> DataFacts | None:
    """Return the counts of the finished cache of `key`; None if there is none, or `read` finds a damaged file."""
    folder = cache_dir(key, group)
    facts = read(folder)
    if facts is not None:
        mark_used(folder)
    return facts


def read(folder: Path) -> DataFacts | None:
    """Return the counts of the finished cache in `folder`; None if there is none, or a file is damaged. Raises DataError.

    JSON files are compared with their digests, arrays only with their sizes, because `Split` verifies an array on use.
    """
    with convert_os_errors(folder):
        try:
            meta = read_meta(folder)
            if meta["format"] != FORMAT_VERSION:
                return None
            sizes = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
            small = {name: digest for name, digest in meta["digests"].items() if name.endswith(".json")}
            intact = sizes and all(compute_file_digest(folder / name) == digest for name, digest in small.items())
        except (FileNotFoundError, ValueError):
            return None
    return DataFacts(cache_dir=str(folder), **meta["facts"]) if intact else None


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Return the content of meta.json in a finished cache: `report`, `files` (sizes in bytes) and `digests` among it."""
    return dict(json.loads((Path(folder) / "meta.json").read_bytes()))


def id_problem(max_token_id: int, num_embeddings: int, tokenizer_path: str) -> Problem | None:
    """Return the problem of data with token ids beyond the model's embedding, where a lookup would read out of bounds."""
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
    return dict(read_meta(folder)["report"])


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Return up to four held-out examples: `prompt` (text), `prompt_ids` (with generation prompt) and `answer` (text)."""
    return list(json.loads((Path(folder) / "samples.json").read_bytes()))


def write_json(path: Path, value: Any) -> None:
    atomic_files.write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def finish(folder: Path, facts: DataFacts, report: dict[str, Any]) -> None:
    """Write meta.json, the last file of a cache."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in (folder, folder / "eval"):
        atomic_files.fsync_path(path)
    meta = {
        "format": FORMAT_VERSION,
        "facts": facts.model_dump(mode="json", exclude={"cache_dir"}),
        "report": report,
        "files": files,
        "digests": {name: compute_file_digest(folder / name) for name in files if name.endswith((".json", "origins.npy"))},
    }
    write_json(folder / "meta.json", meta)


@contextlib.contextmanager
def lock_folder(key: str, group: str | None = None) -> Iterator[Path | None]:
    """Lock the cache of `key`; yield an empty folder to fill, or None if another process has finished the cache.

    The folder must contain `meta.json` when the block ends; then it becomes the cache. It is removed if the block raises. If the
    process dies, the next builder removes it. With `group`, its members can read the cache. Raises DataError if the folder
    cannot be written, another user could write to it, or another process takes too long.
    """
    final = cache_dir(key, group)
    # In a shared folder, users cannot lock each other's files: several may build at once, and the first to finish wins.
    own = key if group is None else f"{key}-{os.geteuid()}"
    partial = final.with_name(f"{own}.partial")
    with convert_os_errors(final.parent):
        if group is None:
            final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            folders.make_shared_folder(final.parent, group)
    with contextlib.ExitStack() as stack:
        with convert_os_errors(final.parent):
            stack.enter_context(wait_and_hold(final.with_name(f"{own}.lock"), "builds this data cache", redacted_command_line()))
        if find(key, group) is not None:
            yield None
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with convert_os_errors(partial):
                partial.mkdir(mode=0o700)
                yield partial
                if group is not None:
                    folders.share(partial, group)
                    if find(key, group) is not None:
                        return
                shutil.rmtree(final, ignore_errors=True)
                atomic_files.rename(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
