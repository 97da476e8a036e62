"""What the plan reads from a model's config.json: its facts, the sizes of its layers, and why it cannot be trained. Pure.

Read from modeling_*.py of transformers 5.24. Attention has grouped queries (Ainslie et al. 2023, arXiv:2305.13245), or queries
and keys that are expanded from latents (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.errors import ConfigError, Problem
from launcher.plan.launch_plan import ModelFacts

# Architectures with norms only after attention and MLP, or both before and after; all others have two norms, before each.
POST_NORMS, FOUR_NORMS = ("olmo2", "olmo3", "exaone4"), ("gemma2", "gemma3_text", "glm4")
# Architectures whose norms multiply by their weight in fp32.
FP32_NORMS = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "gpt_oss")
# Norms on queries and keys: per head, or over all heads together.
_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", "exaone4", "hunyuan_v1_dense", "dots1")
_ALL_HEADS_NORMS = ("olmo2", "olmo3", "olmoe", "minimax_m2")
# Architectures that compute queries, keys and values, or the gate and up projections of the MLP, with one weight.
FUSED_QKV, _FUSED_GATE = ("phi3",), ("phi3", "glm", "glm4")
# Architectures that rotate half of each head by default.
_HALF_ROTATED = ("glm", "glm4", "glm4_moe")
# Architectures whose layers each make rotary tables, in fp32.
FP32_ROTARY_TABLES = ("ernie4_5", "ernie4_5_moe")
# Architectures that compute the router in fp32, and those that multiply experts' outputs by weights in fp32.
FP32_ROUTERS = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe")
FP32_ROUTING_WEIGHTS = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "minimax_m2", "mixtral")
# Architectures whose experts limit the values of the gate, which takes more operations.
LIMITED_GATES = ("gpt_oss",)
# Architectures with dropout by default, of attention and of what a layer adds to its input.
_DROPOUT = {"seed_oss": 0.1}
# The number of experts in configs that transformers has saved, whatever the original key.
_ALIASES = ("num_local_experts", "num_experts", "n_routed_experts")
_HEAD_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class _ExpertKeys:
    """The keys of config.json for the numbers of one architecture's experts; an empty one stands for a number that it lacks.

    `shared` is the number of shared experts, `shared_size` the intermediate size of their MLP, which then has a gate. `first` is
    the first layer with experts, `step` the distance to the next.
    """

    number: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    size: str = "moe_intermediate_size"
    shared: str = ""
    shared_size: str = ""
    first: str = ""
    step: str = ""

    @property
    def others(self) -> tuple[str, ...]:
        """All keys but that of the number of experts, without which the sizes of a layer are not known."""
        return tuple(key for key in (self.chosen, self.size, self.shared, self.shared_size, self.first) if key)


_ROUTED = _ExpertKeys("n_routed_experts", shared="n_shared_experts", first="first_k_dense_replace")
MIXTURES = {
    "olmoe": _ExpertKeys(size="intermediate_size"),
    "mixtral": _ExpertKeys("num_local_experts", size="intermediate_size"),
    "minimax_m2": _ExpertKeys("num_local_experts", size="intermediate_size"),
    "gpt_oss": _ExpertKeys("num_local_experts", size="intermediate_size"),
    "qwen2_moe": _ExpertKeys(shared_size="shared_expert_intermediate_size", step="decoder_sparse_step"),
    "qwen3_moe": _ExpertKeys(step="decoder_sparse_step"),
    "glm4_moe": _ROUTED,
    "dots1": _ROUTED,
    "deepseek_v3": _ROUTED,
    "glm4_moe_lite": replace(_ROUTED, first=""),
    "ernie4_5_moe": _ExpertKeys(
        "moe_num_experts", "moe_k", shared="moe_num_shared_experts", first="moe_layer_start_index", step="moe_layer_interval"
    ),
}
# For an architecture that is not in MIXTURES: the keys of most others.
_USUAL_KEYS = _ExpertKeys(
    shared="n_shared_experts",
    shared_size="shared_expert_intermediate_size",
    first="first_k_dense_replace",
    step="decoder_sparse_step",
)
# Config keys of all sizes in this file, which have the same limits as those of a dense layer.
SIZE_KEYS = (
    *sorted({key for keys in MIXTURES.values() for key in (keys.number, *keys.others, keys.step) if key} - {"intermediate_size"}),
    *("kv_lora_rank", "q_lora_rank", "rotary_dim", *_HEAD_PARTS),
)
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim", "intermediate_size", *SIZE_KEYS)
# Far above any model. The plan goes through all layers, which would take all memory if their number had no limit.
_MAX_LAYERS, _MAX_SIZE, _MAX_DIGITS = 10_000, 1 << 31, 30
# A RoPE factor above this is no scaling of positions.
_MAX_ROPE_FACTOR = 1e6
# Architectures whose embeddings are tied unless config.json says otherwise.
_TIED = ("gemma", "gemma2", "gemma3_text", "smollm3", "ernie4_5", "ernie4_5_moe")
_QKV_BIAS = ("qwen2", "qwen2_moe", "seed_oss")
# Config keys of architectures that transform their logits after the head, which the chunked loss does not do.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def model_facts(config: dict[str, Any], path: str | None, tokenizer_path: str | None, num_params: int | None) -> ModelFacts:
    """Build the facts of a model from its config. `num_params` is the exact count from its weights; None means to estimate it.

    Raises:
        ConfigError: if the config lacks a number that planning needs.
    """
    config, where = _flatten_config(config), path or "model.config"
    if missing := [key for key in _NEEDED if not isinstance(config.get(key), int)]:
        message = f"the model's config.json lacks {', '.join(missing)}"
        remedy = f"choose a decoder-only language model whose config.json has {', '.join(_NEEDED)}, as presets do"
        raise ConfigError(message, where=where, value=f"model_type {config.get('model_type')}", remedy=remedy)
    for key in (*_NEEDED, *_OPTIONAL):
        value, least, most = config.get(key), int(key in _NEEDED), _MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE
        message = ""
        if key not in SIZE_KEYS and not isinstance(value, int | None):
            message = f"{key} is not a whole number"
        elif isinstance(value, int) and not least <= value <= most:
            message = f"{key} is not between {least} and {most:,}"
        if message:
            remedy = "use the config.json that belongs to the model"
            raise ConfigError(message, where=where, value=str(value)[:_MAX_DIGITS], remedy=remedy)
    heads = config["num_attention_heads"]
    facts = ModelFacts(
        path=path,
        tokenizer_path=tokenizer_path,
        num_params=num_params or 0,
        num_params_exact=num_params is not None,
        config=config,
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config.get("intermediate_size") or 4 * config["hidden_size"],
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED)),
    )
    return facts if num_params else facts.model_copy(update={"num_params": count_params(facts)})


def count_params(model: ModelFacts) -> int:
    """Count the parameters of a decoder with a gated MLP or experts in each layer; biases only those of Qwen 2 and Seed-OSS."""
    hidden, attention = model.hidden_size, attention_sizes(model)
    of_attention = attention.num_weights + sum(attention.latents)
    if model.model_type in _QKV_BIAS:
        of_attention += attention.query + attention.key + attention.value
    if norms := query_key_norms(model):
        of_attention += 2 * model.head_dim if norms == "per head" else attention.query + attention.key
    of_norms = num_layer_norms(model) * hidden
    kinds = Counter(experts_by_layer(model))
    layers = sum(count * (of_attention + of_norms + mlp_elements(model, experts)) for experts, count in kinds.items())
    embeddings = model.vocab_size * hidden * (1 if model.tie_word_embeddings else 2)
    return embeddings + layers + hidden


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

    `key` and `value` are what the kernel gets before it repeats them for groups of queries. `unrotated` are elements of queries
    without a rotary embedding. `latents` are the sizes of the vectors that queries,
    keys and values are expanded from, each with a norm. `projections` are the shapes of the weights, as (outputs, inputs).
    """

    query: int
    key: int
    value: int
    output: int
    unrotated: int
    latents: tuple[int, ...]
    projections: tuple[tuple[int, int], ...]

    @property
    def num_weights(self) -> int:
        """The elements of all projections."""
        return sum(outputs * inputs for outputs, inputs in self.projections)


