"""From documents to token ids and the mask of trained tokens: rendering, tokenising, and borders between tokens."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launcher.config.data import DataSection
from launcher.data.sources import Chat, Completion, Document, PlainText
from launcher.data.tokenization import fast_tokenizer
from launcher.data.tokenization.loss_mask import Template, TrainedSpan, with_system
from launcher.errors import DataError, Problem

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Of a token that stands for no text.
_NOWHERE = (-1, -1)


@dataclass(frozen=True)
class RenderedDocument:
    """Text that is ready for the tokenizer; `raw` text gets the tokenizer's begin and end tokens, a chat has its own."""

    where: str
    text: str
    spans: tuple[TrainedSpan, ...]
    raw: bool


@dataclass(frozen=True)
class EncodedDocument:
    """`ids` uint32 and `trained` uint8, one per token; `turn_ends` are the positions of trained end-of-turn tokens.

    `is_unsure`: what is trained begins or ends inside a token, however the text is tokenised; then nothing is.
    """

    ids: np.ndarray
    trained: np.ndarray
    turn_ends: tuple[int, ...]
    is_unsure: bool = False


def import_tokenizers_without_torch() -> None:
    """Import what loads tokenizers as if torch were not installed; without effect in a process that has imported torch.

    Tokenizers need no torch, and transformers imports it wherever it is installed: seconds, and memory in every process.
    transformers keeps the answer that there is no torch; everything else can still import it.
    """
    if "torch" in sys.modules:
        return
    from transformers.utils import is_torch_available

    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        is_torch_available.cache_clear()
        is_torch_available()
        import transformers.models.auto.tokenization_auto  # noqa: F401
    finally:
        del sys.modules["torch"]


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; code that comes with it is not run. Errors: DataError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        remedy = "set model.tokenizer to a folder that save_pretrained wrote"
        raise DataError(Problem(f"the tokenizer cannot be loaded: {error}", "model.tokenizer", folder, remedy)) from error


def read_template(data: DataSection) -> str | None:
    """The text of data.chat_template; None where the tokenizer's own is used. Errors: DataError."""
    file = data.chat_template
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "set data.chat_template to a file with a Jinja template"
        raise DataError(Problem(f"the template cannot be read: {error}", "data.chat_template", file, remedy)) from error


