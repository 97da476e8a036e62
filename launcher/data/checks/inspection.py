"""Check each document by itself, in the processes that encode it: structure, text, hashes for the comparison with others."""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ftfy.badness import is_bad

from launcher.config.sections.data import ChecksSection, DataSection
from launcher.data.checks import minhash, patterns
from launcher.data.sources import Chat, Completion, Document, Message, PlainText
from launcher.data.tokenization.chat_template import TrainOn, find_trained_messages
from launcher.data.tokenization.encoder import EncodedDocument, RenderedDocument

# zlib compresses prose to about a half, code and tables to a third, and text that repeats itself to a fifth or less.
REPETITIVE_RATIO = 5.0
_MIN_REPETITIVE_BYTES = 400
# The first two bytes of a multi-byte UTF-8 character, decoded as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
# Characters on either side of the start of a completion: the length of long keys and addresses.
_AROUND_START = 256
_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class CheckHit:
    """A check that a document failed. `detail` has no secret; `others` are the indices of the documents that it is similar to."""

    finding: str
    detail: str
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """The result for one document: 64-bit hashes, a MinHash signature uint16 [128] for long enough texts, the failed checks.

    `content` is the hash of the normalized text, `task` that of the text with its roles, weights and tools.
    """

    content: int
    task: int
    signature: np.ndarray | None
    hits: tuple[CheckHit, ...]
    is_text: bool


@dataclass(frozen=True)
class _TextPart:
    """A part of a document's text. `where` names it within the document; `answer` is the text of it that is trained, if any."""

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
    """Check documents, their texts, and their tokens before truncation; `special_texts` are the tokenizer's special tokens."""
    contents, tasks, signed, hits = [], [], [], []
    for document, rendering, tokens in zip(documents, rendered, encoded, strict=True):
        parts = list(_parts(document, rendering, data.train_on))
        full_text = _joined(parts)
        # Other tools make another task of the same text, see _setup; and a shared system text does not make chats similar.
        content = _joined(parts, full_text, but=("tools",)).encode()
        signed.append(_joined(parts, full_text, but=("tools", "system")).encode())
        contents.append(minhash.hash_content(content))
        tasks.append(minhash.hash_content(content + _setup(document)))
        trained_parts = _as_trained(document, parts, data.system)
        text = full_text if trained_parts is parts else _joined(trained_parts)
        text_hits = _check_texts(trained_parts, text, text.encode(), special_texts)
        hits.append((*_check_structure(document, parts, tokens, data.checks), *text_hits, *_check_across_start(document)))
    is_text = [isinstance(document, PlainText) for document in documents]
    return list(map(Inspection, contents, tasks, minhash.compute_signatures(signed), hits, is_text))


def _joined(parts: Sequence[_TextPart], full_text: str | None = None, but: Sequence[str] = ()) -> str:
    """Return the normalized text of the parts, except those named in `but`; `full_text` is that of all parts, if it is known."""
    texts = [part.text for part in parts if part.where not in but]
    return full_text if full_text is not None and len(texts) == len(parts) else minhash.normalize("\n".join(texts))


def _setup(document: Document) -> bytes:
    """Return what makes another task of the same text: roles, weights, tools."""
    if not isinstance(document, Chat):
        return b""
    turns = ",".join([f"{message.role}{message.weight}" for message in document.messages])
    return f"{turns}{json.dumps(document.tools) if document.tools else ''}".encode()


def _parts(document: Document, rendered: RenderedDocument, train_on: TrainOn) -> Iterator[_TextPart]:
    match document:
        case Chat(messages=messages, tools=tools):
            if tools:
                yield _TextPart("tools", json.dumps(tools, ensure_ascii=False), None)
            trained = find_trained_messages(document, train_on)
            for i, message in enumerate(messages):
                where = "system" if message.role == "system" else f"messages[{i}]"
                text = answer = _written(message, message.reasoning_content)
                if i in trained and (thought := message.reasoning_content):
                    # Templates omit the reasoning of earlier turns.
                    is_written = any(thought.strip() in rendered.text[span.start : span.end] for span in rendered.spans)
                    answer = text if is_written else _written(message, None)
                yield _TextPart(where, text, answer if i in trained else None)
        case Completion(prompt=prompt, completion=completion):
            yield _TextPart("prompt", prompt, None)
            yield _TextPart("completion", completion, completion)
        case PlainText(text=text):
            yield _TextPart("text", text, None)