def attention_sizes(model: ModelFacts) -> AttentionSizes:
    """Return the sizes of the attention of a model's layers."""
    hidden, config = model.hidden_size, model.config
    latent, query_latent = _read_positive(config, "kv_lora_rank"), _read_positive(config, "q_lora_rank")
    unrotated_dim, rotated_dim, value_dim = (_read_positive(config, key) for key in _HEAD_PARTS)
    if not (latent and rotated_dim and value_dim):
        query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        rope = config.get("rope_parameters")
        share = config.get("partial_rotary_factor") or (rope.get("partial_rotary_factor") if isinstance(rope, dict) else None)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            share = 0.5 if model.model_type in _HALF_ROTATED else 1.0
        own = _read_positive(config, "rotary_dim") if model.model_type == "minimax_m2" else 0
        rotated_dim = min(own or int(model.head_dim * share), model.head_dim)
        return AttentionSizes(
            query=query,
            key=key,
            value=key,
            output=query,
            unrotated=model.num_heads * (model.head_dim - rotated_dim),
            latents=(),
            projections=((query, hidden), (key, hidden), (key, hidden), (hidden, query)),
        )
    query, output = model.num_heads * (unrotated_dim + rotated_dim), model.num_heads * value_dim
    query_projections = ((query_latent, hidden), (query, query_latent)) if query_latent else ((query, hidden),)
    expanded = model.num_heads * (unrotated_dim + value_dim)
    return AttentionSizes(
        query=query,
        key=query,
        value=output,
        output=output,
        unrotated=model.num_heads * unrotated_dim,
        latents=(query_latent, latent) if query_latent else (latent,),
        projections=(*query_projections, (latent + rotated_dim, hidden), (expanded, latent), (hidden, output)),
    )


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the tokens of the longest document that the model's positions cover, with RoPE scaling; None if unknown."""
    config = _flatten_config(config)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int) or isinstance(positions, bool) or positions <= 0:
        return None
    # The mappings with RoPE settings: one, or one for each kind of layer.
    sections = [section for key in ("rope_parameters", "rope_scaling") if isinstance(section := config.get(key), dict)]
    sections += [inner for section in sections for inner in section.values() if isinstance(inner, dict)]
    scaled = [
        int(factor * (rope.get("original_max_position_embeddings") or positions))
        for rope in sections
        if isinstance(factor := rope.get("factor"), int | float) and factor < _MAX_ROPE_FACTOR
    ]
    return max(positions, *scaled) if scaled else positions


