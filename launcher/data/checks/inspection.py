"""Checks each document separately, in the processes that encode it: structure, text, hashes for comparison with others."""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ftfy.badness import is_bad

from launcher.config.sections.data import DataSection
from launcher.data.checks import overlap, patterns
from launcher.data.checks.findings import CheckHit
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.chat_template import TrainOn, find_trained_messages
from launcher.data.tokenization.encoder import EncodedDocument, RenderedDocument
from launcher.plan.quantities import format_count

# zlib compresses prose to about a half, code and tables to a third, and text that repeats itself to a fifth or less.
REPETITIVE_RATIO = 5.0
LONG_ANSWER_TOKENS = 4096
_MIN_REPETITIVE_BYTES = 400
# The first two bytes of a multi-byte UTF-8 character, decoded as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
_DIGITS = b"0123456789"
# If less is left of a prompt without its numbers, such as 3+4=, it is too short to compare.
_MIN_FORM_BYTES = 24
_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class Inspection:
    """The result for one document: 64-bit hashes, a MinHash signature uint16 [128] for long enough texts, the failed checks.

    `content` is the hash of the comparable text, `task` of the text with its roles, weights and tools, `prompt` of everything
    before the first answer, `prompt_form` of the prompt without its numbers; 0 if there is no such text. `split` decides whether
    the document is held out; `split_alone` decides if its prompt does not.
    """

    content: int
    task: int
    prompt: int
    prompt_form: int
    split: int
    split_alone: int
    signature: np.ndarray | None
    hits: tuple[CheckHit, ...]


@dataclass(frozen=True)
class _TextPart:
    """A part of a document's text. `where` names it within the document; `answer` is its trained text, if any."""

    where: str
    text: str
    answer: str | None


def inspect(
    documents: Sequence[Document],
    rendered: Sequence[RenderedDocument],
    encoded: Sequence[EncodedDocument],
    special_texts: Sequence[str],
    data: DataSection,
    split_tokens: Sequence[str] = (),
) -> list[Inspection]:
    """Check documents: their structure, their texts, and their tokens before truncation.

    `special_texts` are the tokenizer's special tokens, `split_tokens` control tokens in the template that it splits.
    """
    identities: list[tuple[tuple[int, int, int, int, int, int], bytes]] = []
    hits: list[tuple[CheckHit, ...]] = []
    for document, rendering, tokens in zip(documents, rendered, encoded, strict=True):
        parts = list(_list_parts(document, rendering, data.train_on))
        hashes, signed, text = _compute_hashes(document, parts)
        identities.append((hashes, signed))
        trained_parts = parts
        if document.messages:
            # data.system stands in for the row's own system text, and speakers have names. Neither changes the identity of a
            # document, because the split and the duplicates depend on the row's own text.
            if data.system is not None:
                first = int(bool(document.tools))
                rest = parts[first + (document.messages[0].role == "system") :]
                trained_parts = [*parts[:first], _TextPart("data.system", data.system, None), *rest]
            names = [(i, message.name) for i, message in enumerate(document.messages) if message.name]
            trained_parts = [*trained_parts, *(_TextPart(f"messages[{i}].name", name, None) for i, name in names)]
            if names or data.system is not None:
                text = overlap.normalize("\n".join([part.text for part in trained_parts]))
        text_hits = _check_texts(trained_parts, text, patterns.find_candidates(text.encode()), special_texts)
        split = [] if rendering.raw else [token for token in split_tokens if token in rendering.text]
        split_hits = [CheckHit("split_control_token", f"{', '.join(split)}: not a token of this tokenizer")] if split else []
        hits.append((*_check_structure(document, parts, tokens), *text_hits, *split_hits))
    signatures = overlap.compute_signatures([signed for _, signed in identities])
    return [
        Inspection(*hashes, signature, document_hits)
        for (hashes, _), signature, document_hits in zip(identities, signatures, hits, strict=True)
    ]


def _compute_hashes(document: Document, parts: Sequence[_TextPart]) -> tuple[tuple[int, int, int, int, int, int], bytes, str]:
    """Return the hashes of `Inspection`, in its order, the text of the signature, and the normalized text of all `parts`."""
    num_tools = int(bool(parts) and parts[0].where == "tools")
    num_system = num_tools + int(len(parts) > num_tools and parts[num_tools].where == "system")
    # Everything before the first answer.
    num_prompt = num_tools + bool(document.prompt)
    if document.messages:
        roles = [message.role for message in document.messages]
        num_prompt += roles.index("assistant") if "assistant" in roles else len(roles)
    bounds = ((0, num_tools), (num_tools, num_system), (num_system, num_prompt), (max(num_system, num_prompt), len(parts)))
    tools, system, question, rest = [
        overlap.normalize("\n".join([part.text for part in parts[a:b]])) if a < b else "" for a, b in bounds
    ]
    texts = [text for text in (system, question, rest) if text]
    comparable = [overlap.make_comparable(text) for text in (system, question, rest)]
    # With other roles, weights or tools, the same text is another task; a shared system text does not make chats similar.
    setup = ",".join([f"{message.role}{message.weight}" for message in document.messages])
    setup += json.dumps(document.tools) if document.tools else ""
    content = _join(comparable)
    prompt = _join(comparable[:2]) if question else b""
    form = prompt.translate(None, _DIGITS)
    of_content, of_prompt = overlap.hash_content(content), overlap.hash_content(prompt) if prompt else 0
    hashes = (
        of_content,
        overlap.hash_content(content + setup.encode()),
        of_prompt,
        overlap.hash_content(form) if len(form) >= _MIN_FORM_BYTES else 0,
        of_prompt or of_content,
        of_content,
    )
    return hashes, _join(comparable[1:]), " ".join([tools, *texts]) if tools else " ".join(texts)


