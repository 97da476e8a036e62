"""All documents of a build: read from the sources, encoded, and held as columns; a spool on disk holds their tokens."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data import row_layout
from launcher.data.checks.findings import CheckHit
from launcher.data.sources.reading import RowProblems, count_rows, list_inputs, make_eval_source, read_batches
from launcher.data.tokenization.batch_encoder import (
    NUM_PROMPTS,
    DocumentTable,
    EncodeTask,
    EvalPrompt,
    PieceTable,
    encode_batches,
    is_below,
)
from launcher.errors import DataError

# More prompts than are kept, because the checks may drop some of their documents.
_NUM_CANDIDATES = 16 * NUM_PROMPTS

# Number of documents of one prompt that always stay in one split, and the largest share of the held-out split for one prompt.
_MAX_PER_PROMPT = 16
_MAX_PROMPT_SHARE = 0.5

Progress = Callable[[str, int, int], None]
Columns = TypeVar("Columns", DocumentTable, PieceTable)


@dataclass(frozen=True)
class EncodedCorpus:
    """All documents that were read, the pieces they were cut into, and the hits of the checks on single documents.

    A hit is (document, hit). `unread_keys`, `completions` and `bad_rows` have one entry per item of `list_inputs`.
    `completions` counts prompts with a completion if the tokenizer has a chat template, and how many of them are written with it.
    `bad_rows` counts unusable rows. `problems` are the problems of these rows, and of files.
    """

    docs: DocumentTable
    pieces: PieceTable
    hits: list[tuple[int, CheckHit]]
    prompts: list[EvalPrompt]
    max_token_id: int
    unread_keys: list[Counter[str]]
    completions: np.ndarray
    problems: RowProblems
    bad_rows: np.ndarray

    @property
    def num_docs(self) -> int:
        return len(self.docs.wheres)

    def select_pieces(self, is_dropped: np.ndarray, held_out: bool) -> np.ndarray:
        """Return the pieces of one split, excluding those of dropped documents; `is_dropped` is bool [documents]."""
        pieces = self.pieces
        return np.flatnonzero(~is_dropped[pieces.doc] & (pieces.lengths > 0) & (self.docs.held_out[pieces.doc] == held_out))


def list_names(data: DataSection) -> tuple[str, ...]:
    """Return the names of `list_inputs`."""
    return tuple(source.name for source in list_inputs(data))


def read_corpus(data: DataSection, tokenizer_path: str, spool: row_layout.TokenSpool, on_progress: Progress) -> EncodedCorpus:
    """Read and encode all documents; append their tokens to `spool`.

    Raises:
        DataError: if the tokenizer or a template cannot be used, or no row can be used.
    """
    problems = RowProblems()
    total = 0
    for source in list_inputs(data):
        # Reading reports an unreadable source.
        with suppress(DataError):
            total += count_rows(source) if source.is_read else 0
    on_progress("tokenize", 0, total)
    docs: list[DocumentTable] = []
    pieces: list[PieceTable] = []
    hits: list[tuple[int, CheckHit]] = []
    prompts: dict[bool, list[EvalPrompt]] = {True: [], False: []}
    num_docs = max_token_id = 0
    unread_keys = [Counter[str]() for _ in list_inputs(data)]
    completions = np.zeros((len(unread_keys), 2), dtype=np.int64)
    bad_rows = np.zeros(len(unread_keys), dtype=np.int64)
    for encoded in encode_batches(_list_tasks(data, problems), data, tokenizer_path):
        problems.merge(encoded.problems)
        bad_rows[encoded.source] += encoded.problems.num_rows
        problems.num_usable += sum(len(batch.docs.wheres) for batch in encoded.batches)
        for batch in encoded.batches:
            spool.add(batch.tokens, batch.trained)
            max_token_id = max(max_token_id, int(batch.tokens.max(initial=0)))
            unread_keys[batch.source].update(batch.unread_keys)
            completions[batch.source] += (batch.num_completions, batch.num_written_as_chat)
            hits += [(num_docs + i, hit) for i, hit in batch.hits]
            for held_out, candidates in prompts.items():
                candidates += [replace(one, doc=num_docs + one.doc) for one in batch.prompts if one.held_out is held_out]
                prompts[held_out] = heapq.nsmallest(_NUM_CANDIDATES, candidates, key=lambda prompt: prompt.rank)
            # Do not keep the batch itself, because its tokens would stay in memory.
            docs.append(batch.docs)
            pieces.append(replace(batch.pieces, doc=batch.pieces.doc + num_docs))
            num_docs += len(batch.docs.wheres)
            on_progress("tokenize", num_docs, max(total, num_docs))
        if problems.refused(data.checks).is_full:
            break
    on_progress("tokenize", num_docs, num_docs)
    if not docs:
        raise DataError(problems.to_list())
    table = _concatenate(docs)
    # Documents of a common prompt are held out one by one. Keeping all of them in one split would make the held-out split several
    # times too large, or remove most documents from it.
    _, group, counts = np.unique(table.prompts, return_inverse=True, return_counts=True)
    limit = max(_MAX_PER_PROMPT, _MAX_PROMPT_SHARE * data.eval_fraction * len(table.prompts))
    is_common = table.by_hash & (table.prompts != 0) & (counts[group] > limit)
    table = replace(table, held_out=np.where(is_common, is_below(table.splits_alone, data.eval_fraction), table.held_out))
    chosen = [prompt for prompt in (*prompts[True], *prompts[False]) if table.held_out[prompt.doc]]
    return EncodedCorpus(table, _concatenate(pieces), hits, chosen, max_token_id, unread_keys, completions, problems, bad_rows)


def _concatenate(tables: Sequence[Columns]) -> Columns:
    columns: dict[str, Any] = {}
    for column in fields(tables[0]):
        values = [getattr(table, column.name) for table in tables]
        columns[column.name] = list(itertools.chain(*values)) if isinstance(values[0], list) else np.concatenate(values)
    return type(tables[0])(**columns)


def _list_tasks(data: DataSection, problems: RowProblems) -> Iterator[EncodeTask]:
    """Yield every document once. If data.eval_path is set, documents that a source itself holds out are in neither split.

    The problems of files and sources that cannot be read are added to `problems`.
    """
    held_out = make_eval_source(data)
    for number, source in enumerate(list_inputs(data)):
        if not source.is_read:
            continue
        is_held_out = None if held_out is None else number == len(data.sources)
        try:
            for batch in read_batches(source, problems.add_file):
                yield EncodeTask(batch, number, is_held_out)
        except DataError as error:
            problems.add_file(error)
