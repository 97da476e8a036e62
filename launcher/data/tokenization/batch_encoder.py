"""From documents to pieces that fit a row: what the processes that build the cache do with each batch."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.config.data import DataSection
from launcher.data.checks import inspection
from launcher.data.sources import Chat, Document, DocumentBatch
from launcher.data.sources.keys import named
from launcher.data.tokenization.encoder import EncodedDocument, Encoder, RenderedDocument, load_tokenizer

NUM_PROMPTS = 4


@dataclass(frozen=True)
class SourceDocument:
    """A document, the number of its source, and whether it is held out; None: its content decides."""

    document: Document
    source: int
    held_out: bool | None


@dataclass(frozen=True)
class EncodeTask:
    """Documents of the source with the number `source`. `held_out`: all are, or all are not; those that the source itself holds
    out are left out then. None: as the source itself says, else each one's content decides."""

    batch: DocumentBatch
    source: int
    held_out: bool | None

    def items(self, unread_keys: Counter[str]) -> list[SourceDocument]:
        """The documents, parsed; counts of their rows' unread keys go to `unread_keys`. Errors: DataError with the place."""
        documents = self.batch.documents(unread_keys)
        if self.held_out is not None:
            return [SourceDocument(document, self.source, self.held_out) for document, apart in documents if not apart]
        return [
            SourceDocument(document, self.source, apart if self.batch.brings_split else None) for document, apart in documents
        ]


@dataclass(frozen=True)
class PieceTable:
    """What becomes documents of rows, one entry for each: the whole of a document read, or a part that fits a row.

    `doc` is the number of the document read, `labels` counts trained tokens, `turn_end`: a trained end of turn is among them.
    """

    doc: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    turn_end: np.ndarray


@dataclass(frozen=True)
class DocumentTable:
    """One entry for each document read; `num_tokens` before anything was cut, `lost_tokens` are in no piece.

    `turn_end` is the token that ends the last trained turn, -1 where none does.
    """

    source: np.ndarray
    held_out: np.ndarray
    num_tokens: np.ndarray
    lost_tokens: np.ndarray
    num_pieces: np.ndarray
    turn_end: np.ndarray
    contents: np.ndarray
    tasks: np.ndarray
    is_text: np.ndarray
    wheres: list[str]
    signatures: list[np.ndarray | None]


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out document as a question to the model; `rank` orders all of them by content."""

    rank: int
    doc: int
    prompt: str
    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of documents, whose numbers count within it; `tokens` and `trained` of its pieces stand one after the other.

    `unread_keys` are keys that are not read of the rows of the source with the number `source`, each with its number of rows.
    """

    source: int
    unread_keys: Mapping[str, int]
    docs: DocumentTable
    pieces: PieceTable
    tokens: np.ndarray
    trained: np.ndarray
    hits: list[tuple[int, inspection.CheckHit]]
    prompts: list[EvalPrompt]