def _flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the values of its language model at the top, for a model that has other parts too."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def num_layer_norms(model: ModelFacts) -> int:
    """Return the number of a layer's norms over its hidden states."""
    return 4 if model.model_type in FOUR_NORMS else 2


def query_key_norms(model: ModelFacts) -> Literal["per head", "all heads"] | None:
    """Return what the norms on queries and keys are taken over; None if there are none."""
    if model.model_type in _HEAD_NORMS or (model.model_type == "glm4_moe" and model.config.get("use_qk_norm")):
        return "per head"
    return "all heads" if model.model_type in _ALL_HEADS_NORMS else None


def experts_of(config: Mapping[str, Any]) -> Experts | None:
    """Return the experts of the layers of a mixture-of-experts model; None for a dense one."""
    keys = MIXTURES.get(str(config.get("model_type")), _USUAL_KEYS)
    number = _read_positive(config, keys.number, *_ALIASES)
    size = _read_positive(config, keys.size, *(("intermediate_size",) if keys is _USUAL_KEYS else ()))
    chosen, shared = _read_positive(config, keys.chosen), _read_positive(config, keys.shared)
    shared_size = _read_positive(config, keys.shared_size)
    # A single expert is a dense MLP, as in Hunyuan's dense models.
    if number < 2 or not size:
        return None
    return Experts(number, chosen or 1, size, shared_size or shared * size, has_shared_gate=shared_size > 0)


def experts_by_layer(model: ModelFacts) -> tuple[Experts | None, ...]:
    """Return the experts of each layer; None for a layer that does not route its tokens to experts."""
    config, layers = model.config, range(model.num_layers)
    experts = experts_of(config)
    if experts is None:
        return (None,) * model.num_layers
    keys = MIXTURES.get(model.model_type, _USUAL_KEYS)
    if model.model_type == "glm4_moe_lite":
        kinds = config.get("mlp_layer_types")
        sparse = {i for i, kind in enumerate(kinds) if kind == "sparse"} if isinstance(kinds, list) else {*layers[1:]}
    else:
        first, step = _read_positive(config, keys.first), _read_positive(config, keys.step) or 1
        dense = config.get("mlp_only_layers") if keys.step == "decoder_sparse_step" else None
        dense = dense if isinstance(dense, list) else []
        last = config.get("moe_layer_end_index") if keys.step == "moe_layer_interval" else None
        end = last if isinstance(last, int) and last >= 0 else math.inf
        sparse = {i for i in layers if first <= i <= end and (i + 1) % step == 0 and i not in dense}
    return tuple(experts if layer in sparse else None for layer in layers)