class Encoder:
    """Renders and tokenises documents with one tokenizer; the same settings give the same tokens in every process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        self.tokenizer = tokenizer
        self.data = data
        added = tokenizer.added_tokens_decoder
        self.special_ids = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        special_texts = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self.special_texts = tuple(sorted(special_texts, key=len, reverse=True))
        self._template = Template(tokenizer, self.special_texts, read_template(data), data.chat_template or "")
        plain = tokenizer("a", add_special_tokens=False).input_ids
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] != plain[:1]
        self._begin = np.asarray([tokenizer.bos_token_id] if begins else [], dtype=np.uint32)
        self._end = np.asarray([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.uint32)
        self._words = None
        self._continuing: Tokenizer | None = None
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            self._words = fast_tokenizer.words_of(tokenizer.backend_tokenizer)
            if self._words is None:
                self._continuing = _continuing(tokenizer.backend_tokenizer)

    def render(self, document: Document) -> RenderedDocument:
        """The document's text and its trained spans; errors: DataError naming template and document."""
        match document:
            case Chat():
                text, spans = self._template.trained(with_system(document, self.data.system), self.data.train_on)
                return RenderedDocument(document.where, text, spans, raw=False)
            case Completion(where, prompt, completion):
                start = 0 if self.data.train_on == "all" else len(prompt)
                return self._raw(where, prompt + completion, TrainedSpan(start, len(prompt) + len(completion)))
            case PlainText(where, text):
                return self._raw(where, text, TrainedSpan(0, len(text)))

    def prompt(self, document: Document) -> tuple[str, list[int], str] | None:
        """(prompt for a person, prompt's token ids up to where the model goes on, reference answer); None for plain text."""
        match document:
            case Chat(_, messages, _) if messages[-1].role == "assistant" and len(messages) > 1 and messages[-1].content:
                chat = with_system(document, self.data.system)
                text = self._template.render(chat, len(chat.messages) - 1, generation_prompt=True)
                return messages[-2].content, self._ids([text])[0].tolist(), messages[-1].content
            case Completion(_, prompt, completion) if prompt:
                return prompt, [*self._begin.tolist(), *self._ids([prompt])[0].tolist()], completion
        return None

    def encode(self, batch: Sequence[RenderedDocument]) -> list[EncodedDocument]:
        """Tokenise; where a border of the mask falls inside a token, the text is cut there, as it is for generation."""
        borders = [sorted({border for span in text.spans for border in _borders(span)}) for text in batch]
        texts = [text.text for text in batch]
        cuts: list[list[int] | None] = [None] * len(batch)
        if self.tokenizer.is_fast:
            ids, cuts = self._fast(texts, borders)
        else:
            ids = self._ids(texts)
        self._cut_where_needed(texts, ids, borders, cuts)
        return list(map(self._encoded, batch, ids, borders, cuts))

    @property
    def _name(self) -> str:
        return str(self.tokenizer.name_or_path)

    # Tokens

    def _raw(self, where: str, text: str, span: TrainedSpan) -> RenderedDocument:
        if not len(self._end):
            remedy = "set eos_token in its tokenizer_config.json"
            raise DataError(Problem("the tokenizer has no end token, which ends a text", where, self._name, remedy))
        return RenderedDocument(where, text, (span,), raw=True)

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        return [np.asarray(ids, dtype=np.uint32) for ids in found]

    def _fast(self, texts: list[str], borders: list[list[int]]) -> tuple[list[np.ndarray], list[list[int] | None]]:
        """Token ids of each text, and the number of tokens before each of its borders, as _token_borders gives it."""
        ids = [np.empty(0, np.uint32)] * len(texts)
        cuts: list[list[int] | None] = [None] * len(texts)
        asked = []
        for i, text in enumerate(texts):
            if self._words is None or (found := self._words.encode(text)) is None:
                asked.append(i)
            else:
                ids[i], cuts[i] = found[0], fast_tokenizer.tokens_before(text, borders[i], found[1])
        # As the tokenizer's own call does, which would make Python objects of every token's offsets.
        encodings = self.tokenizer.backend_tokenizer.encode_batch([texts[i] for i in asked], add_special_tokens=False)
        for i, encoding in zip(asked, encodings, strict=True):
            found_ids = encoding.ids
            ids[i] = np.asarray(found_ids, dtype=np.uint32)
            cuts[i] = self._token_borders(texts[i], found_ids, encoding, borders[i])
        return ids, cuts

    def _token_borders(self, text: str, ids: list[int], encoding: Encoding, borders: list[int]) -> list[int] | None:
        """Number of tokens before each border; None where one falls inside a token, or where a token's own borders are unsure.

        Some tokenizers leave spaces out of a token's offsets, hence the demand that the tokens on both sides meet there. A
        special token may swallow white space after it; a border right behind its text then moves to its end.
        """
        cuts = []
        for border in borders:
            cut = len(ids) if border == len(text) else encoding.char_to_token(border)
            if cut is None:
                return None
            start, end = (encoding.token_to_chars(cut) or _NOWHERE) if cut < len(ids) else (border, border)
            before = (encoding.token_to_chars(cut - 1) or _NOWHERE)[1] if cut > 0 else border
            if start < border and ids[cut] in self.special_ids and text[border:end].isspace():
                cut += 1
            elif start != border or before != border:
                return None
            cuts.append(cut)
        return cuts

    def _cut_where_needed(
        self, texts: list[str], ids: list[np.ndarray], borders: list[list[int]], cuts: list[list[int] | None]
    ) -> None:
        """Tokenise piece by piece, in place, the texts whose borders fall inside tokens: as generation does after a prompt.

        Pieces that do not give the same text together stay without cuts.
        """
        for i in [i for i, cut in enumerate(cuts) if cut is None]:
            pieces = [texts[i][a:b] for a, b in itertools.pairwise([0, *borders[i], len(texts[i])])]
            whole, ways = self._decode(ids[i]), [self._ids(pieces)]
            if self._continuing is not None:
                rest = self._continuing.encode_batch(pieces[1:], add_special_tokens=False)
                ways.append([ways[0][0], *(np.asarray(piece.ids, dtype=np.uint32) for piece in rest)])
            for parts in ways:
                joined = np.concatenate(parts)
                if self._decode(joined) == whole:
                    ids[i] = joined
                    cuts[i] = list(itertools.accumulate(len(part) for part in parts[:-1]))
                    break

    def _decode(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encoded(self, text: RenderedDocument, ids: np.ndarray, borders: list[int], cuts: list[int] | None) -> EncodedDocument:
        shift = len(self._begin) if text.raw else 0
        if text.raw:
            ids = np.concatenate([self._begin, ids, self._end])
        trained = np.zeros(len(ids), dtype=np.uint8)
        if cuts is None:
            return EncodedDocument(ids, trained, (), is_unsure=True)
        cut_at = dict(zip(borders, cuts, strict=True))
        turn_ends = []
        for span in text.spans:
            end = shift + cut_at[span.end] + text.raw
            trained[shift + cut_at[span.start] : end] = 1
            if text.raw:
                turn_ends.append(end - 1)
            elif span.turn_end is not None:
                turn_ends.append(shift + cut_at[span.turn_end])
        # Nothing stands before the first token to predict it from.
        trained[:1] = 0
        return EncodedDocument(ids, trained, tuple(turn_ends))


def _continuing(tokenizer: Tokenizer) -> Tokenizer | None:
    """`tokenizer` for text in the middle of a document, without the space that it puts before a text; None where it puts none."""
    parts = json.loads(tokenizer.to_str())
    before = json.dumps(parts)
    normalizer = parts["normalizer"] or {}
    if normalizer.get("type") == "Prepend":
        parts["normalizer"] = None
    elif normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    splitter = parts["pre_tokenizer"] or {}
    for step in splitter.get("pretokenizers", [splitter]):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
    made = json.dumps(parts)
    return None if made == before else type(tokenizer).from_str(made)


def _borders(span: TrainedSpan) -> tuple[int, ...]:
    return (span.start, span.end) if span.turn_end is None else (span.start, span.turn_end, span.end)
