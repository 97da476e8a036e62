"""Encodes batches of documents, checks them and cuts them into pieces that fit a row, in several processes, in order."""

from __future__ import annotations

import functools
import heapq
import itertools
import multiprocessing
import multiprocessing.util
import os
import pickle
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from launcher import collect_garbage_rarely
from launcher.config.sections.data import DataSection
from launcher.data.checks import inspection
from launcher.data.checks.findings import CheckHit, Hits
from launcher.data.schema import COLUMNS
from launcher.data.sources.documents import Document
from launcher.data.sources.files import Block
from launcher.data.sources.formats import redact_keys
from launcher.data.sources.reading import DocumentBatch, RowProblems, list_inputs
from launcher.data.tokenization.encoder import EncodedDocument, Encoder, RenderedDocument, load_tokenizer
from launcher.errors import DataError

NUM_PROMPTS = 4
# Worker processes start 1.7 s after the builder could begin encoding, because they repeat its imports. Two workers finish as
# early as the builder alone if that takes 3.4 s, about the time for this size.
MIN_BYTES = 12 << 20
# Parsing and checking the rows of a batch costs as much as encoding this much text.
_BATCH_BYTES = 50_000


@dataclass(frozen=True)
class EncodeTask:
    """Documents of the source with the index `source`; with `held_out` None, the source or a hash of the content holds them out.

    Otherwise all of them are or are not held out, and those that the source itself holds out are left out.
    """

    batch: DocumentBatch
    source: int
    held_out: bool | None


@dataclass(frozen=True)
class PieceTable:
    """The documents in rows, one entry each: a whole document, or a part that fits a row.

    `doc` is the index in DocumentTable, `labels` the number of trained tokens. `turn_end` is whether an end of turn is trained.
    """

    doc: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    turn_end: np.ndarray


@dataclass(frozen=True)
class DocumentTable:
    """One entry per document that was read; `num_tokens` is the count before truncation, `lost_tokens` are in no piece.

    `turn_end` is the token that ends the last trained turn, -1 if there is none. `contents`, `tasks`, `prompts` and
    `prompt_forms` are hashes, `signatures` MinHash signatures: see checks.inspection.Inspection. `by_hash` is whether a hash, not
    the source, decided `held_out`; `splits_alone` is the hash that decides if the prompt does not. `columns` are those with a
    default (launcher.data.schema): float64, NaN where a document does not set it.
    """

    source: np.ndarray
    held_out: np.ndarray
    num_tokens: np.ndarray
    lost_tokens: np.ndarray
    num_pieces: np.ndarray
    turn_end: np.ndarray
    contents: np.ndarray
    tasks: np.ndarray
    prompts: np.ndarray
    prompt_forms: np.ndarray
    splits_alone: np.ndarray
    by_hash: np.ndarray
    is_text: np.ndarray
    columns: dict[str, np.ndarray]
    wheres: list[str]
    signatures: list[np.ndarray | None]


@dataclass(frozen=True)
class EvalPrompt:
    """A document as a prompt for the model; `rank` orders all of them by content.

    `held_out` is False for a document that is held out only if very many documents have its prompt.
    """

    rank: int
    held_out: bool
    doc: int
    prompt: str
    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class EncodedBatch:
    """An encoded batch of documents, whose indices count within it; `tokens` and `trained` concatenate those of its pieces.

    `source` is that of its task; `problems` are those of its unusable rows. `unread_keys` counts the rows for each key that was
    not read. `num_completions` counts prompts with a completion if the tokenizer has a chat template, `num_written_as_chat` those
    that are written with it.
    """

    source: int
    problems: RowProblems
    unread_keys: Mapping[str, int]
    num_completions: int
    num_written_as_chat: int
    docs: DocumentTable
    pieces: PieceTable
    tokens: np.ndarray
    trained: np.ndarray
    hits: Hits
    prompts: list[EvalPrompt]


