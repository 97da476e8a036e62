"""The key of a data cache: a digest of everything that determines its tokens.

No torch, no transformers: the submit side imports this module.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from launcher import atomic_files
from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.data.sources import compute_source_digest, make_eval_source
from launcher.errors import DataError, Problem

# Increase this when the same sources give other tokens, rows or findings, or another layout; a test checks that.
FORMAT_VERSION = 13

# The files that AutoTokenizer reads, including config.json, because the model type selects the class.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*", "config.json"),
)
# Libraries that tokenize text, or find near duplicates.
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "rensa", "ftfy")
# Settings that change no token, or whose content is part of the key.
_NOT_IN_KEY = {
    "name",
    "path",
    "sources",
    "eval_path",
    "chat_template",
    "workers",
    "cache_group",
    "checks",
    "exclude",
}


def cache_key(data: DataSection, tokenizer_path: str) -> str:
    """Return a hex digest of everything that determines the tokens: source bytes, tokenizer files, settings, library versions.

    Paths are excluded, so a moved or renamed file gives the same key.

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
        "template": None if data.chat_template is None else compute_file_digest(Path(data.chat_template).expanduser()),
        **({} if data.exclude is None else {"exclude": compute_file_digest(Path(data.exclude).expanduser())}),
        "tokenizer": [(file.name, compute_file_digest(file)) for file in _tokenizer_files(Path(tokenizer_path).expanduser())],
        "libraries": [version(name) for name in _LIBRARIES],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def compute_file_digest(path: Path) -> str:
    """Return a hex digest of the file's bytes. Raises DataError if it cannot be read."""
    try:
        return atomic_files.digest_file(path).xxh3_128
    except OSError as error:
        remedy = f"check the path, and the file's permissions; relative paths start at {Path.cwd()}"
        raise DataError(Problem(f"the file cannot be read: {error.strerror or error}", str(path), remedy=remedy)) from error


def _source_key(source: Source) -> tuple[dict[str, Any], str]:
    return source.model_dump(exclude={"path", "revision"}), compute_source_digest(source)


def _selecting_checks(checks: ChecksSection) -> dict[str, Any]:
    """Return the parts of the checks that select documents; fail only judges the finished cache."""
    settings = checks.model_dump()
    if checks.bad_rows == "fail":
        # An existing cache had no such rows.
        del settings["bad_rows"]
    return {name: "keep" if value == "fail" else value for name, value in settings.items()}


def _tokenizer_files(folder: Path) -> list[Path]:
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    # A template alone is not a tokenizer.
    if all(file.name == "config.json" or "chat_template" in file.relative_to(folder).parts[0] for file in files):
        remedy = "set model.tokenizer to a folder with tokenizer.json"
        raise DataError(Problem("the folder has no tokenizer", "model.tokenizer", str(folder), remedy))
    return files