def _join(texts: Sequence[bytes]) -> bytes:
    return b" ".join([text for text in texts if text])


def _list_parts(document: Document, rendered: RenderedDocument, train_on: TrainOn) -> Iterator[_TextPart]:
    if document.tools:
        yield _TextPart("tools", json.dumps(document.tools, ensure_ascii=False), None)
    trained = find_trained_messages(document, train_on)
    for i, message in enumerate(document.messages):
        where = "system" if message.role == "system" else f"messages[{i}]"
        text = answer = _write_message(message, message.reasoning_content)
        if i in trained and (thought := message.reasoning_content):
            # Templates omit the reasoning of earlier turns.
            is_written = any(thought.strip() in rendered.text[span.start : span.end] for span in rendered.spans)
            answer = text if is_written else _write_message(message, None)
        yield _TextPart(where, text, answer if i in trained else None)
    if document.prompt:
        yield _TextPart("prompt", document.prompt, None)
        yield _TextPart("completion", document.text, document.text)
    elif not document.messages:
        yield _TextPart("text", document.text, None)


def _write_message(message: Message, reasoning: str | None) -> str:
    """Return the text of a message: its reasoning, its content, its tool calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.tool_calls]
    return "\n".join(text for text in (reasoning, message.content, *calls) if text)


def _check_structure(document: Document, parts: list[_TextPart], encoded: EncodedDocument) -> Iterator[CheckHit]:
    """Check the structure: trained tokens, empty and long answers, roles."""
    num_trained = int(np.count_nonzero(encoded.trained))
    if encoded.is_unsure:
        yield CheckHit("unsure_border", "the trained text begins or ends inside a token")
    elif not num_trained and len(encoded.ids):
        yield CheckHit("no_trained_token", "no token is trained")
    if empty := [part.where for part in parts if part.answer is not None and not part.answer.strip()]:
        yield CheckHit("empty_answer", f"{empty[0]} is empty")
    if num_trained > LONG_ANSWER_TOKENS and (document.messages or document.prompt):
        borders = np.flatnonzero(np.diff(encoded.trained, prepend=0, append=0))
        longest = int((borders[1::2] - borders[::2]).max())
        if longest > LONG_ANSWER_TOKENS:
            yield CheckHit("long_answer", f"{longest:,} trained tokens in one answer")
    for part in parts:
        answer = (part.answer or "").encode()
        ratio = len(answer) / len(zlib.compress(answer, 1)) if len(answer) >= _MIN_REPETITIVE_BYTES else 0.0
        if ratio > REPETITIVE_RATIO:
            length = len(part.answer or "")
            yield CheckHit("repetitive_answer", f"{part.where} is {length:,} characters that compress to 1/{ratio:.0f}")
            break
    if document.messages and (fault := find_role_fault(document.messages)):
        yield CheckHit("role_order", fault)


def find_role_fault(messages: Sequence[Message]) -> str | None:
    """Return where a conversation first deviates from the order: system, then user and assistant in turns, the assistant last."""
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


def _check_texts(
    parts: Sequence[_TextPart], full_text: str, candidates: Sequence[patterns.TextPattern], special_texts: Sequence[str]
) -> Iterator[CheckHit]:
    """Check the text itself; a hit names the first match of a check and the number of other matches."""
    details: dict[str, list[str]] = defaultdict(list)
    special = patterns.may_hold_special_tokens(full_text, special_texts)
    if not candidates and not special and full_text.isascii():
        return
    for part in parts:
        if count := part.text.count("\ufffd"):
            details["broken_encoding"].append(f"{part.where}: {format_count(count, 'replacement character')}")
        # ftfy takes a quarter of a microsecond per character, so it only sees text that the pattern matches.
        elif not part.text.isascii() and _MOJIBAKE.search(part.text) and is_bad(part.text):
            details["broken_encoding"].append(f"{part.where}: bytes read in the wrong encoding")
        for token, known in patterns.special_tokens(part.text, special_texts) if special else ():
            means = "a special token of this tokenizer" if known else "unknown to this tokenizer"
            details["special_token_in_text"].append(f"{part.where}: {token}, {means}")
        for pattern, match in patterns.find_matches(part.text, candidates):
            details[pattern.finding].append(f"{part.where}, character {match.start()}: {patterns.mask(pattern, match)}")
    for finding, texts in details.items():
        yield CheckHit(finding, texts[0] + (f" and {len(texts) - 1} more" if len(texts) > 1 else ""))
