"""From documents to token ids and the mask of trained tokens.

Chats are rendered with the tokenizer's own chat template. Only what the model must write itself is trained: the assistant's
messages up to and including the end-of-turn token. The borders are found by rendering prefixes and comparing; where a
template does not let them be found for certain, it is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import jinja2
import numpy as np

from launcher.config.data import DataSection
from launcher.data.sources import Chat, Completion, Document, Message, PlainText
from launcher.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """Trained characters start:end of a text; the last `turn_end` of them are the end-of-turn token (0: there is none)."""

    start: int
    end: int
    turn_end: int


@dataclass(frozen=True)
class Rendered:
    """Text that is ready for the tokenizer; `raw` text gets the tokenizer's begin and end tokens, a chat has its own."""

    where: str
    text: str
    spans: tuple[Span, ...]
    raw: bool


@dataclass(frozen=True)
class Encoded:
    """`ids` uint32 and `trained` uint8, one per token; `turn_ends` are the positions of trained end-of-turn tokens."""

    ids: np.ndarray
    trained: np.ndarray
    turn_ends: tuple[int, ...]


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; code that comes with it is not run. Errors: DataError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        remedy = "set model.tokenizer to a folder that save_pretrained wrote"
        raise DataError(Problem(f"the tokenizer cannot be loaded: {error}", "model.tokenizer", folder, remedy)) from error


