"""Sizes of a decoder layer's attention and experts, from a model's config.json. Pure.

Read from modeling_*.py of transformers 5.24. Attention has grouped queries (Ainslie et al. 2023, arXiv:2305.13245), or queries
and keys that are expanded from latents (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.plan.launch_plan import ModelFacts

# Architectures with norms only after attention and MLP, or both before and after; all others have two norms, before each.
POST_NORMS, FOUR_NORMS = ("olmo2", "olmo3", "exaone4"), ("gemma2", "gemma3_text", "glm4")
# Architectures whose norms multiply by their weight in fp32.
WIDE_NORMS = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "gpt_oss")
# Norms on queries and keys: per head, or over all heads together.
_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", "exaone4", "hunyuan_v1_dense", "dots1")
_ALL_HEADS_NORMS = ("olmo2", "olmo3", "olmoe", "minimax_m2")
# Architectures whose experts limit the values of the gate, in separate operations.
CLAMPED_GATES = ("gpt_oss",)
# Architectures whose layers each make rotary tables in fp32.
OWN_ROTARY_TABLES = ("ernie4_5", "ernie4_5_moe")
# Architectures that compute the router in fp32, and those that multiply experts' outputs by weights in fp32.
FP32_ROUTERS = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe")
FP32_ROUTING_WEIGHTS = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "minimax_m2", "mixtral")
# Architectures that rotate half of each head by default.
_HALF_ROTATED = ("glm", "glm4", "glm4_moe")
# Architectures that store the gate and up projections of the MLP as one weight.
FUSED_GATE = ("phi3", "glm", "glm4")
# The keys of different architectures for the same number.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUM_CHOSEN = ("num_experts_per_tok", "moe_k")
_NUM_SHARED = ("n_shared_experts", "moe_num_shared_experts")
_FIRST_SPARSE = ("first_k_dense_replace", "moe_layer_start_index")
_HEAD_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: how many there are, how many compute each token, and the intermediate size of one.

    `shared_size` is the intermediate size of the MLP that computes every token beside them, 0 if there is none. With
    `has_shared_gate`, a linear layer with one output scales its result.
    """

    number: int
    chosen: int
    size: int
    shared_size: int
    has_shared_gate: bool


@dataclass(frozen=True)
class AttentionSizes:
    """The tensors of a layer's attention, in elements per token over all heads, and its linear layers.

    `key` and `value` are what the kernel gets before it repeats them for groups of queries. `plain` are the elements of queries
    without a rotary embedding, `rotated` those of queries and keys with one. `latents` are the sizes of the vectors that queries,
    keys and values are expanded from, each with a norm. `projections` are the shapes of the weights, as (outputs, inputs).
    """

    query: int
    key: int
    value: int
    output: int
    plain: int
    rotated: int
    latents: tuple[int, ...]
    projections: tuple[tuple[int, int], ...]

    @property
    def num_weights(self) -> int:
        """The elements of all projections."""
        return sum(outputs * inputs for outputs, inputs in self.projections)


def attention_sizes(model: ModelFacts) -> AttentionSizes:
    """Return the sizes of the attention of a model's layers."""
    hidden, config = model.hidden_size, model.config
    latent, query_latent = _number(config, "kv_lora_rank"), _number(config, "q_lora_rank")
    plain, rotated, value = (_number(config, key) for key in _HEAD_PARTS)
    if not (latent and rotated and value):
        query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        plain = model.head_dim - _rotary_size(model)
        return AttentionSizes(
            query=query,
            key=key,
            value=key,
            output=query,
            plain=model.num_heads * plain,
            rotated=(model.num_heads + model.num_kv_heads) * (model.head_dim - plain),
            latents=(),
            projections=((query, hidden), (key, hidden), (key, hidden), (hidden, query)),
        )
    query, output = model.num_heads * (plain + rotated), model.num_heads * value
    of_query = ((query_latent, hidden), (query, query_latent)) if query_latent else ((query, hidden),)
    of_key_value = ((latent + rotated, hidden), (model.num_heads * (plain + value), latent))
    return AttentionSizes(
        query=query,
        key=query,
        value=output,
        output=output,
        plain=model.num_heads * plain,
        # All heads share the rotated part of the keys.
        rotated=(model.num_heads + 1) * rotated,
        latents=(query_latent, latent) if query_latent else (latent,),
        projections=(*of_query, *of_key_value, (hidden, output)),
    )