def _as_trained(document: Document, parts: list[_TextPart], system: str | None) -> list[_TextPart]:
    """Return the parts with data.system in place of the row's own system text, and with the names of the speakers.

    Neither changes the identity of a document: the split and the duplicates depend on the row's own text.
    """
    if not isinstance(document, Chat):
        return parts
    messages = document.messages
    names = [_TextPart(f"messages[{i}].name", message.name, None) for i, message in enumerate(messages) if message.name]
    if system is None:
        return [*parts, *names] if names else parts
    num_before = int(bool(document.tools))
    has_system = messages[0].role == "system"
    return [*parts[:num_before], _TextPart("data.system", system, None), *parts[num_before + has_system :], *names]


def _written(message: Message, reasoning: str | None) -> str:
    """Return the text of a message: its reasoning, its content, its tool calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.tool_calls]
    return "\n".join(text for text in (reasoning, message.content, *calls) if text)


def _check_structure(
    document: Document, parts: list[_TextPart], encoded: EncodedDocument, checks: ChecksSection
) -> Iterator[CheckHit]:
    """Check the structure: trained tokens, empty and long answers, roles."""
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
    """Return where a conversation first deviates from: system, then user and assistant in turns, the assistant last."""
    previous = "start"
    for i, message in enumerate(messages):
        role = message.role
        uncalled = role == "tool" and previous == "assistant" and not messages[i - 1].tool_calls
        if uncalled or previous not in _MAY_FOLLOW.get(role, (previous,)):
            return f"messages[{i}] ({role}) " + (
                "comes first" if previous == "start" else f"follows a message of role {previous}"
            )
        previous = previous if role == "system" else role
    return None if previous == "assistant" else f"the last message is of role {messages[-1].role}"


def _check_texts(parts: Sequence[_TextPart], full_text: str, data: bytes, special_texts: Sequence[str]) -> Iterator[CheckHit]:
    """Check the text itself; a hit names the first match of a check and the number of others."""
    details: dict[str, list[str]] = defaultdict(list)
    candidates = patterns.find_candidates(data)
    special = patterns.may_hold_special_tokens(full_text, special_texts)
    if not candidates and not special and full_text.isascii():
        return
    for part in parts:
        if not part.text.isascii() and (broken := _broken(part.text)):
            details["broken_encoding"].append(f"{part.where}: {broken}")
        for token, known in patterns.special_tokens(part.text, special_texts) if special else ():
            means = "a special token of this tokenizer" if known else "unknown to this tokenizer"
            details["special_token_in_text"].append(f"{part.where}: {token}, {means}")
        for pattern, match in patterns.find_matches(part.text, candidates):
            details[pattern.finding].append(f"{part.where}, character {match.start()}: {patterns.mask(pattern, match)}")
    for finding, texts in details.items():
        yield CheckHit(finding, texts[0] + (f" and {len(texts) - 1} more" if len(texts) > 1 else ""))


def _check_across_start(document: Document) -> Iterator[CheckHit]:
    """Check for secrets and addresses that begin in the prompt and end in the completion."""
    if not isinstance(document, Completion):
        return
    before = document.prompt[-_AROUND_START:]
    text = before + document.completion[:_AROUND_START]
    for pattern, match in patterns.find_matches(text, patterns.find_candidates(text.lower().encode())):
        if match.start() < len(before) < match.end():
            start = len(document.prompt) - len(before) + match.start()
            yield CheckHit(pattern.finding, f"prompt, character {start}: {patterns.mask(pattern, match)}")


def _broken(text: str) -> str | None:
    if count := text.count("\ufffd"):
        return f"{count} replacement character{'s' if count > 1 else ''}"
    # ftfy takes a quarter of a microsecond per character, so it only sees text that the pattern matches.
    return "bytes read in the wrong encoding" if _MOJIBAKE.search(text) and is_bad(text) else None
