"""A small random model with a large model's layers and attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_VOCABULARY = 256
_NUM_EXPERTS = 16
# More layers than the period of any known layer layout; the fewest layers are enough to find one that leaks.
_NUM_LAYERS, _FEWEST_LAYERS = 16, 2
_WIDTH = 64
# The hidden size and the heads for a model without attention heads.
_HIDDEN, _HEADS = 128, 4
_MAX_PARAMETERS = 300_000_000
_NOISE = 0.04
# Keys for the width of an MLP, and for the number of experts, in transformers configs.
_MLP_WIDTHS = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"),
    *("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    *("mlp_hidden_size", "ffn_intermediate_size", "expert_ffn_hidden_size"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LORA_RANKS = ("q_lora_rank", "kv_lora_rank")
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id")
# Words in keys that hold a width of the residual stream or of a projection from it, and words in keys that only look similar.
_WIDTH_WORDS = ("size", "dim", "width", "d_ssm", "d_inner", "d_model", "n_embd")
_OTHER_SIZES = ("vocab", "window", "chunk", "kernel", "block", "patch", "state", "conv", "group")


@dataclass(frozen=True)
class Reduction:
    """A smaller config. `is_complete` is whether it has every layer type, so that a model built from it can prove isolation."""

    config: Any
    is_complete: bool


def reductions(config: Any) -> Iterator[Reduction]:
    """Yield smaller copies of a transformers config, smallest first; not every architecture can be built from each of them.

    All copies keep the order and types of layers, the attention type and its windows.
    """
    fewest = _cut_layers(_FEWEST_LAYERS)
    several = _cut_layers(_NUM_LAYERS)
    yield Reduction(_reduced(config, fewest, _narrow, _narrow_mlp), False)
    yield Reduction(_reduced(config, several, _narrow, _narrow_mlp), True)
    yield Reduction(_reduced(config, _narrow, _narrow_mlp), True)
    yield Reduction(_reduced(config, several, _narrow_mlp), True)
    yield Reduction(_reduced(config, fewest, _narrow_mlp), False)
    yield Reduction(_reduced(config, fewest, _small_vocabulary), False)


def _reduced(config: Any, *changes: Callable[[Any], None]) -> Any:
    reduced = copy.deepcopy(config)
    for part in _parts(reduced):
        if _get(part, "num_hidden_layers") is not None:
            for change in changes:
                change(part)
        _small_hash_tables(part)
    return reduced


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and its nested configs, such as those of a text model and an image encoder."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "get_text_config"):
            yield from _parts(value)


def _narrow(config: Any) -> None:
    """Shrink all widths except the head dimension, which rotary embeddings depend on."""
    heads, kv_heads = _get(config, "num_attention_heads"), _get(config, "num_key_value_heads")
    hidden = _get(config, "hidden_size")
    if not isinstance(hidden, int):
        return
    if isinstance(heads, int):
        head_dim = _get(config, "head_dim") or hidden // heads
        few = 4 if kv_heads not in (None, heads) and heads > 1 else 2
        # Attention may be wider than the residual stream, and some configs give its width as a multiple of the stream's.
        is_multiple = head_dim * heads % hidden == 0 and few * hidden % heads == 0
        narrow = few * hidden // heads if is_multiple else few * head_dim
        _set(config, "num_attention_heads", few)
        if isinstance(kv_heads, int):
            _set(config, "num_key_value_heads", few if kv_heads == heads else min(kv_heads, 2))
    else:
        few, narrow = _HEADS, math.gcd(hidden, _HIDDEN)
    _scale(config, hidden, narrow, few)


def _scale(config: Any, hidden: int, narrow: int, few: int) -> None:
    """Divide every multiple of the hidden size by the same factor, and likewise the heads that make up such a width."""
    numbers = {key: value for key, value in vars(config).items() if type(value) is int and value > 1}
    widths = {key: value for key, value in numbers.items() if _is_width(key) and 2 * value % hidden == 0}
    for key, value in widths.items():
        _set(config, key, value * narrow // hidden)
    expand = _get(config, "mamba_expand") or _get(config, "expand") or 1
    scaled, fixed = {*widths.values(), expand * hidden}, {value for key, value in numbers.items() if _is_width(key)}
    for count_key, width_key in _head_pairs(numbers):
        count, width = numbers[count_key], numbers[width_key]
        if count * width in scaled:
            # The part of the factor that does not divide the number of heads divides their width.
            shared = math.gcd(count, hidden // narrow)
            _set(config, count_key, count // shared)
            _set(config, width_key, max(1, width * narrow * shared // hidden))
            few = min(few, count // shared)
        elif count * width not in fixed:
            _set(config, count_key, math.gcd(count, _HEADS))
    for key, value in numbers.items():
        if "groups" in key and "expert" not in key:
            _set(config, key, math.gcd(value, few))


def _is_width(key: str) -> bool:
    return any(word in key for word in _WIDTH_WORDS) and not any(word in key for word in _OTHER_SIZES) and "head" not in key


def _head_pairs(numbers: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield pairs of keys for a number of heads and their width, such as n_mamba_heads and mamba_headdim; skips attention's."""
    for count in numbers:
        if count.endswith("heads") and count not in ("num_attention_heads", "num_key_value_heads"):
            stem = count.removesuffix("heads").replace("num_", "").replace("n_", "")
            for width in numbers:
                if width.startswith(stem) and "head" in width and not width.endswith("heads"):
                    yield count, width


