"""Faults of documents, of each by itself in the worker processes, and what is concluded from all of them."""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ftfy.badness import is_bad

from launcher.config.data import ChecksSection, DataSection
from launcher.data.checks import minhash, patterns
from launcher.data.checks.findings import CHECKS, LEAKS, NUM_EXAMPLES, Example, Finding, Findings
from launcher.data.sources import Chat, Completion, Document, Message, PlainText
from launcher.data.tokenization.encoder import EncodedDocument, RenderedDocument
from launcher.data.tokenization.loss_mask import TrainOn, answers

# zlib makes about a half of usual text and a third of code and tables; a fifth is left where one thing is said again and again.
REPETITIVE_RATIO = 5.0
_MIN_REPETITIVE_BYTES = 400
# Continued pre-training learns little from less.
FEW_TOKENS_OF_TEXT = 1_000_000
_USUAL_EXAMPLES = "50 to 100 are usual for a format or a tone, 1,000 and more for a skill, tens of thousands for general chat"
# The first byte of a character of several in UTF-8, and a later one, read as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
# Characters on either side of where a completion begins, as long as keys and addresses are.
_AROUND_BORDER = 256
_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_USUAL_TEXT = "continued pre-training usually takes millions of tokens or more"


@dataclass(frozen=True)
class CheckHit:
    """One check that a document has not passed; `detail` shows no secret, `others` are the numbers of documents concerned."""

    finding: str
    detail: str
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What is known of one document: 64-bit hashes, MinHash signature uint16 [128], faults, its kind.

    `content` is the hash of the normalised text, `task` of that with its roles, weights and tools.
    """

    content: int
    task: int
    signature: np.ndarray | None
    hits: tuple[CheckHit, ...]
    is_text: bool


@dataclass(frozen=True)
class CheckedDocuments:
    """All documents in the order in which they were read, one entry each; `source` points into `names`.

    `trained` is False where no token is trained within a row, `used` where no row of training holds the document.
    """

    wheres: Sequence[str]
    source: np.ndarray
    names: tuple[str, ...]
    held_out: np.ndarray
    num_tokens: np.ndarray
    is_text: np.ndarray
    trained: np.ndarray
    used: np.ndarray


@dataclass(frozen=True)
class _TextPart:
    """A piece of a document's text; `where` names it within the document, `answer` is what of it the model is trained on."""

    where: str
    text: str
    answer: str | None


def inspect(
    documents: Sequence[Document],
    rendered: Sequence[RenderedDocument],
    encoded: Sequence[EncodedDocument],
    special_texts: Sequence[str],
    data: DataSection,
) -> list[Inspection]:
    """Look at some documents, their texts and tokens before anything is cut; `special_texts` are those of the tokenizer."""
    contents, tasks, signed, hits = [], [], [], []
    for document, text, tokens in zip(documents, rendered, encoded, strict=True):
        parts = list(_parts(document, text, data.train_on))
        whole = _joined(parts)
        # What the tools are makes another task of the same text, see _setup; and chats that share a long system text are not
        # alike for that.
        content = _joined(parts, whole, but=("tools",)).encode()
        signed.append(_joined(parts, whole, but=("tools", "system")).encode())
        contents.append(minhash.content_hash(content))
        tasks.append(minhash.content_hash(content + _setup(document)))
        written = _as_written(document, parts, data.system)
        shown = whole if written is parts else _joined(written)
        in_texts = _in_texts(written, shown, shown.encode(), special_texts)
        hits.append((*_faults(document, parts, tokens, data.checks), *in_texts, *_across_the_border(document)))
    is_text = [isinstance(document, PlainText) for document in documents]
    return list(map(Inspection, contents, tasks, minhash.signatures(signed), hits, is_text))


def _joined(parts: Sequence[_TextPart], whole: str | None = None, but: Sequence[str] = ()) -> str:
    """What the parts but some say, normalised: `whole` where it is that of all of them, and all are meant."""
    meant = [part.text for part in parts if part.where not in but]
    return whole if whole is not None and len(meant) == len(parts) else minhash.normalised("\n".join(meant))


def _setup(document: Document) -> bytes:
    """What makes another task of the same text."""
    if not isinstance(document, Chat):
        return b""
    turns = ",".join([f"{message.role}{message.weight}" for message in document.messages])
    return f"{turns}{json.dumps(document.tools) if document.tools else ''}".encode()


def _parts(document: Document, rendered: RenderedDocument, train_on: TrainOn) -> Iterator[_TextPart]:
    match document:
        case Chat(messages=messages, tools=tools):
            if tools:
                yield _TextPart("tools", json.dumps(tools, ensure_ascii=False), None)
            trained = answers(document, train_on)
            for i, message in enumerate(messages):
                where = "system" if message.role == "system" else f"messages[{i}]"
                text = answer = _written(message, message.reasoning_content)
                if i in trained and (thought := message.reasoning_content):
                    # Templates leave it out of earlier turns.
                    is_written = any(thought.strip() in rendered.text[span.start : span.end] for span in rendered.spans)
                    answer = text if is_written else _written(message, None)
                yield _TextPart(where, text, answer if i in trained else None)
        case Completion(prompt=prompt, completion=completion):
            yield _TextPart("prompt", prompt, None)
            yield _TextPart("completion", completion, completion)
        case PlainText(text=text):
            yield _TextPart("text", text, None)


