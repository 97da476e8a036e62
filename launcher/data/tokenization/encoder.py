"""Encodes documents as token ids and masks of trained tokens: renders, tokenizes, and aligns the mask with token boundaries."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launcher.config.sections.data import DataSection
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization import fast_tokenizer
from launcher.data.tokenization.chat_template import ChatTemplate, with_system
from launcher.data.tokenization.loss_mask import LossMask, TrainedSpan
from launcher.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

# The span of a token without text.
_NO_SPAN = (-1, -1)


@dataclass(frozen=True)
class RenderedDocument:
    """Text for the tokenizer with its trained spans; `raw` text gets the tokenizer's begin and end tokens, a chat has its own."""

    where: str
    text: str
    spans: tuple[TrainedSpan, ...]
    raw: bool


@dataclass(frozen=True)
class EncodedDocument:
    """`ids` uint32 and `trained` uint8, one per token; `turn_ends` are the positions of trained end-of-turn tokens.

    `is_unsure` is whether a trained span begins or ends inside a token for every tokenization; then no token is trained.
    """

    ids: np.ndarray
    trained: np.ndarray
    turn_ends: tuple[int, ...]
    is_unsure: bool = False


def import_tokenizers_without_torch() -> None:
    """Import transformers' tokenizers as if torch were not installed; no effect if torch is already imported.

    Tokenizers do not need torch, but transformers imports it if it is installed, which costs seconds, and memory in every
    process. Only transformers caches that torch is missing; other modules can still import it.
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
    """Load the tokenizer in `folder` without running code from it. Raises DataError."""
    from transformers import AutoTokenizer

    # Otherwise the package tiktoken reads a copy of the file in the folder that the variable names, or in the temporary folder:
    # other users may be able to write to both.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The package tokenizers raises a plain Exception for a damaged tokenizer.json.
        remedy = "set model.tokenizer to a folder that save_pretrained wrote"
        raise DataError(f"the tokenizer cannot be loaded: {error}", "model.tokenizer", folder, remedy) from error


def read_template(data: DataSection) -> str | None:
    """Return the text of data.chat_template; None if the tokenizer's own template is used. Raises DataError."""
    file = data.chat_template
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "set data.chat_template to a file with a Jinja template"
        raise DataError(f"the template cannot be read: {error}", "data.chat_template", file, remedy) from error