def encode_batches(tasks: Iterator[EncodeTask], data: DataSection, tokenizer_path: str) -> Iterator[EncodedBatch]:
    """Encode each batch; yield the results in order, with the problems of rows. Raises DataError, also if a worker ended."""
    workers = data.workers or len(os.sched_getaffinity(0))
    first: list[EncodeTask] = []
    num_bytes = 0
    while workers > 1 and num_bytes < MIN_BYTES and (task := next(tasks, None)) is not None:
        first.append(task)
        num_bytes += len(pickle.dumps(task)) + _BATCH_BYTES
    tasks = itertools.chain(first, tasks)
    if num_bytes < MIN_BYTES:
        yield from map(BatchEncoder(data, tokenizer_path).encode, tasks)
        return
    # In Python 3.11.0, every user of the machine can reach such a socket of the fork server, which runs what it receives:
    # CVE-2022-42919.
    multiprocessing.util.abstract_sockets_supported = False  # type: ignore[misc]
    context = multiprocessing.get_context("forkserver")
    # The fork server imports once; the workers are forked from it before it has threads.
    context.set_forkserver_preload(["launcher.data.tokenization.forkserver_preload"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    settings = data.model_dump_json()
    try:
        running: deque[Future[EncodedBatch]] = deque()
        for task in tasks:
            running.append(pool.submit(_encode_in_worker, settings, tokenizer_path, task))
            # Batches that are read but not yet encoded are in memory.
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        message = "a process that builds the data cache ended: its messages are above, or the memory ran out"
        remedy = f"set data.workers below {workers}, or give the machine more memory, and try again"
        raise DataError(message, "data.workers", str(workers), remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    collect_garbage_rarely()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # The workers end with the builder, even if it is killed.
    threading.Thread(target=end_with_parent, daemon=True).start()
    # One thread per process: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(settings: str, tokenizer_path: str, task: EncodeTask) -> EncodedBatch:
    return _make_encoder(settings, tokenizer_path).encode(task)


@functools.cache
def _make_encoder(settings: str, tokenizer_path: str) -> BatchEncoder:
    return BatchEncoder(DataSection.model_validate_json(settings), tokenizer_path)


class BatchEncoder:
    """Encodes batches of documents with one tokenizer."""

    def __init__(self, data: DataSection, tokenizer_path: str) -> None:
        self.data = data
        self.encoder = Encoder(load_tokenizer(tokenizer_path), data)
        self._completions = [source.completions for source in list_inputs(data)]

    def encode(self, task: EncodeTask) -> EncodedBatch:
        """Tokenize, check and count the usable documents, and collect the problems of the other rows."""
        unread_keys, problems = Counter[str](), RowProblems()
        documents, rendered, are_held_out, num_completions, num_written = list[Document](), list[RenderedDocument](), [], 0, 0
        is_by_hash = task.held_out is None and isinstance(task.batch.rows, Block)
        try:
            for row, is_held_out in task.batch.documents(unread_keys, problems.add_row):
                if task.held_out is not None and is_held_out:
                    continue
                document = row
                if self.encoder.has_template:
                    document = self.encoder.write_as_chat(row, self._completions[task.source])
                    num_completions += bool(row.prompt)
                    num_written += bool(row.prompt) and not document.prompt
                try:
                    rendered.append(self._render(document))
                except DataError as error:
                    problems.add_row(error)
                else:
                    documents.append(document)
                    are_held_out.append(is_held_out if task.held_out is None else task.held_out)
        except DataError as error:
            # A part of a file is unreadable. No setting can leave it out, because its rows are unknown.
            problems.add_file(error)
        problems.num_usable = len(documents)
        encoded = self.encoder.encode(rendered)
        inspections = inspection.inspect(
            documents, rendered, encoded, self.encoder.special_texts, self.data, self.encoder.split_tokens
        )
        cut = [cut_document(tokens, self.data.max_length, self.data.long_documents) for tokens in encoded]
        hits = [(i, hit) for i, one in enumerate(inspections) for hit in one.hits]
        hits += [
            (i, hit)
            for i, pieces in enumerate(cut)
            if pieces and (hit := self._check_pieces(rendered[i], encoded[i], pieces)) is not None
        ]
        held_out = [
            one.split / 2**64 < self.data.eval_fraction if is_by_hash else is_held_out
            for is_held_out, one in zip(are_held_out, inspections, strict=True)
        ]
        num_tokens = np.asarray([len(tokens.ids) for tokens in encoded], dtype=np.int64)
        kept_tokens = np.asarray([sum(len(piece.ids) for piece in pieces) for pieces in cut], dtype=np.int64)

        def hashes(name: str) -> np.ndarray:
            return np.asarray([getattr(one, name) for one in inspections], dtype=np.uint64)

        docs = DocumentTable(
            source=np.full(len(documents), task.source, dtype=np.uint16),
            held_out=np.asarray(held_out, dtype=bool),
            num_tokens=num_tokens,
            lost_tokens=num_tokens - kept_tokens,
            num_pieces=np.asarray([len(pieces) for pieces in cut], dtype=np.int64),
            turn_end=np.asarray([one.ids[one.turn_ends[-1]] if one.turn_ends else -1 for one in encoded], dtype=np.int64),
            contents=hashes("content"),
            tasks=hashes("task"),
            prompts=hashes("prompt"),
            prompt_forms=hashes("prompt_form"),
            splits_alone=hashes("split_alone"),
            by_hash=np.full(len(documents), is_by_hash),
            is_text=np.asarray([not (document.messages or document.prompt) for document in documents], dtype=bool),
            columns={
                name: np.asarray([document.columns.get(name, np.nan) for document in documents], dtype=np.float64)
                for name, column in COLUMNS.items()
                if column.default is not None
            },
            wheres=[document.where for document in documents],
            signatures=[one.signature for one in inspections],
        )
        # Documents that are dropped before rendering have no tokens.
        is_whole = (docs.num_tokens > 0) & (docs.lost_tokens == 0)
        # These are held out if their prompt is common, which then recurs in every batch.
        _, group, counts = np.unique(docs.prompts, return_inverse=True, return_counts=True)
        others = is_whole & ~docs.held_out & docs.by_hash & (counts[group] > 1)
        others &= is_below(docs.splits_alone, self.data.eval_fraction)
        pieces = [piece for pieces in cut for piece in pieces]
        return EncodedBatch(
            task.source,
            problems,
            redact_keys(unread_keys),
            num_completions,
            num_written,
            docs,
            PieceTable(
                doc=np.repeat(np.arange(len(cut)), docs.num_pieces),
                lengths=np.asarray([len(piece.ids) for piece in pieces], dtype=np.int64),
                labels=np.asarray([np.count_nonzero(piece.trained) for piece in pieces], dtype=np.int64),
                turn_end=np.asarray([bool(piece.turn_ends) for piece in pieces], dtype=bool),
            ),
            tokens=np.concatenate([np.empty(0, np.uint32), *(piece.ids for piece in pieces)]),
            trained=np.concatenate([np.empty(0, np.uint8), *(piece.trained for piece in pieces)]),
            hits=hits,
            prompts=[
                *self._make_prompts(documents, np.flatnonzero(docs.held_out & is_whole), docs.splits_alone, held_out=True),
                *self._make_prompts(documents, np.flatnonzero(others), docs.splits_alone, held_out=False),
            ],
        )

    def _render(self, document: Document) -> RenderedDocument:
        # Many templates refuse a conversation whose roles are out of order; it has no text if it is dropped.
        if self.data.checks.role_order == "drop" and document.messages and inspection.find_role_fault(document.messages):
            return RenderedDocument(document.where, "", (), raw=False)
        return self.encoder.render(document)

    def _check_pieces(
        self, rendered: RenderedDocument, encoded: EncodedDocument, pieces: Sequence[EncodedDocument]
    ) -> CheckHit | None:
        """Return the failed check of a document whose pieces lack a trained token, or a trained end of turn."""
        if encoded.is_unsure:
            return None
        within = f"within the first {self.data.max_length:,} tokens"
        if not pieces[0].trained.any():
            return CheckHit("no_trained_token", f"none {within}")
        if not any(piece.turn_ends for piece in pieces):
            if encoded.turn_ends:
                return CheckHit("no_turn_end", f"none {within}")
            split = next((token for token in self.encoder.split_tokens if rendered.text.rstrip().endswith(token)), None)
            reason = f": the template ends it with {split}, which is not a token of this tokenizer" if split else ""
            return CheckHit("no_turn_end", f"no end of turn is trained{reason}")
        return None

    def _make_prompts(
        self, documents: Sequence[Document], candidates: np.ndarray, ranks: np.ndarray, held_out: bool
    ) -> list[EvalPrompt]:
        prompts = []
        for rank, i in heapq.nsmallest(NUM_PROMPTS, ((int(ranks[i]), i) for i in candidates.tolist())):
            # A template may refuse a conversation without its last answer, which is then no example.
            with suppress(DataError):
                if (prompt := self.encoder.prompt(documents[i])) is not None:
                    prompts.append(EvalPrompt(rank, held_out, i, *prompt))
        return prompts


def is_below(hashes: np.ndarray, share: float) -> np.ndarray:
    """Return which of the hashes, uint64, are in the first `share` of their range."""
    return np.asarray(hashes / 2.0**64 < share)


def cut_document(encoded: EncodedDocument, max_length: int, long_documents: str) -> list[EncodedDocument]:
    """Cut a document into pieces of at most `max_length` tokens; `long_documents` is truncate, split or drop.

    Pieces without a trained token are left out, unless all are without. The first token of a piece has no context and is not
    trained.
    """
    num_tokens = len(encoded.ids)
    if num_tokens <= max_length:
        return [encoded] if num_tokens else []
    if long_documents == "drop":
        return []
    starts = range(0, num_tokens, max_length) if long_documents == "split" else (0,)
    pieces = []
    for start in starts:
        end = start + max_length
        trained = encoded.trained[start:end].copy()
        trained[0] = 0
        turn_ends = tuple(at - start for at in encoded.turn_ends if start < at < end)
        pieces.append(EncodedDocument(encoded.ids[start:end], trained, turn_ends))
    return [piece for piece in pieces if piece.trained.any()] or pieces[:1]
