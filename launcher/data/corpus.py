"""The documents of a build: read and encoded, compared with each other, and selected by the checks and the mixture."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from launcher.config.sections.data import ChecksSection, DataSection
from launcher.data import row_layout
from launcher.data.checks import overlap
from launcher.data.checks.findings import (
    CHECKS,
    LEAKS,
    NUM_EXAMPLES,
    OF_HELD_OUT,
    CheckHit,
    Example,
    Finding,
    Findings,
    Hits,
    get_action,
    judge,
)
from launcher.data.packing import RowLayout
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
from launcher.data.triage import read_exclusions
from launcher.errors import DataError
from launcher.plan.quantities import format_count

# More prompts than are kept, because the checks may drop some of their documents.
_NUM_CANDIDATES = 16 * NUM_PROMPTS

# Number of documents of one prompt that always stay in one split, and the largest share of the held-out split for one prompt.
_MAX_PER_PROMPT = 16
_MAX_PROMPT_SHARE = 0.5

# Continued pre-training on fewer tokens has little effect.
FEW_TOKENS_OF_TEXT = 1_000_000
FEW_EXAMPLES = 100
_USUAL_EXAMPLES = "50 to 100 are usual for a format or a tone, 1,000 and more for a skill, tens of thousands for general chat"
_USUAL_TEXT = "continued pre-training usually takes millions of tokens or more"

Progress = Callable[[str, int, int], None]
Columns = TypeVar("Columns", DocumentTable, PieceTable)


@dataclass(frozen=True)
class EncodedCorpus:
    """All documents that were read, the pieces they were cut into, and the hits of the checks on single documents.

    `unread_keys`, `completions` and `bad_rows` have one entry per item of `list_inputs`. `completions` counts prompts with a
    completion if the tokenizer has a chat template, and how many of them are written with it. `problems` are those of unusable
    rows, and of files.
    """

    docs: DocumentTable
    pieces: PieceTable
    hits: Hits
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


def read_corpus(data: DataSection, tokenizer_path: str, spool: row_layout.TokenSpool, on_progress: Progress) -> EncodedCorpus:
    """Read and encode all documents; append their tokens to `spool`. Raises DataError if no row can be used."""
    problems = RowProblems()
    total = 0
    for source in list_inputs(data):
        # Reading reports an unreadable source.
        with suppress(DataError):
            total += count_rows(source) if source.is_read else 0
    on_progress("tokenize", 0, total)
    docs: list[DocumentTable] = []
    pieces: list[PieceTable] = []
    hits: Hits = []
    prompts: dict[bool, list[EvalPrompt]] = {True: [], False: []}
    num_docs = max_token_id = 0
    unread_keys = [Counter[str]() for _ in list_inputs(data)]
    completions = np.zeros((len(unread_keys), 2), dtype=np.int64)
    bad_rows = np.zeros(len(unread_keys), dtype=np.int64)
    for batch in encode_batches(_list_tasks(data, problems), data, tokenizer_path):
        problems.merge(batch.problems)
        bad_rows[batch.source] += batch.problems.num_rows
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
    if not num_docs and len(problems):
        raise DataError(problems.to_list())
    table = _concatenate(docs)
    _check_kinds(table, data, problems)
    # Documents of a common prompt are held out one by one. Keeping all of them in one split would make the held-out split several
    # times too large, or remove most documents from it.
    _, group, counts = np.unique(table.prompts, return_inverse=True, return_counts=True)
    limit = max(_MAX_PER_PROMPT, _MAX_PROMPT_SHARE * data.eval_fraction * len(table.prompts))
    is_common = table.by_hash & (table.prompts != 0) & (counts[group] > limit)
    table = replace(table, held_out=np.where(is_common, is_below(table.splits_alone, data.eval_fraction), table.held_out))
    chosen = [prompt for prompt in (*prompts[True], *prompts[False]) if table.held_out[prompt.doc]]
    return EncodedCorpus(table, _concatenate(pieces), hits, chosen, max_token_id, unread_keys, completions, problems, bad_rows)


def _check_kinds(docs: DocumentTable, data: DataSection, problems: RowProblems) -> None:
    """Refuse a source without a set format that holds both text and answers, because every token of a text is trained."""
    for number, source in enumerate(list_inputs(data)):
        is_text, of_answers = ((docs.source == number) & (docs.is_text == value) for value in (True, False))
        if source.format == "auto" and source.is_read and is_text.any() and of_answers.any():
            message = (
                f"the source {source.name} holds {format_count(int(of_answers.sum()), 'row')} with answers and "
                f"{format_count(int(is_text.sum()), 'row')} of plain text, of which every token would be trained"
            )
            where = f"{docs.wheres[is_text.argmax()]}; {docs.wheres[of_answers.argmax()]}"
            remedy = "set the source's format, or keep the texts in a file of their own, as another entry of data.sources"
            problems.add_file(DataError(message, where=where, remedy=remedy))


def _concatenate(tables: Sequence[Columns]) -> Columns:
    columns: dict[str, Any] = {}
    for column in fields(tables[0]):
        values = [getattr(table, column.name) for table in tables]
        if isinstance(values[0], dict):
            columns[column.name] = {name: np.concatenate([of_table[name] for of_table in values]) for name in values[0]}
        else:
            columns[column.name] = list(itertools.chain(*values)) if isinstance(values[0], list) else np.concatenate(values)
    return type(tables[0])(**columns)


def _list_tasks(data: DataSection, problems: RowProblems) -> Iterator[EncodeTask]:
    """Yield every document once. With data.eval_path, documents that a source itself holds out are in neither split."""
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


# Which documents are trained


@dataclass(frozen=True)
class Selection:
    """Which documents are dropped, bool [documents], the training rows, the passes over each source, and the findings."""

    is_dropped: np.ndarray
    layout: RowLayout
    epochs: list[float]
    findings: Findings
    num_excluded: int = 0


def select_documents(corpus: EncodedCorpus, data: DataSection) -> Selection:
    """Compare the documents, drop what data.checks says, mix and pack the rest. Raises DataError if nothing is left."""
    docs, pieces, checks = corpus.docs, corpus.pieces, data.checks
    hits = list(corpus.hits)
    is_excluded = ~docs.held_out & np.isin(docs.contents, read_exclusions(data.exclude))
    held_out, training = np.flatnonzero(docs.held_out), np.flatnonzero(~docs.held_out & ~is_excluded)

    def require_pieces(is_dropped: np.ndarray) -> np.ndarray:
        selected = corpus.select_pieces(is_dropped, held_out=False)
        if not pieces.labels[selected].any():
            raise _make_empty_error(docs, data, _collect_for_rows(hits, corpus, selected[:0], data))
        return selected

    def find_leaks(training: np.ndarray, are_dropped: bool) -> Hits:
        leaks = []
        if (checks.held_out_in_train == "drop") == are_dropped:
            leaks += overlap.find_leaks(docs.contents, training, held_out)
        if (checks.near_held_out_in_train == "drop") == are_dropped:
            leaks += overlap.find_near_leaks(docs.contents, docs.signatures, training, held_out, are_dropped)
        if (checks.held_out_prompt_in_train == "drop") == are_dropped:
            leaks += overlap.find_prompt_leaks(docs.contents, docs.prompts, docs.prompt_forms, training, held_out)
        return leaks

    selected = require_pieces(is_excluded | select_dropped(hits, corpus.num_docs, checks))
    num_tokens = np.bincount(docs.source[pieces.doc[selected]], pieces.lengths[selected], len(data.sources)).astype(int)
    # Of several copies, keep the first in this order: the one in the source of which the mixture takes the largest share.
    shares = np.asarray(row_layout.compute_shares(data.sources, num_tokens.tolist()))
    training = training[np.argsort(-shares[docs.source[training]], kind="stable")]
    hits += overlap.find_duplicates(docs.contents, docs.tasks, docs.signatures, training)
    # The mixture replaces dropped documents by others of the source, so compare all of them, not only those in rows.
    hits += find_leaks(training, are_dropped=True)
    is_dropped = is_excluded | select_dropped(hits, corpus.num_docs, checks)
    layout, epochs = row_layout.layout_training(pieces.lengths, docs.source[pieces.doc], require_pieces(is_dropped), data)
    if not pieces.labels[layout.order].any():
        raise _make_empty_error(docs, data, _collect_for_rows(hits, corpus, layout.order, data))
    hits += find_leaks(np.unique(pieces.doc[layout.order]), are_dropped=False)
    hits += find_losses(hits, docs, checks)
    found = _collect_for_rows(hits, corpus, layout.order, data)
    return Selection(is_dropped, layout, epochs, found, int(np.count_nonzero(is_excluded)))


def _collect_for_rows(hits: Hits, corpus: EncodedCorpus, order: np.ndarray, data: DataSection) -> Findings:
    """Return the findings if the training rows consist of the pieces `order`."""
    docs, pieces, names = corpus.docs, corpus.pieces, tuple(source.name for source in list_inputs(data))
    trained = np.bincount(pieces.doc, pieces.labels, corpus.num_docs) > 0
    used = np.bincount(pieces.doc[order], minlength=corpus.num_docs) > 0
    of_documents = collect_findings(hits, docs, names, trained, used)
    num_bad = corpus.bad_rows
    if data.checks.bad_rows != "drop" or not num_bad.any():
        return of_documents
    totals = num_bad + np.bincount(docs.source, minlength=len(num_bad))
    by_source = {name: int(count) for name, count in zip(names, num_bad, strict=True) if count}
    shown = tuple(Example(where, detail) for where, detail in corpus.problems.examples()[:NUM_EXAMPLES])
    share = float((num_bad / np.maximum(1, totals)).max())
    return (Finding("bad_rows", int(num_bad.sum()), int(totals.sum()), by_source, shown, share), *of_documents)


def _make_empty_error(docs: DocumentTable, data: DataSection, all_findings: Findings) -> DataError:
    dropped = [one.finding for one in judge(all_findings, data.checks) if one.action == "drop"]
    # Documents dropped by a check or for their length may have trained tokens, which a setting can bring back.
    never = all(finding.name == "no_trained_token" for finding in dropped) and bool((docs.num_pieces > 0).all())
    message = "no document with a trained token is left" + (", and no setting can accept this" if never else "")
    where = ", ".join(source.path for source in data.sources)
    remedy = (
        "add rows with an assistant message or a completion, raise data.max_length, lower data.eval_fraction, "
        "or set data.checks to keep what it drops"
    )
    num_held_out = np.count_nonzero(docs.held_out)
    num_read = f"{len(docs.held_out) - num_held_out:,} documents to train on and {num_held_out:,} held-out ones were read"
    reasons = [f"{finding.title}: {finding.count:,} ({finding.examples[0].where})" for finding in dropped]
    return DataError(message, where, "; ".join([num_read, *reasons]), remedy)


# From the hits of single documents to drops and findings


def select_dropped(hits: Hits, num_docs: int, checks: ChecksSection) -> np.ndarray:
    """Return which documents the settings drop, bool [documents]."""
    by_name = _group_by_check(hits)
    is_dropped = np.zeros(num_docs, dtype=bool)
    for name, of_name in by_name.items():
        if get_action(name, checks) == "drop" and name != "near_duplicate":
            # Keep the held-out document, and drop the training documents like it.
            is_dropped[[i for one in of_name.values() for i in one.others] if name in LEAKS else list(of_name)] = True
    if checks.near_duplicate == "drop":
        # If a document is dropped for another reason, keep the first one like it.
        kept: set[int] = set()
        duplicates = []
        for document, hit in by_name["near_duplicate"].items():
            first = hit.others[0]
            if is_dropped[first] and not is_dropped[document] and first not in kept:
                kept.add(first)
            else:
                duplicates.append(document)
        is_dropped[duplicates] = True
    return is_dropped


def find_losses(hits: Hits, docs: DocumentTable, checks: ChecksSection) -> Hits:
    """Find truncated and dropped documents; `hits` are those of the other checks. Duplicates of others do not count as losses."""
    lost, num_tokens = docs.lost_tokens, docs.num_tokens
    reasons: dict[int, str] = {}
    for document, hit in hits:
        if not hit.others and get_action(hit.finding, checks) == "drop":
            reasons.setdefault(document, f"dropped by the check {hit.finding}")
    for document in np.flatnonzero((docs.num_pieces == 0) & (num_tokens > 0)).tolist():
        reasons.setdefault(document, f"{num_tokens[document]:,} tokens, more than a row has")
    cut = [document for document in np.flatnonzero((lost > 0) & (docs.num_pieces > 0)).tolist() if document not in reasons]
    return [
        *((i, CheckHit("truncated", f"{lost[i]:,} of {num_tokens[i]:,} tokens are cut off")) for i in cut),
        *((i, CheckHit("dropped", reason)) for i, reason in sorted(reasons.items())),
    ]


def collect_findings(hits: Hits, docs: DocumentTable, names: Sequence[str], trained: np.ndarray, used: np.ndarray) -> Findings:
    """Return the findings of all checks, with counts and examples; `names` are those of the sources.

    `trained` and `used` are bool [documents]: whether a piece has a trained token, and whether a training row holds the document.
    """
    by_name = _group_by_check(hits)
    scopes = {**dict.fromkeys(OF_HELD_OUT, docs.held_out), "no_turn_end": trained}

    def count_by_source(documents: np.ndarray) -> dict[str, int]:
        counts = np.bincount(docs.source[documents], minlength=len(names))
        return {name: int(count) for name, count in zip(names, counts, strict=True) if count}

    found = []
    for name in CHECKS:
        if not (of_name := by_name.get(name)):
            continue
        documents = np.asarray(sorted(of_name))
        evenly = np.linspace(0, len(documents) - 1, NUM_EXAMPLES).round().astype(int)
        examples = []
        for i in documents[np.unique(evenly)].tolist():
            detail, others = of_name[i].detail, of_name[i].others
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                detail = f"{detail} {docs.wheres[others[0]]}{more}"
            examples.append(Example(docs.wheres[i], detail))
        # The source of each document that the check looks at.
        of_source = docs.source[scopes[name]] if name in scopes else docs.source
        counts, totals = (np.bincount(source, minlength=len(names)) for source in (docs.source[documents], of_source))
        highest_share = float((counts / np.maximum(1, totals)).max())
        found.append(Finding(name, len(documents), len(of_source), count_by_source(documents), tuple(examples), highest_share))
    # Plain text counts by tokens, all else by examples.
    in_rows, no_text = np.flatnonzero(used), np.flatnonzero(used & ~docs.is_text)
    if len(no_text):
        is_few, detail = len(no_text) < FEW_EXAMPLES, f"{len(no_text):,} examples to train on; {_USUAL_EXAMPLES}"
    else:
        num_tokens = int(docs.num_tokens[in_rows].sum())
        is_few, detail = num_tokens < FEW_TOKENS_OF_TEXT, f"{num_tokens:,} tokens of text to train on; {_USUAL_TEXT}"
    documents = no_text if len(no_text) else in_rows
    if is_few and len(documents):
        example = Example(docs.wheres[documents[0]], detail)
        found.append(Finding("few_examples", len(documents), len(in_rows), count_by_source(documents), (example,)))
    return tuple(found)


def _group_by_check(hits: Hits) -> dict[str, dict[int, CheckHit]]:
    """Return the first hit of each document, by check."""
    by_name: dict[str, dict[int, CheckHit]] = defaultdict(dict)
    for document, hit in hits:
        by_name[hit.finding].setdefault(document, hit)
    return by_name
