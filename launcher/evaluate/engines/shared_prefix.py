"""Attention to examples that all prompts of a batch share: their keys and values exist once, not once per prompt.

Otherwise, a batch of 32 prompts with 2,000 tokens of examples would read, and copy, their keys and values 32 times for every
token. The result equals one softmax over examples and prompt; compare Juravsky et al., "Hydragen" (arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME, _SDPA = "shared_prefix", "sdpa"
# Arguments that some models pass to attention, and that a plain softmax of scaled products does not support.
_SPECIAL = ("position_bias", "softcap", "s_aux", "sinks", "sliding_window")


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


# The layers of the prefix that attention uses, or a list to which it adds the indices of the layers that support one.
_active: ContextVar[tuple[tuple[torch.Tensor, torch.Tensor], ...] | list[int] | None] = ContextVar("shared_prefix", default=None)


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
    plain_calls: list[int] = []
    with attend_to(model, plain_calls):
        cache = model(ids, use_cache=True, logits_to_keep=1).cache
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if sorted(plain_calls) != list(range(len(layers))) or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    return SharedPrefix(tuple((layer.keys, layer.values) for layer in layers))


@contextmanager
def attend_to(model: PreTrainedModel, active: SharedPrefix | list[int]) -> Iterator[None]:
    """Make the model attend to a prefix and to the contents of a cache from that prefix; a list records suitable layers."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    token = _active.set(active.layers if isinstance(active, SharedPrefix) else active)
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
