"""Models that answer: the engine interface, and the engine that generates with transformers.

Examples that all prompts of a batch share exist once, not once per prompt: otherwise, a batch of 32 prompts with 2,000 tokens of
examples would read, and copy, their keys and values 32 times for every token. The result equals one softmax over examples and
prompt; compare Juravsky et al., "Hydragen" (arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from launcher.config.sections.model import ModelSection
from launcher.evaluate.evaluation_folder import GeneratedIds
from launcher.models.remote_code import code_option, folder_to_load
from launcher.train.model import DTYPES

# Keys and values of each layer for tokens that all prompts share, of shape [1, heads, tokens, dim].
Prefix = tuple[tuple[torch.Tensor, torch.Tensor], ...]
# Examples before the question are computed once for all prompts; for shorter texts, copying keys and values costs more.
_MIN_SHARED = 64
# Number of tokens to decode at each step, to find a stop string that spans several tokens.
_TAIL_TOKENS = 24
# The names of attention implementations in transformers: the one below, and its own.
_SHARED_PREFIX, _SDPA = "shared_prefix", "sdpa"
# Arguments that some models pass to attention, and that a plain softmax of scaled products does not support.
_SPECIAL = ("position_bias", "softcap", "s_aux", "sinks", "sliding_window")


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
        # The examples of the last batch with their keys and values, None if the model needs each prompt as a whole.
        self._shared: tuple[tuple[int, ...], Prefix | None] | None = None
        # On GPUs, transformers' kernels with one copy per prompt are faster than plain products with a single copy.
        self._attends_once = device == "cpu"

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, num_shared: int, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedIds]:
        prefix = None
        if num_shared >= _MIN_SHARED:
            shared = tuple(prompts[0][:num_shared])
            if self._shared is None or self._shared[0] != shared:
                self._shared = None
                self._shared = (shared, compute_prefix(self.model, torch.tensor([shared], device=self._device)))
            prefix = self._shared[1]
        if prefix is None:
            num_shared = 0
        # The padding lies between the shared part and the rest of each prompt.
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self._pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            start = width - (len(prompt) - num_shared)
            input_ids[i, :num_shared] = torch.tensor(prompt[:num_shared])
            input_ids[i, start:] = torch.tensor(prompt[num_shared:])
            mask[i, :num_shared] = mask[i, start:] = 1
        input_ids, mask, options = input_ids.to(self._device), mask.to(self._device), {}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(self._stop_ids) or None, pad_token_id=self._pad_id
        )
        if stop_strings:
            options["stopping_criteria"] = StoppingCriteriaList([_StopStrings(self._tokenizer, stop_strings, width)])
        with ExitStack() as stack:
            if prefix is not None and self._attends_once:
                stack.enter_context(attend_to(self.model, prefix))
                options["cache"] = Cache(layers=[_SuffixLayer(num_shared) for _ in prefix])
            elif prefix is not None:
                # For transformers' own attention, each prompt holds the shared tokens.
                copies = [tuple(one.repeat_interleave(len(prompts), 0) for one in layer) for layer in prefix]
                options["cache"] = DynamicCache(copies)
            output = self.model.generate(input_ids, attention_mask=mask, generation_config=settings, **options)
        answers = []
        for row in output[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in self._stop_ids), None)
            kept = row[:end]
            while kept and kept[-1] == self._pad_id:
                # Remove the padding of an answer that ended before others.
                kept.pop()
            text = self._tokenizer.decode(kept, skip_special_tokens=True)
            cut = cut_at(text, stop_strings)
            answers.append(GeneratedIds(tuple(kept), cut, end is not None or len(cut) < len(text)))
        return answers

    def close(self) -> None:
        self._shared = None
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


# The prefix that attention uses, or a list to which it adds the indices of the layers that support one.
_active: ContextVar[Prefix | list[int] | None] = ContextVar("shared_prefix", default=None)


class _SuffixLayer(DynamicLayer):
    """One layer after `num_shared` tokens that it does not hold; positions count from the first of them."""

    def __init__(self, num_shared: int) -> None:
        super().__init__()
        self._num_shared = num_shared

    def get_seq_length(self) -> int:
        return self._num_shared + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(super().get_seq_length()) + query_length, self._num_shared


def compute_prefix(model: PreTrainedModel, ids: torch.Tensor) -> Prefix | None:
    """Return keys and values for shared tokens, ids of shape [1, tokens]; None for a model with unsupported attention.

    Unsupported are models without SDPA, or with sliding windows, linear attention, position biases, or layers that share keys and
    values. Padding lies between the shared tokens and the rest of a prompt, and such a model would count it.
    """
    if model.config._attn_implementation != _SDPA:
        return None
    plain_calls: list[int] = []
    with attend_to(model, plain_calls):
        cache = model(ids, use_cache=True, logits_to_keep=1).cache
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if sorted(plain_calls) != list(range(len(layers))) or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    return tuple((layer.keys, layer.values) for layer in layers)


@contextmanager
def attend_to(model: PreTrainedModel, active: Prefix | list[int]) -> Iterator[None]:
    """Make the model attend to a prefix and to the contents of a cache from that prefix; a list records suitable layers."""
    AttentionInterface.register(_SHARED_PREFIX, _attend)
    AttentionMaskInterface.register(_SHARED_PREFIX, sdpa_mask)
    model.set_attn_implementation(_SHARED_PREFIX)
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)
        model.set_attn_implementation(_SDPA)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Compute a layer's attention, through transformers' attention interface."""
    active = _active.get()
    if not isinstance(active, tuple):
        is_plain = attention_mask is None and all(settings.get(name) is None for name in _SPECIAL)
        if active is not None and is_plain and isinstance(index := getattr(module, "layer_idx", None), int):
            active.append(index)
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return output, None
    shared_keys, shared_values = active[int(module.layer_idx)]
    (rows, heads, length, dim), num_shared = query.shape, shared_keys.shape[2]
    if length > 1:
        # For a whole prompt, the kernel with a copy for each prompt is faster than products.
        if attention_mask is None:
            # Without padding, transformers omits the mask: the prompts are causal among themselves.
            attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - length)
            attention_mask = attention_mask.expand(rows, 1, length, key.shape[2])
        mask = torch.nn.functional.pad(attention_mask, (num_shared, 0), value=attention_mask.dtype == torch.bool)
        keys, values = (
            torch.cat([shared.expand(rows, -1, -1, -1), own], dim=2)
            for shared, own in ((shared_keys, key), (shared_values, value))
        )
        output, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling, **settings)
        return output, None
    # The heads of a group are consecutive and see the same keys: [rows, kv_heads, group, dim].
    kv_heads, group = key.shape[1], heads // key.shape[1]
    grouped = query.reshape(rows, kv_heads, group, dim) * (dim**-0.5 if scaling is None else scaling)
    own = torch.matmul(grouped, key.transpose(-1, -2))
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        own = own.masked_fill(~attention_mask, -torch.inf) if is_bool else own + attention_mask
    # All rows see the same shared keys, so one product covers all of them: [kv_heads, rows * group, tokens].
    together = grouped.transpose(0, 1).reshape(kv_heads, -1, dim)
    shared = torch.matmul(together, shared_keys[0].transpose(-1, -2)).view(kv_heads, rows, group, num_shared).transpose(0, 1)
    weights = torch.cat([shared, own], dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)
    of_shared = weights[..., :num_shared].transpose(0, 1).reshape(kv_heads, -1, num_shared)
    from_shared = torch.matmul(of_shared, shared_values[0]).view(kv_heads, rows, group, -1).transpose(0, 1)
    output = from_shared + torch.matmul(weights[..., num_shared:], value)
    return output.reshape(rows, 1, heads, value.shape[-1]), None
