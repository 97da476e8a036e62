"""Reads documents from the data sources of a run, and skips no row silently; no torch, no transformers."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from launcher.config.sections.data import ChecksSection, DataSection, RowSource, Source
from launcher.config.sections.evaluation import EvalSet
from launcher.data.sources import locate
from launcher.data.sources.builtin import BUILTINS
from launcher.data.sources.documents import Document, refuse
from launcher.data.sources.files import BLOCK_ROWS, Block, OnProblem, count_file_rows, parse_block, raise_problem, read_blocks
from launcher.data.sources.formats import parse_row
from launcher.data.sources.locate import HELD_OUT
from launcher.errors import DataError, Problem

# Names of files in the report.
_NUM_NAMES = 10

# Reading stops after this many unusable rows.
MAX_COUNTED = 10_000
_NUM_SHOWN, _NUM_PLACES = 50, 3
_LEAVE_OUT = "or skip such rows with data.checks.bad_rows=drop, which counts them"
# The parts that differ between messages of the same mistake: numbers, and text in parentheses.
_OF_ONE_ROW = re.compile(r"\([^()]*\)|\d+")


def make_eval_source(data: DataSection) -> Source | None:
    """Return data.eval_path as a source; None if it is unset.

    How rows are read is taken from a source with the same path, or else from all sources if they agree.
    """
    if data.eval_path is None:
        return None
    read = [source for source in data.sources if source.path not in BUILTINS]
    same = next((source for source in read if source.path == data.eval_path), None)
    shared = [source.model_dump(include={"format", "completions", "columns", "ignored_keys"}) for source in read]
    if same is not None:
        shared = [same.model_dump(include={*shared[0], "subset", "revision"})]
    is_alike = bool(shared) and all(one == shared[0] for one in shared)
    split = data.eval_split or (HELD_OUT if locate.has_splits(data.eval_path) else None)
    return Source(name="held_out", path=data.eval_path, split=split, **(shared[0] if is_alike else {}))


def list_inputs(data: DataSection) -> list[Source]:
    """Return the sources, followed by the file of data.eval_path as a source, if it is set."""
    held_out = make_eval_source(data)
    return [*data.sources, *([held_out] if held_out is not None else [])]


def find_shared_completions(data: DataSection) -> str:
    """Return how all sources write prompts with completions; auto if they differ, so that each prompt decides."""
    completions = {source.completions for source in list_inputs(data) if source.is_read}
    return completions.pop() if len(completions) == 1 else "auto"


def make_set_data(eval_set: EvalSet, data: DataSection) -> DataSection:
    """Return the settings for an evaluation set's cache: rows are built as for `data`, without settings that select documents.

    Documents without a trained token are left out; the checks bad_rows and dropped are those of `data`.
    """
    shared = {name: getattr(eval_set, name) for name in RowSource.model_fields}
    if eval_set.split is None and locate.has_splits(eval_set.path):
        shared["split"] = HELD_OUT
    kept = dict.fromkeys(("held_out_in_train", "truncated", "no_turn_end", "empty_answer"), "keep")
    checks = ChecksSection(**kept, bad_rows=data.checks.bad_rows, dropped=data.checks.dropped)
    # data.exclude names documents of the training data.
    own = {
        "exclude": None,
        "path": None,
        "sources": (Source(**shared),),
        "eval_fraction": 0.0,
        "eval_path": None,
        "eval_split": None,
    }
    return data.model_copy(update={**own, "checks": checks})


def name_set(problem: Problem, setting: str, eval_set: EvalSet) -> Problem:
    """Return a problem of the set's data with `setting` and the name of the set."""
    where = f"{setting} ({eval_set.name})" + (f", {problem.where}" if problem.where else "")
    return replace(problem, where=where)


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
    return None if locate.is_url(value) or locate.is_hub(value) else locate.find_local_problem(key, source)


def compute_source_digest(source: Source) -> str:
    """Return a text that changes with the source's bytes, not with its name or path. Raises DataError."""
    return locate.find_files(source).digest()


def describe_origin(source: Source) -> dict[str, Any]:
    """Return the digest, commit and first files of a source, for the report. Raises DataError."""
    files = locate.find_files(source)
    return {
        "digest": xxhash.xxh3_128_hexdigest(files.digest().encode()),
        "commit": files.commit,
        "files": list(files.names[:_NUM_NAMES]),
        "num_files": len(files.names),
        "left_out": list(files.left_out[:_NUM_NAMES]),
        "num_left_out": len(files.left_out),
    }


def count_rows(source: Source) -> int:
    """Return an upper bound of the number of documents in `source`, for progress; blank lines are counted."""
    if source.path in BUILTINS:
        return BUILTINS[source.path].count()
    return sum(count_file_rows(file.path, file.name) for file in locate.find_files(source).fetch())


