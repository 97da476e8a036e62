"""Attention to examples that all prompts of a batch share: their keys and values exist once, not once per prompt.

Otherwise, a batch of 32 prompts with 2,000 tokens of examples would read, and copy, their keys and values 32 times for every
token. The result equals one softmax over examples and prompt; compare Juravsky et al., "Hydragen" (arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME, _SDPA = "shared_prefix", "sdpa"
# Arguments that some models pass to attention, and that a plain softmax of scaled products does not support.
_SPECIAL = ("position_bias", "softcap", "s_aux", "sinks", "sliding_window")
# Maximum number of key elements, with a copy for each head, at a time: 128 MiB in fp32.
_MAX_COPIED = 1 << 25


@dataclass(frozen=True)
class SharedPrefix:
    """The keys and values of each layer for the shared tokens, of shape [1, heads, tokens, dim]."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def make_cache(self) -> Cache:
        """Return a cache that holds the tokens after the shared ones, and counts positions from the first shared token."""
        return Cache(layers=[_SuffixLayer(keys.shape[2]) for keys, _ in self.layers])

    def copy_cache(self, num_prompts: int) -> Cache:
        """Return a cache that holds the shared tokens for each prompt, for transformers' own attention."""
        return DynamicCache([tuple(one.repeat_interleave(num_prompts, 0) for one in layer) for layer in self.layers])


@dataclass
class _Attention:
    """The state of the attention function: it uses the layers of a prefix, or records a model's suitable layers."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    plain_calls: list[int] = field(default_factory=list)


_active: ContextVar[_Attention | None] = ContextVar("shared_prefix", default=None)


class _SuffixLayer(DynamicLayer):
    """One layer after `num_shared` tokens that it does not hold."""

    def __init__(self, num_shared: int) -> None:
        super().__init__()
        self._num_shared = num_shared

    def get_seq_length(self) -> int:
        return self._num_shared + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(super().get_seq_length()) + query_length, self._num_shared


def compute_prefix(model: PreTrainedModel, ids: torch.Tensor) -> SharedPrefix | None:
    """Return keys and values for shared tokens, ids of shape [1, tokens]; None for a model with unsupported attention.

    Unsupported are models without SDPA, or with sliding windows, linear attention, position biases, or layers that share keys and
    values. Padding lies between the shared tokens and the rest of a prompt, and such a model would count it.
    """
    if model.config._attn_implementation != _SDPA:
        return None
    noted = _Attention()
    with _attention(model, noted) as is_used:
        if not is_used:
            return None
        cache = model(ids, use_cache=True, logits_to_keep=1).cache
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if sorted(noted.plain_calls) != list(range(len(layers))) or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    return SharedPrefix(tuple((layer.keys, layer.values) for layer in layers))


@contextmanager
def attend_to(model: PreTrainedModel, prefix: SharedPrefix) -> Iterator[None]:
    """Make the model attend to a prefix and to the contents of a cache from that prefix."""
    with _attention(model, _Attention(prefix.layers)):
        yield


@contextmanager
def _attention(model: PreTrainedModel, attention: _Attention) -> Iterator[bool]:
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    token = _active.set(attention)
    try:
        yield model.config._attn_implementation == _NAME
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
    if active is None or not active.layers:
        is_plain = attention_mask is None and all(settings.get(name) is None for name in _SPECIAL)
        if active is not None and is_plain and isinstance(index := getattr(module, "layer_idx", None), int):
            active.plain_calls.append(index)
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return output, None
    shared_keys, shared_values = active.layers[int(module.layer_idx)]
    rows, heads, length, _ = query.shape
    if length == 1:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend_token(query * scale, key, value, shared_keys, shared_values, attention_mask), None
    # For a whole prompt, the kernel is faster than products. Process a few prompts at a time, because it needs a copy for each.
    if attention_mask is None:
        # Without padding, transformers omits the mask: the prompts are causal among themselves.
        attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - length)
        attention_mask = attention_mask.expand(rows, 1, length, key.shape[2])
    whole_mask = torch.nn.functional.pad(attention_mask, (shared_keys.shape[2], 0), value=attention_mask.dtype == torch.bool)
    rows_at_once = max(1, _MAX_COPIED // (heads * (shared_keys.shape[2] + key.shape[2]) * key.shape[3]))
    parts = []
    for start in range(0, rows, rows_at_once):
        chosen = slice(start, start + rows_at_once)
        own_keys, own_values = key[chosen], value[chosen]
        keys = torch.cat([shared_keys.expand(len(own_keys), -1, -1, -1), own_keys], dim=2)
        values = torch.cat([shared_values.expand(len(own_values), -1, -1, -1), own_values], dim=2)
        part, _ = sdpa_attention_forward(module, query[chosen], keys, values, whole_mask[chosen], scaling=scaling, **settings)
        parts.append(part)
    return torch.cat(parts), None


def _attend_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_keys: torch.Tensor,
    shared_values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the output for one scaled query per row, of shape [rows, heads, 1, dim], as [rows, 1, heads, dim]."""
    rows, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    # The heads of a group are consecutive and see the same keys.
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    own = torch.matmul(grouped, key.transpose(-1, -2)).float().view(rows, heads, 1, -1)
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask
    own = own.view(rows, kv_heads, heads // kv_heads, -1)
    # All rows see the same shared keys, so one product covers all of them: [kv_heads, rows * group, tokens].
    together = grouped.transpose(0, 1).reshape(kv_heads, -1, dim)
    shared = torch.matmul(together, shared_keys[0].transpose(-1, -2)).float()
    own_largest = own.amax(-1).transpose(0, 1).reshape(kv_heads, -1)
    largest = torch.maximum(shared.amax(-1), own_largest)
    shared = shared.sub_(largest[..., None]).exp_()
    by_row = largest.view(kv_heads, rows, -1).transpose(0, 1)
    own = (own - by_row[..., None]).exp_()
    total = shared.sum(-1).view(kv_heads, rows, -1).transpose(0, 1) + own.sum(-1)
    from_shared = torch.matmul(shared.to(value.dtype), shared_values[0]).view(kv_heads, rows, -1, value.shape[-1]).transpose(0, 1)
    from_own = torch.matmul(own.to(value.dtype), value)
    output = (from_shared + from_own) / total[..., None].to(value.dtype)
    return output.reshape(rows, 1, heads, value.shape[-1])