class Encoder:
    """Renders and tokenizes documents with one tokenizer; the same settings give the same tokens in every process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        self.tokenizer = tokenizer
        self.data = data
        added = tokenizer.added_tokens_decoder
        self.special_ids = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        special_texts = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self.special_texts = tuple(sorted(special_texts, key=len, reverse=True))
        self._template = ChatTemplate(tokenizer, read_template(data), data.chat_template or "")
        self.split_tokens = self._template.list_split_tokens()
        self._loss_mask = LossMask(self._template, self.special_texts, self.split_tokens)
        plain = tokenizer("a", add_special_tokens=False).input_ids
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] != plain[:1]
        self._begin = np.asarray([tokenizer.bos_token_id] if begins else [], dtype=np.uint32)
        self._end = np.asarray([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.uint32)
        self._cached = None
        self._continuing: Tokenizer | None = None
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            self._cached = fast_tokenizer.make_cached(tokenizer.backend_tokenizer)
            if self._cached is None:
                self._continuing = _make_continuing(tokenizer.backend_tokenizer)

    def write_as_chat(self, document: Document, completions: str) -> Document:
        """Return a prompt and its completion as a chat, if `completions` (chat, text or auto) says so; else the document.

        The space between prompt and completion is only for text, because a template has its own.
        """
        if completions == "text" or not document.prompt.strip():
            return document
        if completions == "auto" and (
            not self._template.is_given or any(token and token in document.prompt for token in self.special_texts)
        ):
            return document
        answer = document.text
        answer = answer[1:] if answer[:1] == " " and answer[1:2] not in ("", " ") else answer
        messages = (Message("user", document.prompt), Message("assistant", answer))
        return replace(document, messages=messages, prompt="", text="")

    @property
    def has_template(self) -> bool:
        """True if the tokenizer has a chat template, or data.chat_template is set."""
        return self._template.is_given

    def render(self, document: Document) -> RenderedDocument:
        """Return the text of the document and its trained spans. Raises DataError naming the template and the document."""
        if document.messages:
            text, spans = self._loss_mask.find_spans(with_system(document, self.data.system), self.data.train_on)
            return RenderedDocument(document.where, text, spans, raw=False)
        if not len(self._end):
            remedy, name = "set eos_token in its tokenizer_config.json", str(self.tokenizer.name_or_path)
            raise DataError("the tokenizer has no end token, which ends a text", document.where, name, remedy)
        text, start = document.prompt + document.text, 0 if self.data.train_on == "all" else len(document.prompt)
        return RenderedDocument(document.where, text, (TrainedSpan(start, len(text)),), raw=True)

    def prompt(self, document: Document) -> tuple[str, list[int], str] | None:
        """Return (prompt to show, token ids with the generation prompt, reference answer); None for plain text."""
        if document.prompt:
            return document.prompt, [*self._begin.tolist(), *self._encode_prompt(document.prompt)], document.text
        messages = document.messages
        if len(messages) < 2 or messages[-1].role != "assistant" or not messages[-1].content:
            return None
        chat = with_system(document, self.data.system)
        text = self._template.render(chat, len(chat.messages) - 1, generation_prompt=True)
        return messages[-2].content, self._encode_prompt(text), messages[-1].content

    def encode(self, batch: Sequence[RenderedDocument]) -> list[EncodedDocument]:
        """Tokenize; if a boundary of the mask is inside a token, split the text there, as in generation."""
        boundaries = [
            sorted({at for span in rendered.spans for at in (span.start, span.turn_end, span.end) if at is not None})
            for rendered in batch
        ]
        texts = [rendered.text for rendered in batch]
        # The number of tokens before each boundary; None if one is inside a token.
        cuts: list[list[int] | None] = [None] * len(batch)
        if self.tokenizer.is_fast:
            ids, uncached = [np.empty(0, np.uint32)] * len(texts), []
            for i, text in enumerate(texts):
                if self._cached is None or (encoded := self._cached.encode(text)) is None:
                    uncached.append(i)
                else:
                    ids[i], cuts[i] = encoded[0], fast_tokenizer.count_tokens_before(text, boundaries[i], encoded[1])
            # The tokenizer's own __call__ does the same, but also creates Python objects for the offsets of every token.
            encodings = self.tokenizer.backend_tokenizer.encode_batch([texts[i] for i in uncached], add_special_tokens=False)
            for i, encoding in zip(uncached, encodings, strict=True):
                token_ids = encoding.ids
                ids[i] = np.asarray(token_ids, dtype=np.uint32)
                cuts[i] = self._count_tokens(texts[i], token_ids, encoding, boundaries[i])
        else:
            ids = self._encode_ids(texts)
        self._split_at_boundaries(texts, ids, boundaries, cuts)
        encoded_batch = []
        for rendered, tokens, places, own_cuts in zip(batch, ids, boundaries, cuts, strict=True):
            shift = len(self._begin) if rendered.raw else 0
            if rendered.raw:
                tokens = np.concatenate([self._begin, tokens, self._end])
            trained = np.zeros(len(tokens), dtype=np.uint8)
            turn_ends = []
            if own_cuts is not None:
                cut_at = dict(zip(places, own_cuts, strict=True))
                for span in rendered.spans:
                    end = shift + cut_at[span.end] + rendered.raw
                    trained[shift + cut_at[span.start] : end] = 1
                    if rendered.raw:
                        turn_ends.append(end - 1)
                    elif span.turn_end is not None:
                        turn_ends.append(shift + cut_at[span.turn_end])
                # The first token has no context to be predicted from.
                trained[:1] = 0
            encoded_batch.append(EncodedDocument(tokens, trained, tuple(turn_ends), is_unsure=own_cuts is None))
        return encoded_batch

    # Tokens

    def _encode_prompt(self, text: str) -> list[int]:
        return list(self._encode_ids([text])[0].tolist())

    def _encode_ids(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        return [np.asarray(ids, dtype=np.uint32) for ids in encoded]

    def _count_tokens(self, text: str, ids: list[int], encoding: Encoding, boundaries: list[int]) -> list[int] | None:
        """Return the number of tokens before each boundary; None if one is inside a token, or the token's offsets are unsure.

        Some tokenizers exclude spaces from a token's offsets, so the tokens on both sides must meet at the boundary. A special
        token may include the white space after it; a boundary directly after its text then moves to its end.
        """
        cuts = []
        for boundary in boundaries:
            cut = len(ids) if boundary == len(text) else encoding.char_to_token(boundary)
            if cut is None:
                return None
            start, end = (encoding.token_to_chars(cut) or _NO_SPAN) if cut < len(ids) else (boundary, boundary)
            before = (encoding.token_to_chars(cut - 1) or _NO_SPAN)[1] if cut > 0 else boundary
            if start < boundary and ids[cut] in self.special_ids and text[boundary:end].isspace():
                cut += 1
            elif start != boundary or before != boundary:
                return None
            cuts.append(cut)
        return cuts

    def _split_at_boundaries(
        self, texts: list[str], ids: list[np.ndarray], boundaries: list[list[int]], cuts: list[list[int] | None]
    ) -> None:
        """Tokenize texts whose boundaries are inside tokens piece by piece, in place, if the pieces decode to the same text."""
        for i in [i for i, cut in enumerate(cuts) if cut is None]:
            pieces = [texts[i][a:b] for a, b in itertools.pairwise([0, *boundaries[i], len(texts[i])])]
            decoded, candidates = self._decode(ids[i]), [self._encode_ids(pieces)]
            if self._continuing is not None:
                rest = self._continuing.encode_batch(pieces[1:], add_special_tokens=False)
                candidates.append([candidates[0][0], *(np.asarray(piece.ids, dtype=np.uint32) for piece in rest)])
            for parts in candidates:
                joined = np.concatenate(parts)
                if self._decode(joined) == decoded:
                    ids[i] = joined
                    cuts[i] = list(itertools.accumulate(len(part) for part in parts[:-1]))
                    break

    def _decode(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _make_continuing(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return `tokenizer` without the space that it adds before a text, for text inside a document; None if it adds none."""
    parts = json.loads(tokenizer.to_str())
    original = json.dumps(parts)
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
    changed = json.dumps(parts)
    return None if changed == original else type(tokenizer).from_str(changed)
