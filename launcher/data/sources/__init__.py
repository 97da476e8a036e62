"""Reads documents from the data sources; no torch, no transformers.

An unusable row is an error that names its place; no row is skipped silently.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from launcher.config.sections.data import ChecksSection, DataSection, RowSource, Source
from launcher.data.sources import locate
from launcher.data.sources.builtin import BUILTINS
from launcher.data.sources.documents import Chat, Completion, Document, Message, PlainText
from launcher.data.sources.files import BLOCK_ROWS, Block, parse_block, read_blocks, split_block
from launcher.data.sources.files import count_rows as _count_rows
from launcher.data.sources.formats import FORMATS, detect_format, rename_columns
from launcher.data.sources.keys import RowKeys
from launcher.data.sources.row_problems import RowProblems
from launcher.data.sources.row_values import Row, refuse
from launcher.data.sources.splits import HELD_OUT
from launcher.errors import DataError, Problem

__all__ = [
    "BLOCK_ROWS",
    "Chat",
    "Completion",
    "Document",
    "DocumentBatch",
    "Message",
    "PlainText",
    "RowProblems",
    "check_sources",
    "compute_source_digest",
    "count_rows",
    "describe_origin",
    "find_path_problem",
    "find_row_problems",
    "find_shared_completions",
    "list_inputs",
    "list_usable",
    "make_eval_source",
    "parse_usable",
    "read_batches",
    "read_documents",
]

HELD_OUT_NAME = "held_out"
# For batches in which no row can be parsed.
_ANY_FORMAT = "text"


def make_eval_source(data: DataSection) -> Source | None:
    """Return data.eval_path as a source; None if it is unset.

    Subset, revision, format, completions, columns and ignored keys are taken from a source with the same path. The last four are
    taken from all sources if they agree.
    """
    if data.eval_path is None:
        return None
    read = [source for source in data.sources if source.path not in BUILTINS]
    same = next((source for source in read if source.path == data.eval_path), None)
    alike = (
        len({(source.format, source.completions, source.ignored_keys, *sorted(source.columns.items())) for source in read}) == 1
    )
    like = same or (read[0] if alike else None)
    return Source(
        name=HELD_OUT_NAME,
        path=data.eval_path,
        format=like.format if like else "auto",
        completions=like.completions if like else "auto",
        columns=like.columns if like else {},
        ignored_keys=like.ignored_keys if like else (),
        subset=same.subset if same else None,
        revision=same.revision if same else None,
        split=data.eval_split or (HELD_OUT if locate.has_splits(data.eval_path) else None),
    )


def list_inputs(data: DataSection) -> list[Source]:
    """Return the sources, followed by the file of data.eval_path as a source, if it is set."""
    held_out = make_eval_source(data)
    return [*data.sources, *([held_out] if held_out is not None else [])]


def find_shared_completions(data: DataSection) -> str:
    """Return how all sources write prompts with completions; auto if they differ, so that each prompt decides."""
    completions = {source.completions for source in list_inputs(data) if source.is_read}
    return completions.pop() if len(completions) == 1 else "auto"


def check_sources(data: DataSection) -> list[Problem]:
    """Return the problems that are visible without reading files or the network: paths that are missing, empty, or not data."""
    sources = {f"data.sources[{i}].path": source for i, source in enumerate(data.sources)}
    if (held_out := make_eval_source(data)) is not None:
        sources["data.eval_path"] = held_out
    return [problem for key, source in sources.items() if (problem := find_path_problem(key, source))]


def find_path_problem(key: str, source: RowSource) -> Problem | None:
    """Return the problem of a source's path that is visible without reading files or the network; `key` is its setting."""
    value = source.path
    if value in BUILTINS:
        return None
    if value.startswith("builtin:"):
        remedy = f"set {key} to a data file; the built-in data sets are {' and '.join(BUILTINS)}"
        return Problem("there is no such built-in data set", key, value, remedy)
    return None if locate.is_url(value) or locate.is_hub(value) else locate.local_problem(key, source)


def compute_source_digest(source: Source) -> str:
    """Return a text that changes with the source's bytes, not with its name or path. Raises DataError."""
    return BUILTINS[source.path].digest() if source.path in BUILTINS else locate.find_files(source).digest()


def describe_origin(source: Source) -> dict[str, Any]:
    """Return the origin of the source's rows, for the report. Raises DataError."""
    if source.path in BUILTINS:
        origin = {"digest": xxhash.xxh3_128_hexdigest(compute_source_digest(source).encode()), "commit": None}
        return {**origin, "files": [], "num_files": 0, "left_out": [], "num_left_out": 0}
    return locate.describe_origin(source)