# Documents


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Consecutive documents of a source, or the block to parse them from; picklable."""

    rows: Block | tuple[tuple[Document, bool], ...]
    source: Source

    def documents(self, unread_keys: Counter[str], on_problem: OnProblem = raise_problem) -> Iterator[tuple[Document, bool]]:
        """Yield each document with True if the source holds it out, and count unread keys. Raises DataError."""
        if not isinstance(self.rows, Block):
            yield from self.rows
            return
        for row, where in parse_block(self.rows, on_problem):
            try:
                document = parse_row(row, self.source, where, unread_keys)
            except DataError as error:
                on_problem(error)
            else:
                yield document, False


def read_batches(source: Source, on_problem: OnProblem = raise_problem) -> Iterator[DocumentBatch]:
    """Yield the documents in batches, unparsed if possible; after `on_problem` for an unreadable file, the next one is read."""
    if source.path in BUILTINS:
        of_source = BUILTINS[source.path].read()
        while documents := tuple(itertools.islice(of_source, BLOCK_ROWS)):
            yield DocumentBatch(documents, source)
        return
    has_rows = False
    for file in locate.find_files(source).fetch():
        try:
            for block in read_blocks(file.path, file.name):
                has_rows = has_rows or bool(block.data.strip() if isinstance(block.data, bytes) else block.data)
                yield DocumentBatch(block, source)
        except DataError as error:
            has_rows = True
            on_problem(error)
    if not has_rows:
        refuse("the source holds no rows", source.path, "add rows to it, or remove the source")


def find_row_problems(source: Source) -> RowProblems:
    """Read all rows of a source, and return the problems of unusable files and rows."""
    problems = RowProblems()
    try:
        for batch in read_batches(source, problems.add_file):
            problems.num_usable += sum(1 for _ in batch.documents(Counter(), problems.add_row))
            if problems.is_full:
                break
    except DataError as error:
        problems.add_file(error)
    return problems


def read_documents(source: Source, checks: ChecksSection | None = None) -> Iterator[tuple[Document, bool]]:
    """Yield each usable document with True if the source holds it out; rows that `checks` do not leave out raise DataError."""
    for batch in read_batches(source):
        yield from list_usable(batch, checks)


def list_usable(batch: DocumentBatch, checks: ChecksSection | None) -> Iterator[tuple[Document, bool]]:
    """Yield the documents of a batch, without the rows that `checks` leave out. Raises as `read_documents` does."""
    is_left_out = checks is not None and checks.bad_rows == "drop"
    return batch.documents(Counter(), (lambda error: None) if is_left_out else raise_problem)


# Rows that cannot be used


@dataclass
class _ProblemGroup:
    first: Problem
    places: list[str]
    count: int
    is_row: bool


class RowProblems:
    """Problems grouped by message, with the first places and the count of each, and the number of usable rows. Picklable."""

    def __init__(self) -> None:
        self.num_usable = 0
        self._groups: dict[tuple[str, bool], _ProblemGroup] = {}

    def __len__(self) -> int:
        return sum(group.count for group in self._groups.values())

    @property
    def is_full(self) -> bool:
        """True if there are so many problems that reading on would reveal nothing new."""
        return len(self) >= MAX_COUNTED

    @property
    def num_rows(self) -> int:
        """The number of unusable rows; an unreadable file has none."""
        return sum(group.count for group in self._groups.values() if group.is_row)

    def add_row(self, error: DataError, is_row: bool = True) -> None:
        """Add the problem of a row."""
        for problem in error.problems:
            self._add(_ProblemGroup(problem, [problem.where], 1, is_row))

    def add_file(self, error: DataError) -> None:
        """Add the problem of a file or a source."""
        self.add_row(error, is_row=False)

    def merge(self, later: RowProblems) -> None:
        """Add the problems and the count of later rows."""
        self.num_usable += later.num_usable
        for group in later._groups.values():
            self._add(group)

    def refused(self, checks: ChecksSection) -> RowProblems:
        """Return the problems that refuse a run: all, or only those of files if the settings leave out bad rows."""
        if checks.bad_rows == "fail":
            return self
        refused = RowProblems()
        refused.num_usable = self.num_usable
        refused._groups = {key: group for key, group in self._groups.items() if not group.is_row}
        return refused

    def examples(self) -> list[tuple[str, str]]:
        """Return places of unusable rows and the problem there; the first of each kind come first."""
        rows = [group for group in self._groups.values() if group.is_row]
        later = [(place, group.first.message) for group in rows for place in group.places[1:]]
        return [(group.first.where, group.first.message) for group in rows] + later

    def to_list(self) -> list[Problem]:
        """Return one problem per group, with its first places and its number of rows."""
        shown: list[Problem] = []
        last_row: int | None = None
        for i, group in enumerate([*self._groups.values()][:_NUM_SHOWN]):
            problem, more = group.first, group.count - len(group.places)
            if group.count > 1:
                where = "; ".join(group.places) + (f" and {more:,} more" if more else "")
                problem = replace(problem, message=f"{problem.message} ({group.count:,} times)", where=where)
            shown.append(problem)
            last_row = i if group.is_row else last_row
        if self.num_usable and last_row is not None:
            remedies = filter(None, (shown[last_row].remedy, _LEAVE_OUT))
            shown[last_row] = replace(shown[last_row], remedy="; ".join(remedies))
        if self.is_full:
            stopped = f"reading stopped after {len(self):,} rows that cannot be used, so there may be more"
            shown[-1] = replace(shown[-1], message=f"{shown[-1].message}; {stopped}")
        return shown

    def _add(self, group: _ProblemGroup) -> None:
        key = (_OF_ONE_ROW.sub("", group.first.message), group.is_row)
        known = self._groups.setdefault(key, _ProblemGroup(group.first, [], 0, group.is_row))
        known.places = (known.places + group.places)[:_NUM_PLACES]
        known.count += group.count
