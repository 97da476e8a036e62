"""Models that answer: the engine interface, and the engine that generates with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from launcher.config.sections.model import ModelSection
from launcher.evaluate.metrics import GeneratedAnswer
from launcher.models.remote_code import code_option, folder_to_load
from launcher.train.model import DTYPES

# Number of tokens to decode at each step, to find a stop string that spans several tokens.
_TAIL_TOKENS = 24


class Engine(Protocol):
    """A loaded model that continues prompts greedily."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedAnswer]:
        """Return an answer for each prompt."""

    def close(self) -> None:
        """Free the model, and end all processes of the engine."""


class TransformersEngine:
    """Batches of prompts, padded on the left, through transformers' own greedy generation."""

    def __init__(
        self,
        folder: Path,
        model: ModelSection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        device: str,
        stop_ids: Sequence[int],
        code: Path | None = None,
    ) -> None:
        """Load the model in `folder`; `code` is the folder of its Python files, if that is another folder."""
        path = folder_to_load(folder, model.trust_remote_code, model.code_digest, code)
        # Without `attn_implementation`, transformers uses SDPA, or eager attention for models that do not support SDPA.
        remote = code_option(model.trust_remote_code, path)
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **remote)
        self.model = loaded.to(device).eval()
        # `generate` takes missing values, such as repetition_penalty, from the model's folder, which would not be greedy
        # decoding.
        self.model.generation_config = GenerationConfig()
        self._tokenizer, self._device, self._stop_ids = tokenizer, device, tuple(stop_ids)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad_id = int(pad if pad is not None else 0)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedAnswer]:
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self._pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(self._stop_ids) or None, pad_token_id=self._pad_id
        )
        criteria = StoppingCriteriaList([_StopStrings(self._tokenizer, stop_strings, width)] if stop_strings else [])
        output = self.model.generate(
            input_ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=settings,
            stopping_criteria=criteria,
        )
        answers = []
        for row in output[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in self._stop_ids), None)
            kept = row[:end]
            while kept and kept[-1] == self._pad_id:
                # Remove the padding of an answer that ended before others.
                kept.pop()
            text = self._tokenizer.decode(kept, skip_special_tokens=True)
            cut = cut_at(text, stop_strings)
            answers.append(GeneratedAnswer(cut, end is not None or len(cut) < len(text), len(kept)))
        return answers

    def close(self) -> None:
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """Return the text up to the first stop string. Blank lines before the answer do not stop it."""
    begin = len(text) - len(text.lstrip())
    ends = [position for stop in stop_strings if (position := text.find(stop, begin if stop.isspace() else 0)) >= 0]
    return text[: min(ends)] if ends else text


class _StopStrings(StoppingCriteria):
    """Ends the rows whose answer contains a stop string; the first `width` tokens are the prompt's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], width: int) -> None:
        self._tokenizer, self._stop_strings, self._width = tokenizer, tuple(stop_strings), width
        self._has_ended: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = input_ids[:, max(self._width, input_ids.shape[1] - _TAIL_TOKENS) :].tolist()
        self._has_ended = self._has_ended or [False] * len(tails)
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [cut_at(text, self._stop_strings) != text for text in texts]
        self._has_ended = [ended or is_found for ended, is_found in zip(self._has_ended, found, strict=True)]
        return torch.tensor(self._has_ended, device=input_ids.device)