def count_rows(source: Source) -> int:
    """Return an upper bound of the number of documents in `source`, for progress; blank lines are counted."""
    if source.path in BUILTINS:
        return BUILTINS[source.path].count()
    return sum(_count_rows(file.path, file.name) for file in locate.find_files(source).fetch())


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Consecutive documents of a source; picklable.

    `rows` is either a block that `documents` parses, or documents, each with True if the source itself holds it out.
    """

    rows: Block | tuple[tuple[Document, bool], ...]
    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()

    @property
    def brings_split(self) -> bool:
        return not isinstance(self.rows, Block)

    def split(self) -> Iterator[DocumentBatch]:
        """Yield a batch per row, so that rows next to an unusable row can be read. Raises DataError as `documents` does."""
        rows = split_block(self.rows) if isinstance(self.rows, Block) else ((row,) for row in self.rows)
        for row in rows:
            yield replace(self, rows=row)

    def documents(self, unread_keys: Counter[str]) -> Iterator[tuple[Document, bool]]:
        """Yield each document with True if the source itself holds it out; add counts of unread keys to `unread_keys`.

        Raises:
            DataError: if a row cannot be used, with its place.
        """
        if not isinstance(self.rows, Block):
            yield from self.rows
            return
        parse = FORMATS[self.format].parse
        keys = RowKeys.of(self.format, self.columns, self.ignored_keys)
        for row, where in parse_block(self.rows):
            yield parse(rename_columns(keys.check(row, where, unread_keys), self.columns, where), where), False


def read_batches(source: Source, on_problem: Callable[[DataError], None] | None = None) -> Iterator[DocumentBatch]:
    """Yield the source's documents in batches, unparsed if possible. The format `auto` means that of the first row with
    the keys of a known format.

    If given, `on_problem` is called for an unreadable file, and reading continues with the other files.

    Raises:
        DataError: if a file cannot be read, with the place.
    """
    if source.path in BUILTINS:
        of_source = BUILTINS[source.path].read()
        while documents := tuple(itertools.islice(of_source, BLOCK_ROWS)):
            yield DocumentBatch(documents)
        return
    format: str = "" if source.format == "auto" else source.format
    has_rows = False
    for file in locate.find_files(source).fetch():
        try:
            for block in read_blocks(file.path, file.name):
                if not (format and has_rows):
                    rows, is_unreadable = _parse_readable(block)
                    has_rows = has_rows or bool(rows) or is_unreadable
                    format = format or _detect_format(rows, source)
                yield DocumentBatch(block, format or _ANY_FORMAT, source.columns, source.ignored_keys)
        except DataError as error:
            if on_problem is None:
                raise
            has_rows = True
            on_problem(error)
    if not has_rows:
        refuse("the source holds no rows", source.path, "add rows to it, or remove the source")


def _parse_readable(block: Block) -> tuple[list[tuple[Row, str]], bool]:
    """Return the rows of a block that can be parsed, and whether there are others."""
    rows: list[tuple[Row, str]] = []
    is_unreadable = False
    for one in split_block(block):
        try:
            rows += parse_block(one)
        except DataError:
            is_unreadable = True
    return rows, is_unreadable


def _detect_format(rows: Sequence[tuple[Row, str]], source: Source) -> str:
    """Return the format of the first row that has the keys of one; empty without rows. Raises DataError for the first row."""
    keys = RowKeys.of("", source.columns, source.ignored_keys)
    first: DataError | None = None
    for row, where in rows:
        try:
            return detect_format(rename_columns(keys.check(row, where, Counter()), source.columns, where), where)
        except DataError as error:
            first = first or error
    if first is not None:
        raise first
    return ""


def find_row_problems(source: Source) -> RowProblems:
    """Read all rows of a source, and return the problems of unusable files and rows."""
    problems = RowProblems()
    try:
        for batch in read_batches(source, problems.add_file):
            problems.num_usable += sum(1 for _ in parse_usable(batch, problems.add_row))
            if problems.is_full:
                break
    except DataError as error:
        problems.add_file(error)
    return problems


def parse_usable(batch: DocumentBatch, on_problem: Callable[[DataError], None]) -> Iterator[tuple[Document, bool]]:
    """Yield the documents of a batch as `DocumentBatch.documents` does; call `on_problem` for each unusable row.

    Raises:
        DataError: if a part of a file cannot be read, so that its rows are unknown.
    """
    try:
        yield from list(batch.documents(Counter()))
    except DataError:
        for one in batch.split():
            try:
                yield from list(one.documents(Counter()))
            except DataError as error:
                on_problem(error)


def read_documents(source: Source, checks: ChecksSection | None = None) -> Iterator[tuple[Document, bool]]:
    """Yield each document with True if the source itself holds it out; without the rows that `checks` leave out.

    Raises:
        DataError: if a file cannot be read, or a row cannot be used and is not left out.
    """
    for batch in read_batches(source):
        yield from list_usable(batch, checks)


def list_usable(batch: DocumentBatch, checks: ChecksSection | None) -> Iterator[tuple[Document, bool]]:
    """Yield the documents of a batch, without the rows that `checks` leave out. Raises as `read_documents` does."""
    is_left_out = checks is not None and checks.bad_rows == "drop"
    return parse_usable(batch, lambda error: None) if is_left_out else batch.documents(Counter())