def _as_written(document: Document, parts: list[_TextPart], system: str | None) -> list[_TextPart]:
    """The parts with what the settings write in place of the row's own system text, and with the names of who speaks.

    Neither makes another document: what is held out, or stands there twice, is told by the row's own text.
    """
    if not isinstance(document, Chat):
        return parts
    messages = document.messages
    names = [_TextPart(f"messages[{i}].name", message.name, None) for i, message in enumerate(messages) if message.name]
    if system is None:
        return [*parts, *names] if names else parts
    place = bool(document.tools)
    own = messages[0].role == "system"
    return [*parts[:place], _TextPart("data.system", system, None), *parts[place + own :], *names]


def _written(message: Message, reasoning: str | None) -> str:
    """All that a message says: its reasoning, its content, its calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.tool_calls]
    return "\n".join(text for text in (reasoning, message.content, *calls) if text)


def _faults(document: Document, parts: list[_TextPart], encoded: EncodedDocument, checks: ChecksSection) -> Iterator[CheckHit]:
    """Faults of structure: what is trained, what is missing, who speaks when."""
    num_trained = int(np.count_nonzero(encoded.trained))
    if encoded.is_unsure:
        yield CheckHit("unsure_border", "what is trained begins or ends inside a token")
    elif not num_trained and len(encoded.ids):
        yield CheckHit("no_trained_token", "no token is trained")
    if empty := [part.where for part in parts if part.answer is not None and not part.answer.strip()]:
        yield CheckHit("empty_answer", f"{empty[0]} is empty")
    if num_trained > checks.long_answer_tokens and not isinstance(document, PlainText):
        longest = _longest_run(encoded.trained)
        if longest > checks.long_answer_tokens:
            yield CheckHit("long_answer", f"{longest:,} trained tokens in one answer")
    for part in parts:
        if part.answer is not None and (ratio := _repetition(part.answer)) > REPETITIVE_RATIO:
            yield CheckHit("repetitive_answer", f"{part.where} is {len(part.answer):,} characters that compress to 1/{ratio:.0f}")
            break
    if isinstance(document, Chat) and (fault := role_fault(document.messages)):
        yield CheckHit("role_order", fault)


def _longest_run(trained: np.ndarray) -> int:
    borders = np.flatnonzero(np.diff(trained, prepend=0, append=0))
    return int((borders[1::2] - borders[::2]).max(initial=0))


def _repetition(text: str) -> float:
    data = text.encode()
    return len(data) / len(zlib.compress(data, 1)) if len(data) >= _MIN_REPETITIVE_BYTES else 0.0


def role_fault(messages: Sequence[Message]) -> str | None:
    """The first place where a conversation is not: system, then user and assistant in turns, the assistant last."""
    before = "start"
    for i, message in enumerate(messages):
        role = message.role
        uncalled = role == "tool" and before == "assistant" and not messages[i - 1].tool_calls
        if uncalled or before not in _MAY_FOLLOW.get(role, (before,)):
            return f"messages[{i}] ({role}) " + ("comes first" if before == "start" else f"follows a message of role {before}")
        before = before if role == "system" else role
    return None if before == "assistant" else f"the last message is of role {messages[-1].role}"


def _in_texts(parts: Sequence[_TextPart], whole: str, data: bytes, special_texts: Sequence[str]) -> Iterator[CheckHit]:
    """Faults that stand in the text itself: the first of each kind, and how many more there are."""
    found: dict[str, list[str]] = defaultdict(list)
    searches = patterns.worth_while(data)
    special = patterns.may_hold_special_tokens(whole, special_texts)
    if not searches and not special and whole.isascii():
        return
    for part in parts:
        if not part.text.isascii() and (broken := _broken(part.text)):
            found["broken_encoding"].append(f"{part.where}: {broken}")
        for token, known in patterns.special_tokens(part.text, special_texts) if special else ():
            means = "a special token of this tokenizer" if known else "unknown to this tokenizer"
            found["special_token_in_text"].append(f"{part.where}: {token}, {means}")
        for search, match in patterns.find(part.text, searches):
            found[search.finding].append(f"{part.where}, character {match.start()}: {patterns.hidden(search, match)}")
    for finding, details in found.items():
        yield CheckHit(finding, details[0] + (f" and {len(details) - 1} more" if len(details) > 1 else ""))


def _across_the_border(document: Document) -> Iterator[CheckHit]:
    """What begins in the prompt and ends in the completion."""
    if not isinstance(document, Completion):
        return
    before = document.prompt[-_AROUND_BORDER:]
    text = before + document.completion[:_AROUND_BORDER]
    for search, match in patterns.find(text, patterns.worth_while(text.lower().encode())):
        if match.start() < len(before) < match.end():
            place = len(document.prompt) - len(before) + match.start()
            yield CheckHit(search.finding, f"prompt, character {place}: {patterns.hidden(search, match)}")


def _broken(text: str) -> str | None:
    if count := text.count("\ufffd"):
        return f"{count} replacement character{'s' if count > 1 else ''}"
    # ftfy's own look takes a quarter of a microsecond a character.
    return "bytes read in the wrong encoding" if _MOJIBAKE.search(text) and is_bad(text) else None


def select_dropped(hits: Iterable[tuple[int, CheckHit]], num_docs: int, checks: ChecksSection) -> np.ndarray:
    """Which documents `checks` drop, bool [documents]."""
    by_name = _by_name(hits)
    drop = np.zeros(num_docs, dtype=bool)
    for name, of_name in by_name.items():
        if getattr(checks, name) == "drop" and name != "near_duplicate":
            # A held-out document stays, and what stands in training goes.
            drop[[i for one in of_name.values() for i in one.others] if name in LEAKS else list(of_name)] = True
    if checks.near_duplicate == "drop":
        drop[_nearly_again(by_name["near_duplicate"], drop)] = True
    return drop


def _by_name(hits: Iterable[tuple[int, CheckHit]]) -> dict[str, dict[int, CheckHit]]:
    """The first hit of each document by each check."""
    by_name: dict[str, dict[int, CheckHit]] = defaultdict(dict)
    for document, hit in hits:
        by_name[hit.finding].setdefault(document, hit)
    return by_name


def collect_findings(hits: Iterable[tuple[int, CheckHit]], corpus: CheckedDocuments, checks: ChecksSection) -> Findings:
    """What is told of all documents."""
    by_name = _by_name(hits)
    looked_at = {**dict.fromkeys(LEAKS, corpus.held_out), "no_turn_end": corpus.trained}
    found = []
    for name in CHECKS:
        if of_name := by_name.get(name):
            of_source = corpus.source[looked_at[name]] if name in looked_at else corpus.source
            found.append(_finding(name, np.asarray(sorted(of_name)), of_source, of_name, corpus))
    return tuple(found + _few(corpus, checks))


def _nearly_again(hits: dict[int, CheckHit], drop: np.ndarray) -> list[int]:
    """Near duplicates of what is left; where a document is dropped for another fault, the first that is like it stays."""
    stays: set[int] = set()
    gone = []
    for document, hit in hits.items():
        first = hit.others[0]
        if drop[first] and not drop[document] and first not in stays:
            stays.add(first)
        else:
            gone.append(document)
    return gone


def _finding(
    name: str, documents: np.ndarray, of_source: np.ndarray, hits: dict[int, CheckHit], corpus: CheckedDocuments
) -> Finding:
    """`of_source` is the source of each document that the check looks at."""
    evenly = np.linspace(0, len(documents) - 1, NUM_EXAMPLES).round().astype(int)
    examples = []
    for i in documents[np.unique(evenly)].tolist():
        detail, others = hits[i].detail, hits[i].others
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            detail = f"{detail} {corpus.wheres[others[0]]}{more}"
        examples.append(Example(corpus.wheres[i], detail))
    num = len(corpus.names)
    shares = np.bincount(corpus.source[documents], minlength=num) / np.maximum(1, np.bincount(of_source, minlength=num))
    by_source = _by_source(documents, corpus)
    return Finding(name, len(documents), len(of_source), by_source, tuple(examples), float(shares.max()))


def _by_source(documents: np.ndarray, corpus: CheckedDocuments) -> dict[str, int]:
    counts = np.bincount(corpus.source[documents], minlength=len(corpus.names))
    return {corpus.names[i]: int(count) for i, count in enumerate(counts) if count}


def _few(corpus: CheckedDocuments, checks: ChecksSection) -> list[Finding]:
    """The finding that what is trained on is little for its purpose: examples are counted, texts alone by their tokens."""
    examples = np.flatnonzero(corpus.used & ~corpus.is_text)
    documents = examples if len(examples) else np.flatnonzero(corpus.used)
    num_tokens = int(corpus.num_tokens[documents].sum())
    if len(examples):
        few, said = len(examples) < checks.few_examples_below, f"{len(examples):,} examples to train on; {_USUAL_EXAMPLES}"
    else:
        few, said = num_tokens < FEW_TOKENS_OF_TEXT, f"{num_tokens:,} tokens of text to train on; {_USUAL_TEXT}"
    if not few or not len(documents):
        return []
    example = Example(corpus.wheres[documents[0]], said)
    return [Finding("few_examples", len(documents), int(corpus.used.sum()), _by_source(documents, corpus), (example,))]