def largest_weight(model: ModelFacts) -> int:
    """Return the elements of the largest weight inside a layer; experts are fused into two weights."""
    sizes = [model.hidden_size * model.intermediate_size]
    sizes += [outputs * inputs for outputs, inputs in attention_sizes(model).projections]
    sizes += [2 * experts.number * experts.size * model.hidden_size for experts in set(experts_by_layer(model)) if experts]
    if model.model_type in _FUSED_GATE:
        sizes.append(2 * model.intermediate_size * model.hidden_size)
    return max(sizes)


def mlp_elements(model: ModelFacts, experts: Experts | None, num_experts: int | None = None) -> int:
    """Count the weights of a layer's MLP, or of its router, its shared expert and `num_experts` experts (all by default)."""
    hidden = model.hidden_size
    if experts is None:
        return 3 * hidden * model.intermediate_size
    counted = experts.number if num_experts is None else num_experts
    return 3 * hidden * (counted * experts.size + experts.shared_size) + hidden * (experts.number + experts.has_shared_gate)


def has_attention_dropout(model: ModelFacts) -> bool:
    """Return whether attention has dropout in training."""
    return _has_dropout(model, "attention_dropout")


def has_residual_dropout(model: ModelFacts) -> bool:
    """Return whether the outputs of attention and MLP have dropout in training."""
    return model.model_type in _DROPOUT and _has_dropout(model, "residual_dropout")


def _has_dropout(model: ModelFacts, key: str) -> bool:
    value = model.config.get(key, _DROPOUT.get(model.model_type))
    return isinstance(value, int | float) and value > 0


def _read_positive(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first positive whole number under these keys; 0 if there is none."""
    return next((value for key in keys if isinstance(value := config.get(key), int) and value > 0), 0)


def architecture_problems(model: ModelFacts, packing: bool) -> Iterator[Problem]:
    """Yield the reasons why no device can train this model correctly; `packing` is whether rows hold several documents."""
    model_type = model.model_type
    yield from config_problems(model.config, "model.config")
    for name in _LOGIT_TRANSFORMS:
        if (value := model.config.get(name)) not in (None, 1, 1.0):
            message = f"this architecture transforms its logits ({name}={value}), which the chunked loss does not support"
            yield Problem(message, "model.path", model_type, "choose another model")
    verdict = model.isolation
    if verdict is None:
        return
    kernel, detail = verdict.kernel, verdict.detail
    if verdict.outcome == "not_causal":
        message = f"this architecture sees later tokens, with the attention kernel {kernel}: {detail}"
        yield Problem(message, "model.path", model_type, "choose a decoder-only language model")
    elif verdict.outcome == "leaks" and packing:
        message = f"packed documents affect each other in this architecture, with the attention kernel {kernel}: {detail}"
        yield Problem(message, "model.path", model_type, "set data.packing=false")
    elif verdict.outcome == "other_logits":
        message = (
            f"training computes logits as a linear layer of the last hidden states, and this architecture does not: {detail}"
        )
        yield Problem(message, "model.path", model_type, "choose another model")
    elif verdict.outcome == "unsupported":
        message = f"transformers {verdict.transformers} has no attention kernel {kernel} for this architecture"
        yield Problem(message, "model.attention", model_type, "set model.attention=auto")


def config_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield the reasons why this config.json is not of a model whose every parameter can be trained to predict the next token."""
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        remedy = "choose a decoder-only language model"
        yield Problem("model.path: this is an encoder-decoder model (is_encoder_decoder)", where, model_type, remedy)
    for part in ("vision_config", "audio_config"):
        if isinstance(config.get(part), dict):
            message = f"model.path: this model also takes images, video or sound ({part}), and only text models can be trained"
            yield Problem(message, where, model_type, "choose a language model, such as a preset (docs/presets.md)")
            break
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else str(quantization)
        message = f"model.path: the weights are quantized ({method}), and quantized weights cannot be trained"
        yield Problem(message, where, model_type, "choose the repository with the original weights in bf16, fp16 or fp32")