class Encoder:
    """Renders and tokenises documents with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        self.tokenizer = tokenizer
        self.data = data
        added = tokenizer.added_tokens_decoder
        self.special_ids = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        special_texts = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self.special_texts = tuple(sorted(special_texts, key=len, reverse=True))
        plain = tokenizer("a", add_special_tokens=False).input_ids
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] != plain[:1]
        self._begin = [tokenizer.bos_token_id] if begins else []

    def render(self, document: Document) -> Rendered:
        """The document's text and its trained spans; errors: DataError naming template and document."""
        match document:
            case Chat(where, messages, _):
                return self._render_chat(where, messages)
            case Completion(where, prompt, completion):
                end = len(prompt) + len(completion)
                return self._raw(where, prompt + completion, Span(len(prompt), end, 0))
            case PlainText(where, text):
                return self._raw(where, text, Span(0, len(text), 0))

    def prompt(self, document: Document) -> tuple[str, list[int], str] | None:
        """(prompt for a person, prompt's token ids up to where the model goes on, reference answer); None for plain text."""
        match document:
            case Chat(where, messages, _) if messages[-1].role == "assistant" and len(messages) > 1:
                text = self._apply_template(where, messages[:-1], generation_prompt=True)
                return messages[-2].content, self._ids([text])[0], messages[-1].content
            case Completion(_, prompt, completion) if prompt:
                return prompt, self._begin + self._ids([prompt])[0], completion
        return None

    def encode(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """Tokenise; errors: DataError where the mask's borders cannot be made to fall between tokens."""
        borders = [sorted({border for span in text.spans for border in (span.start, span.end)}) for text in batch]
        texts = [text.text for text in batch]
        ids: list[list[int]] = []
        cuts: list[list[int] | None] = [None] * len(batch)
        if self.tokenizer.is_fast:
            output = self.tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
            ids = output.input_ids
            for i, offsets in enumerate(output.offset_mapping):
                cuts[i] = self._token_borders(texts[i], ids[i], offsets, borders[i])
        else:
            ids = self._ids(texts)
        self._cut_where_needed(batch, ids, borders, cuts)
        return [
            self._encoded(text, token_ids, dict(zip(border, cut or (), strict=True)))
            for text, token_ids, border, cut in zip(batch, ids, borders, cuts, strict=True)
        ]

    # Chats

    def _render_chat(self, where: str, messages: tuple[Message, ...]) -> Rendered:
        full = self._apply_template(where, messages)
        spans = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                if i == 0:
                    remedy = "begin the conversation with a user message"
                    raise DataError(Problem("the conversation begins with the assistant", where, remedy=remedy))
                prefix = self._apply_template(where, messages[:i], generation_prompt=True)
                turn = full if i == len(messages) - 1 else self._apply_template(where, messages[: i + 1])
                spans.append(self._assistant_span(full, prefix, turn, message.content.strip(), f"{where}, messages[{i}]"))
        return Rendered(where, full, tuple(spans), raw=False)

    def _assistant_span(self, full: str, prefix: str, turn: str, content: str, where: str) -> Span:
        """What the model must write after `prefix` in `full`; `turn` is the conversation up to this message.

        Text that the template puts between prefix and content (such as an empty think block) is part of the span. Some
        templates put it into the last turn only, so `full` may hold the content with or without it.
        """
        if not full.startswith(prefix) or not turn.startswith(prefix):
            self._refuse_template("renders earlier messages otherwise once a later one follows", where)
        answer = turn[len(prefix) :].rstrip()
        turn_end = next((token for token in self.special_texts if token and answer.endswith(token)), "")
        body = answer.removesuffix(turn_end).strip()
        if not body.endswith(content):
            self._refuse_template("changes the message, or puts text between it and the end of the turn", where)
        for written in (body, content) if turn_end else (answer.strip(),):
            start = _after_space(full, len(prefix))
            if full.startswith(written, start):
                end = start + len(written)
                if turn_end:
                    end = _after_space(full, end)
                if full.startswith(turn_end, end):
                    return Span(len(prefix), end + len(turn_end), len(turn_end))
        self._refuse_template("renders this message otherwise once later ones follow", where)

    def _apply_template(self, where: str, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            remedy = "choose a model with a chat template (often named -Instruct), or use the formats prompt_completion or text"
            raise DataError(Problem("the tokenizer has no chat template, which rows of messages need", where, self._name, remedy))
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation_prompt)
        except jinja2.TemplateError as error:
            self._refuse_template(f"refuses this conversation: {error}", where)
        return str(text)

    @property
    def _name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def _refuse_template(self, does: str, where: str) -> NoReturn:
        what = f"the chat template {does}, so the trained tokens cannot be told for certain"
        remedy = "change the row, or use a tokenizer whose template keeps messages as they are"
        raise DataError(Problem(what, where, self._name, remedy))

    # Tokens

    def _raw(self, where: str, text: str, span: Span) -> Rendered:
        if self.tokenizer.eos_token_id is None:
            remedy = "set eos_token in its tokenizer_config.json"
            raise DataError(Problem("the tokenizer has no end token, which ends a text", where, self._name, remedy))
        return Rendered(where, text, (span,), raw=True)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids

    def _token_borders(self, text: str, ids: list[int], offsets: list[tuple[int, int]], borders: list[int]) -> list[int] | None:
        """Number of tokens before each border; None where one falls inside a token, or where a token's own borders are unsure.

        Some tokenizers leave spaces out of a token's offsets, hence the demand that the tokens on both sides meet there. A
        special token may swallow white space after it; a border right behind its text then moves to its end.
        """
        if not offsets:
            return [0] * len(borders) if not text else None
        starts, ends = np.asarray(offsets).T
        cuts = []
        for border in borders:
            cut = int(np.searchsorted(ends, border, side="right"))
            if cut < len(ids) and starts[cut] < border and ids[cut] in self.special_ids and text[border : ends[cut]].isspace():
                cut += 1
            elif (cut > 0 and ends[cut - 1] != border) or (cut < len(ids) and starts[cut] != border):
                return None
            cuts.append(cut)
        return cuts

    def _cut_where_needed(
        self, batch: Sequence[Rendered], ids: list[list[int]], borders: list[list[int]], cuts: list[list[int] | None]
    ) -> None:
        """Tokenise piece by piece, in place, the texts whose borders fall inside tokens: as generation does after a prompt."""
        open_texts = [i for i, cut in enumerate(cuts) if cut is None]
        pieces: list[str] = []
        for i in open_texts:
            pieces += [batch[i].text[a:b] for a, b in itertools.pairwise([0, *borders[i], len(batch[i].text)])]
        done = iter(self._ids(pieces))
        for i in open_texts:
            parts = list(itertools.islice(done, len(borders[i]) + 1))
            joined = list(itertools.chain.from_iterable(parts))
            if self._decode(joined) != self._decode(ids[i]):
                what = "the tokenizer gives other text when the trained part is tokenised by itself"
                remedy = "use a tokenizer with tokenizer.json, or change the row"
                raise DataError(Problem(what, batch[i].where, self._name, remedy))
            ids[i] = joined
            cuts[i] = list(itertools.accumulate(len(part) for part in parts[:-1]))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encoded(self, text: Rendered, ids: list[int], cut_at: dict[int, int]) -> Encoded:
        shift = len(self._begin) if text.raw else 0
        if text.raw:
            ids = [*self._begin, *ids, self.tokenizer.eos_token_id]
        trained = np.zeros(len(ids), dtype=np.uint8)
        turn_ends = []
        for span in text.spans:
            end = shift + cut_at[span.end] + text.raw
            trained[shift + cut_at[span.start] : end] = 1
            if span.turn_end or text.raw:
                turn_ends.append(end - 1)
        # Nothing stands before the first token to predict it from.
        trained[:1] = 0
        return Encoded(np.asarray(ids, dtype=np.uint32), trained, tuple(turn_ends))


def _after_space(text: str, start: int) -> int:
    """Position of the first character from `start` on that is not white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start