def _narrow_mlp(config: Any) -> None:
    for keys, limit in ((_MLP_WIDTHS, _WIDTH), (_LORA_RANKS, _WIDTH), (_EXPERTS, _NUM_EXPERTS)):
        for key in keys:
            value = _get(config, key)
            if isinstance(value, int):
                _set(config, key, min(value, limit))
            elif isinstance(value, list | tuple) and all(isinstance(width, int) for width in value):
                # One value for each layer.
                _set(config, key, [min(width, limit) for width in value])
    _small_vocabulary(config)


def _cut_layers(fewest: int) -> Callable[[Any], None]:
    """Return a function that cuts layers from the end, down to `fewest`, as long as every layer type remains."""

    def cut(config: Any) -> None:
        num_layers = config.num_hidden_layers
        if not isinstance(num_layers, int):
            return
        per_layer = {
            key: value for key, value in config.to_dict().items() if isinstance(value, list | tuple) and len(value) == num_layers
        }
        # If every layer has a different value, as in a list of layer indices, the values do not denote types.
        of_kinds = [value for value in per_layer.values() if len({str(kind) for kind in value}) < num_layers]
        kinds = list(zip(*of_kinds, strict=True)) if of_kinds else [()] * num_layers
        first_of_each = {str(kind): layer for layer, kind in reversed(list(enumerate(kinds)))}
        kept = min(num_layers, max(fewest, 1 + max(first_of_each.values())))
        for key, value in per_layer.items():
            _set(config, key, value[:kept])
        for key in ("num_hidden_layers", "num_blocks"):
            if _get(config, key) == num_layers:
                _set(config, key, kept)

    return cut


def _small_vocabulary(config: Any) -> None:
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if _get(config, key) is not None:
            _set(config, key, _VOCABULARY)
    for i, key in enumerate(_SPECIAL_IDS):
        if _get(config, key) is not None:
            _set(config, key, i)


def _small_hash_tables(config: Any) -> None:
    """Shrink embedding tables other than the token table, such as tables for multi-byte hashes; their config has no layers."""
    for key, value in [*vars(config).items()]:
        if key.endswith("_vocab") and type(value) is int:
            _set(config, key, min(value, _VOCABULARY))


def _get(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:
        # transformers raises its own error for values that differ between layers.
        return None


def _set(config: Any, key: str, value: Any) -> None:
    setattr(config, key, value)


def build(config: Any, kernel: str, **remote: bool) -> Any:
    """Build a model in fp32 on the CPU; weights that are initialized to zero also get noise."""
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