def _rotary_size(model: ModelFacts) -> int:
    """Return the elements of a head with a rotary embedding."""
    rope = model.config.get("rope_parameters")
    share = model.config.get("partial_rotary_factor") or (rope.get("partial_rotary_factor") if isinstance(rope, dict) else None)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        share = 0.5 if model.config.get("model_type") in _HALF_ROTATED else 1.0
    return min(_number(model.config, "rotary_dim") or int(model.head_dim * share), model.head_dim)


def query_key_norms(model: ModelFacts) -> Literal["per head", "all heads"] | None:
    """Return what the norms on queries and keys are taken over; None if there are none."""
    model_type = str(model.config.get("model_type"))
    if model_type in _HEAD_NORMS or (model_type == "glm4_moe" and model.config.get("use_qk_norm")):
        return "per head"
    return "all heads" if model_type in _ALL_HEADS_NORMS else None


def experts_of(config: Mapping[str, Any]) -> Experts | None:
    """Return the experts of the layers of a mixture-of-experts model; None for a dense one."""
    number, size = _number(config, *_NUM_EXPERTS), _number(config, "moe_intermediate_size", "intermediate_size")
    if not number or not size:
        return None
    shared = _number(config, "shared_expert_intermediate_size")
    return Experts(
        number=number,
        chosen=_number(config, *_NUM_CHOSEN) or 1,
        size=size,
        shared_size=shared or _number(config, *_NUM_SHARED) * size,
        has_shared_gate=bool(shared),
    )


def is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer of a mixture-of-experts model routes its tokens to experts."""
    if experts_of(config) is None:
        return False
    if kinds := config.get("mlp_layer_types"):
        return layer < len(kinds) and kinds[layer] == "sparse"
    step, first = _number(config, "decoder_sparse_step", "moe_layer_interval") or 1, _number(config, *_FIRST_SPARSE)
    last = _number(config, "moe_layer_end_index") or layer
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0 and first <= layer <= last


def sparse_experts(model: ModelFacts, layer: int) -> Experts | None:
    """Return the experts of a layer; None if the layer is dense."""
    return experts_of(model.config) if is_sparse(model.config, layer) else None


def has_experts(model: ModelFacts) -> bool:
    """Return whether any layer of the model has experts."""
    return any(is_sparse(model.config, layer) for layer in range(model.num_layers))


def largest_weight(model: ModelFacts) -> int:
    """Return the elements of the largest weight inside a layer; experts are fused into two weights."""
    sizes = [model.hidden_size * model.intermediate_size]
    sizes += [outputs * inputs for outputs, inputs in attention_sizes(model).projections]
    experts = experts_of(model.config)
    if experts and has_experts(model):
        sizes.append(2 * experts.number * experts.size * model.hidden_size)
    if model.config.get("model_type") in FUSED_GATE:
        sizes.append(2 * model.intermediate_size * model.hidden_size)
    return max(sizes)


def mlp_weights(model: ModelFacts, layer: int, num_experts: int | None = None) -> int:
    """Return the weights of a layer's MLP, with its router and `num_experts` of its experts, all by default."""
    hidden, experts = model.hidden_size, sparse_experts(model, layer)
    if experts is None:
        return 3 * hidden * model.intermediate_size
    counted = experts.number if num_experts is None else num_experts
    return 3 * hidden * (counted * experts.size + experts.shared_size) + hidden * (experts.number + experts.has_shared_gate)


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first positive number under these keys; 0 if there is none."""
    return next((value for key in keys if isinstance(value := config.get(key), int) and value > 0), 0)