class BatchEncoder:
    """Encodes batches of documents with one tokenizer."""

    def __init__(self, data: DataSection, tokenizer_path: str) -> None:
        self.data = data
        self.encoder = Encoder(load_tokenizer(tokenizer_path), data)

    def encode(self, work: EncodeTask) -> EncodedBatch:
        """Tokens, faults and counts of some documents; errors: DataError naming the document."""
        unread_keys: Counter[str] = Counter()
        items = work.items(unread_keys)
        documents = [item.document for item in items]
        rendered = [self._rendered(document) for document in documents]
        encoded = self.encoder.encode(rendered)
        seen = inspection.inspect(documents, rendered, encoded, self.encoder.special_texts, self.data)
        cut = [pieces_of(tokens, self.data.max_length, self.data.long_documents) for tokens in encoded]
        hits = [(i, hit) for i, one in enumerate(seen) for hit in one.hits]
        hits += [(i, hit) for i, pieces in enumerate(cut) if pieces and (hit := self._lacking(encoded[i], pieces)) is not None]
        held_out = [
            one.content / 2**64 < self.data.eval_fraction if item.held_out is None else item.held_out
            for item, one in zip(items, seen, strict=True)
        ]
        num_tokens = np.asarray([len(tokens.ids) for tokens in encoded], dtype=np.int64)
        kept_tokens = np.asarray([sum(len(piece.ids) for piece in pieces) for pieces in cut], dtype=np.int64)
        docs = DocumentTable(
            source=np.asarray([item.source for item in items], dtype=np.uint16),
            held_out=np.asarray(held_out, dtype=bool),
            num_tokens=num_tokens,
            lost_tokens=num_tokens - kept_tokens,
            num_pieces=np.asarray([len(pieces) for pieces in cut], dtype=np.int64),
            turn_end=np.asarray([one.ids[one.turn_ends[-1]] if one.turn_ends else -1 for one in encoded], dtype=np.int64),
            contents=np.asarray([one.content for one in seen], dtype=np.uint64),
            tasks=np.asarray([one.task for one in seen], dtype=np.uint64),
            is_text=np.asarray([one.is_text for one in seen], dtype=bool),
            wheres=[item.document.where for item in items],
            signatures=[one.signature for one in seen],
        )
        # Nothing is left of what is dropped before it is rendered.
        whole = np.flatnonzero(docs.held_out & (docs.num_tokens > 0) & (docs.lost_tokens == 0)).tolist()
        pieces = [piece for pieces in cut for piece in pieces]
        return EncodedBatch(
            work.source,
            named(unread_keys),
            docs,
            _counts(cut),
            tokens=np.concatenate([np.empty(0, np.uint32), *(piece.ids for piece in pieces)]),
            trained=np.concatenate([np.empty(0, np.uint8), *(piece.trained for piece in pieces)]),
            hits=hits,
            prompts=self._make_prompts(items, whole, docs.contents),
        )

    def _rendered(self, document: Document) -> RenderedDocument:
        """The document's text; none of a conversation that is dropped for its order, as many templates refuse such."""
        dropped = self.data.checks.role_order == "drop"
        if dropped and isinstance(document, Chat) and inspection.role_fault(document.messages):
            return RenderedDocument(document.where, "", (), raw=False)
        return self.encoder.render(document)

    def _lacking(self, whole: EncodedDocument, pieces: Sequence[EncodedDocument]) -> inspection.CheckHit | None:
        """What the pieces of a document do not train, though they should."""
        if whole.is_unsure:
            return None
        within = f"within the first {self.data.max_length:,} tokens"
        if not pieces[0].trained.any():
            return inspection.CheckHit("no_trained_token", f"none {within}")
        if not any(piece.turn_ends for piece in pieces):
            return inspection.CheckHit("no_turn_end", f"none {within}" if whole.turn_ends else "no end of turn is trained")
        return None

    def _make_prompts(self, items: Sequence[SourceDocument], candidates: list[int], contents: np.ndarray) -> list[EvalPrompt]:
        found = []
        for rank, i in heapq.nsmallest(NUM_PROMPTS, ((int(contents[i]), i) for i in candidates)):
            if (sample := self.encoder.prompt(items[i].document)) is not None:
                found.append(EvalPrompt(rank, i, *sample))
        return found


def pieces_of(encoded: EncodedDocument, max_length: int, long_documents: str) -> list[EncodedDocument]:
    """The document in pieces of at most `max_length` tokens: its start, all of it, or nothing where it is longer.

    Pieces without a trained token are left out, unless none has one; nothing stands before a piece's first token to predict
    it from, so that one is not trained.
    """
    num_tokens = len(encoded.ids)
    if num_tokens <= max_length:
        return [encoded] if num_tokens else []
    if long_documents == "drop":
        return []
    starts = range(0, num_tokens, max_length) if long_documents == "split" else (0,)
    pieces = [_slice(encoded, start, start + max_length) for start in starts]
    return [piece for piece in pieces if piece.trained.any()] or pieces[:1]


def _slice(encoded: EncodedDocument, start: int, end: int) -> EncodedDocument:
    trained = encoded.trained[start:end].copy()
    trained[0] = 0
    return EncodedDocument(encoded.ids[start:end], trained, tuple(at - start for at in encoded.turn_ends if start < at < end))


def _counts(cut: Sequence[Sequence[EncodedDocument]]) -> PieceTable:
    pieces = [piece for pieces in cut for piece in pieces]
    return PieceTable(
        doc=np.repeat(np.arange(len(cut)), [len(pieces) for pieces in cut]),
        lengths=np.asarray([len(piece.ids) for piece in pieces], dtype=np.int64),
        labels=np.asarray([np.count_nonzero(piece.trained) for piece in pieces], dtype=np.int64),
        turn_end=np.asarray([bool(piece.turn_ends) for piece in pieces], dtype=bool),
    )
