"""Models that answer: the engine interface, and the engine that generates with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from launcher.config.sections.model import ModelSection
from launcher.evaluate.answers import GeneratedIds
from launcher.evaluate.engines.shared_prefix import SharedPrefix, attend_to, compute_prefix
from launcher.models.remote_code import code_option, folder_to_load
from launcher.train.model import DTYPES

# Examples before the question are computed once for all prompts; for shorter texts, copying keys and values costs more.
_MIN_SHARED = 64
# Number of tokens to decode at each step, to find a stop string that spans several tokens.
_TAIL_TOKENS = 24


class Engine(Protocol):
    """A loaded model that continues prompts greedily. `name` is part of the key of its answers."""

    name: str

    def generate(
        self, prompts: Sequence[Sequence[int]], *, num_shared: int, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedIds]:
        """Return an answer for each prompt; the first `num_shared` tokens of all prompts are equal."""

    def close(self) -> None:
        """Free the model, and end all processes of the engine."""


class TransformersEngine:
    """Batches of prompts, padded on the left, through transformers' own greedy generation."""

    name = "transformers"

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
        self._shared: tuple[tuple[int, ...], SharedPrefix | None] | None = None
        # On GPUs, transformers' kernels with one copy per prompt are faster than plain products with a single copy.
        self._attends_once = device == "cpu"

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, num_shared: int, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedIds]:
        prefix = self._prefix_of(prompts[0][:num_shared]) if num_shared >= _MIN_SHARED else None
        if prefix is None:
            num_shared = 0
        input_ids, mask = self._pad(prompts, num_shared)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(self._stop_ids) or None, pad_token_id=self._pad_id
        )
        width, options = input_ids.shape[1], {}
        if stop_strings:
            options["stopping_criteria"] = StoppingCriteriaList([_StopStrings(self._tokenizer, stop_strings, width)])
        with ExitStack() as stack:
            if prefix is not None and self._attends_once:
                stack.enter_context(attend_to(self.model, prefix))
                options["cache"] = prefix.make_cache()
            elif prefix is not None:
                options["cache"] = prefix.copy_cache(len(prompts))
            output = self.model.generate(input_ids, attention_mask=mask, generation_config=settings, **options)
        return [self._read(row.tolist(), stop_strings) for row in output[:, width:]]

    def close(self) -> None:
        self._shared = None
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pad(self, prompts: Sequence[Sequence[int]], num_shared: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask; the padding lies between the shared part and the rest of each prompt."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            start = width - (len(prompt) - num_shared)
            ids[i, :num_shared] = torch.tensor(prompt[:num_shared])
            ids[i, start:] = torch.tensor(prompt[num_shared:])
            mask[i, :num_shared] = mask[i, start:] = 1
        return ids.to(self._device), mask.to(self._device)

    def _prefix_of(self, shared: Sequence[int]) -> SharedPrefix | None:
        """Return keys and values of the shared part, which are computed once; None if the model needs each prompt as a whole."""
        if self._shared is None or self._shared[0] != tuple(shared):
            self._shared = None
            prefix = compute_prefix(self.model, torch.tensor([list(shared)], device=self._device))
            self._shared = (tuple(shared), prefix)
        return self._shared[1]

    def _read(self, ids: list[int], stop_strings: Sequence[str]) -> GeneratedIds:
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), None)
        kept = ids[:end]
        while kept and kept[-1] == self._pad_id:
            # Remove the padding of an answer that ended before others.
            kept.pop()
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        cut = cut_at(text, stop_strings)
        return GeneratedIds(tuple(kept), cut, end is not None or len(cut) < len(text))


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
