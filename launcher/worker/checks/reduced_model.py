"""A small random model with the layers and the attention of a large one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

_VOCABULARY = 256
_NUM_EXPERTS = 16
# Longer than the period of any known layout of layers.
_NUM_LAYERS = 16
_WIDTH = 64
_MAX_PARAMETERS = 300_000_000
_NOISE = 0.04
# Keys under which configs of transformers keep the width of an MLP, and the number of experts.
_MLP_WIDTHS = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"),
    *("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    *("mlp_hidden_size", "ffn_intermediate_size", "expert_ffn_hidden_size"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LORA_RANKS = ("q_lora_rank", "kv_lora_rank")
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id")


def reductions(config: Any) -> Iterator[Any]:
    """Yield smaller copies of a transformers config, the smallest first; some architectures cannot be built from some of them.

    All keep the order and the kinds of layers, the kind of attention and its windows.
    """
    yield _reduced(config, _cut_layers, _narrow, _narrow_mlp)
    yield _reduced(config, _narrow, _narrow_mlp)
    yield _reduced(config, _cut_layers, _narrow_mlp)


def _reduced(config: Any, *changes: Callable[[Any], None]) -> Any:
    reduced = copy.deepcopy(config)
    for part in {id(part): part for part in (reduced, reduced.get_text_config())}.values():
        if _get(part, "num_hidden_layers") is not None:
            for change in changes:
                change(part)
    return reduced


def _narrow(config: Any) -> None:
    """Shrink all widths; the head dimension stays, since rotary embeddings are made for it."""
    heads, kv_heads = _get(config, "num_attention_heads"), _get(config, "num_key_value_heads")
    hidden = _get(config, "hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int):
        head_dim = _get(config, "head_dim") or hidden // heads
        few = 4 if kv_heads not in (None, heads) and heads > 1 else 2
        _set(config, "num_attention_heads", few)
        if isinstance(kv_heads, int):
            _set(config, "num_key_value_heads", few if kv_heads == heads else min(kv_heads, 2))
        _set(config, "hidden_size", few * head_dim)
        expand = _get(config, "mamba_expand") or _get(config, "expand")
        for count, width in (("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim")):
            if expand and _get(config, count) and _get(config, width):
                _set(config, count, expand * few * head_dim // _get(config, width))


def _narrow_mlp(config: Any) -> None:
    for keys, limit in ((_MLP_WIDTHS, _WIDTH), (_LORA_RANKS, _WIDTH), (_EXPERTS, _NUM_EXPERTS)):
        for key in keys:
            if isinstance(_get(config, key), int):
                _set(config, key, min(_get(config, key), limit))
    _small_vocabulary(config)


def _cut_layers(config: Any) -> None:
    """Cut layers from the end, as long as each kind of layer stays."""
    num_layers = config.num_hidden_layers
    if not isinstance(num_layers, int):
        return
    per_layer = {
        key: value for key, value in config.to_dict().items() if isinstance(value, list | tuple) and len(value) == num_layers
    }
    kinds = list(zip(*per_layer.values(), strict=True)) if per_layer else [()] * num_layers
    first_of_each = {str(kind): layer for layer, kind in reversed(list(enumerate(kinds)))}
    kept = min(num_layers, max(_NUM_LAYERS, 1 + max(first_of_each.values())))
    for key, value in per_layer.items():
        _set(config, key, value[:kept])
    _set(config, "num_hidden_layers", kept)


def _small_vocabulary(config: Any) -> None:
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if _get(config, key) is not None:
            _set(config, key, _VOCABULARY)
    for i, key in enumerate(_SPECIAL_IDS):
        if _get(config, key) is not None:
            _set(config, key, i)


def _get(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:
        # transformers raises its own error for what differs between layers.
        return None


def _set(config: Any, key: str, value: Any) -> None:
    setattr(config, key, value)


def build(config: Any, kernel: str, **remote: bool) -> Any:
    """Build a model in fp32 on the CPU; weights that are initialised to zero get noise as well."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=kernel, **remote)
    if (size := sum(p.numel() for p in blank.parameters())) > _MAX_PARAMETERS:
        raise ValueError(f"the reduced model has {size:,} parameters")
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel, **remote)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    return hf.eval()
