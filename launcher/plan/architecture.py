"""Parameters and training FLOPs of a decoder-only transformer, from its config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import ConfigError, Problem
from launcher.plan.launch_plan import ModelFacts

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim", "intermediate_size")
# Far above any model. The plan goes through all layers, which would take all memory if their number had no limit.
_MAX_LAYERS, _MAX_SIZE, _MAX_DIGITS = 10_000, 1 << 31, 30
# Keys that transformers maps to the first names above in the configs of GPT-2, GPT-J, GPT-Neo, BLOOM, MPT and others.
_OTHER_NAMES = ("n_embd", "n_layer", "n_head", "d_model", "n_layers", "n_heads", "num_layers", "num_heads")
# Norms on queries and keys: per head, or over all heads together.
_HEAD_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
_QK_NORM = ("olmo2", "olmo3", "olmoe")
_QKV_BIAS = ("qwen2", "qwen2_moe")
# Architectures with norms before and after attention and MLP; all others have two norms per layer.
_FOUR_NORMS = ("gemma2", "gemma3_text")
_UNKNOWN = -1
# Config keys of architectures that transform their logits after the head, which the chunked loss does not do.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class _Family:
    """How transformers builds the layers of one `model_type`, as far as it affects FLOPs.

    A config without the keys `needs` is not supported: their defaults in transformers differ from those of ModelFacts. `window`
    is the default of `sliding_window`; with `switched`, it applies only if `use_sliding_window` is on. `slides` returns whether a
    layer attends within the window; with `listed`, the config's `layer_types` takes precedence. `expert_width` is the key of an
    expert's width, for mixture-of-experts models.
    """

    needs: tuple[str, ...] = ("num_key_value_heads",)
    window: int | None = None
    switched: bool = False
    slides: Callable[[Mapping[str, Any], int], bool] = lambda config, layer: True
    listed: bool = False
    expert_width: str | None = None
    shared_expert: bool = False


def _past_the_full_layers(config: Mapping[str, Any], layer: int) -> bool:
    return layer >= config.get("max_window_layers", 28)


def _every_other(config: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0


def _every_other_of_the_first(config: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0 and layer < config.get("max_window_layers", 28)


def _all_but_every_sixth(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % config.get("sliding_window_pattern", 6) != 0


def _all_but_every_fourth(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % 4 != 0


def _without_rope(config: Mapping[str, Any], layer: int) -> bool:
    has_rope = config.get("no_rope_layers")
    return not has_rope[layer] if has_rope else (layer + 1) % config.get("no_rope_layer_interval", 4) == 0


_OWN_HEAD_DIM = ("num_key_value_heads", "head_dim")
_ROUTED = ("num_key_value_heads", "num_experts_per_tok")
# From configuration_*.py and modeling_*.py of each in transformers 5.24; tests/plan/test_flops.py counts each of them.
FAMILIES = {
    "llama": _Family(needs=()),
    "mistral": _Family(window=4096),
    "qwen2": _Family(window=4096, switched=True, slides=_past_the_full_layers, listed=True),
    "qwen3": _Family(needs=_OWN_HEAD_DIM, window=4096, switched=True, slides=_past_the_full_layers, listed=True),
    "gemma": _Family(needs=_OWN_HEAD_DIM),
    "gemma2": _Family(needs=_OWN_HEAD_DIM, window=4096, slides=_every_other, listed=True),
    "gemma3_text": _Family(needs=_OWN_HEAD_DIM, window=4096, slides=_all_but_every_sixth, listed=True),
    "olmo2": _Family(needs=()),
    "olmo3": _Family(needs=(), window=4096, slides=_all_but_every_fourth, listed=True),
    "phi3": _Family(needs=()),
    "smollm3": _Family(switched=True, slides=_without_rope, listed=True),
    "olmoe": _Family(needs=("num_experts_per_tok",), expert_width="intermediate_size"),
    "mixtral": _Family(needs=_ROUTED, expert_width="intermediate_size"),
    "qwen2_moe": _Family(
        needs=(*_ROUTED, "moe_intermediate_size", "shared_expert_intermediate_size"),
        window=4096,
        switched=True,
        slides=_every_other_of_the_first,
        listed=True,
        expert_width="moe_intermediate_size",
        shared_expert=True,
    ),
    "qwen3_moe": _Family(
        needs=(*_ROUTED, "moe_intermediate_size"), window=4096, switched=True, expert_width="moe_intermediate_size"
    ),
}


def model_facts(config: dict[str, Any], path: str | None, tokenizer_path: str | None, num_params: int | None) -> ModelFacts:
    """Build the facts of a model from its config. `num_params` is the exact count from its weights; None means to estimate it.

    Raises:
        ConfigError: if the config lacks a number that planning needs.
    """
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int)]
    if missing and (own := [key for key in _OTHER_NAMES if isinstance(config.get(key), int)]):
        raise ConfigError(
            f"the launcher cannot read configs that call the model's sizes {', '.join(own)}, as GPT-2 and related models do",
            where=path or "model.config",
            value=f"model_type {config.get('model_type')}",
            remedy=f"choose a model whose config.json has {', '.join(_NEEDED)}, as the presets do (docs/presets.md)",
        )
    if missing:
        raise ConfigError(
            f"the model's config.json lacks {', '.join(missing)}",
            where=path or "model.config",
            value=f"model_type {config.get('model_type')}",
            remedy="choose a decoder-only language model with attention layers, which mamba and rwkv do not have",
        )
    for key in (*_NEEDED, *_OPTIONAL):
        least, most = int(key in _NEEDED), _MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE
        if isinstance(value := config.get(key), int) and not least <= value <= most:
            message, remedy = f"{key} is not between {least} and {most:,}", "use the config.json that belongs to the model"
            raise ConfigError(message, where=path or "model.config", value=str(value)[:_MAX_DIGITS], remedy=remedy)
    heads = config["num_attention_heads"]
    facts = {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "intermediate_size": config.get("intermediate_size") or 4 * config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    return ModelFacts(
        path=path,
        tokenizer_path=tokenizer_path,
        num_params=num_params or count_params(config, facts),
        num_params_exact=num_params is not None,
        config=config,
        **facts,
    )


def architecture_problems(model: ModelFacts, packing: bool) -> Iterator[Problem]:
    """Yield the reasons why no device can train this model correctly; `packing` is whether rows hold several documents."""
    model_type = str(model.config.get("model_type"))
    yield from config_problems(model.config, "model.config")
    for name in _LOGIT_TRANSFORMS:
        if (value := model.config.get(name)) not in (None, 1, 1.0):
            message = f"this architecture transforms its logits ({name}={value}), which the chunked loss does not support"
            yield Problem(message, "model.path", model_type, "choose another model")
    isolation = model.isolation
    if isolation is not None and isolation.outcome == "not_causal":
        yield causality_problem(model_type, isolation.kernel, isolation.detail)
    if isolation is not None and isolation.outcome == "leaks" and packing:
        yield leak_problem(model_type, isolation.kernel, isolation.detail)
    if isolation is not None and isolation.outcome == "other_logits":
        yield logits_problem(model_type, isolation.detail)
    if isolation is not None and isolation.outcome == "unsupported":
        message = f"transformers {isolation.transformers} has no attention kernel {isolation.kernel} for this architecture"
        yield Problem(message, "model.attention", model_type, "set model.attention=auto")


def config_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield the reasons why this config.json is not of a model whose every parameter can be trained to predict the next token."""
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        remedy = "choose a decoder-only language model"
        yield Problem("model.path: this is an encoder-decoder model (is_encoder_decoder)", where, model_type, remedy)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else str(quantization)
        message = f"model.path: the weights are quantized ({method}), and quantized weights cannot be trained"
        yield Problem(message, where, model_type, "choose the repository with the original weights in bf16, fp16 or fp32")


def leak_problem(model_type: str, kernel: str, detail: str) -> Problem:
    """Return the problem of a model in which packed documents affect each other; `detail` states the measured numbers."""
    message = f"packed documents affect each other in this architecture, with the attention kernel {kernel}: {detail}"
    return Problem(message, "model.path", model_type, "set data.packing=false")


def logits_problem(model_type: str, detail: str) -> Problem:
    """Return the problem of a model that computes its logits differently from training."""
    message = f"training computes logits as a linear layer of the last hidden states, and this architecture does not: {detail}"
    return Problem(message, "model.path", model_type, "choose another model")


def causality_problem(model_type: str, kernel: str, detail: str) -> Problem:
    """Return the problem of a model that sees the tokens that it is trained to predict."""
    message = f"this architecture sees later tokens, with the attention kernel {kernel}: {detail}"
    return Problem(message, "model.path", model_type, "choose a decoder-only language model")


def count_params(config: dict[str, Any], facts: dict[str, Any]) -> int:
    """Count the parameters of a Llama-like decoder (grouped-query attention, gated MLP, optionally mixture-of-experts)."""
    hidden, head_dim = facts["hidden_size"], facts["head_dim"]
    query, key_value = facts["num_heads"] * head_dim, facts["num_kv_heads"] * head_dim
    attention = 2 * hidden * query + 2 * hidden * key_value
    model_type = str(config.get("model_type", ""))
    if model_type in _QKV_BIAS:
        attention += query + 2 * key_value
    if model_type in _HEAD_NORM:
        attention += 2 * head_dim
    if model_type in _QK_NORM:
        attention += query + key_value
    experts = num_experts(config)
    if experts:
        mlp = experts * 3 * hidden * (config.get("moe_intermediate_size") or facts["intermediate_size"]) + hidden * experts
    else:
        mlp = 3 * hidden * facts["intermediate_size"]
    embeddings = facts["vocab_size"] * hidden * (1 if facts["tie_word_embeddings"] else 2)
    norms = (4 if model_type in _FOUR_NORMS else 2) * hidden
    return embeddings + facts["num_layers"] * (attention + mlp + norms) + hidden


def num_experts(config: Mapping[str, Any]) -> int:
    """Return the experts of a layer of a mixture-of-experts model; 0 for a dense one."""
    return config.get("num_local_experts") or config.get("num_experts") or 0


def is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer of a mixture-of-experts model routes its tokens to experts."""
    dense = config.get("mlp_only_layers") or ()
    return num_experts(config) > 0 and layer not in dense and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


@dataclass(frozen=True)
class TrainFlops:
    """FLOPs of the forward and backward pass of one model: per token, per trained label, and per query-key pair.

    `per_pair` has one entry per attention window, None for the whole document: the FLOPs of one pair in all layers with that
    window.
    """

    per_token: float
    per_label: float
    per_pair: tuple[tuple[int | None, float], ...]

    def of(self, doc_lengths: Sequence[int], num_labels: int) -> float:
        """Return the FLOPs for documents with these lengths in tokens and `num_labels` trained labels, without padding."""
        # A batch has many documents, but few distinct lengths.
        counts = Counter(doc_lengths)
        pairs = sum(
            per_pair * sum(count * _pairs(length, window) for length, count in counts.items())
            for window, per_pair in self.per_pair
        )
        return self.per_token * sum(doc_lengths) + self.per_label * num_labels + pairs


def train_flops(model: ModelFacts) -> TrainFlops | None:
    """Return the FLOPs of training this model, without recomputation; None for an architecture that is not in FAMILIES.

    A multiplication of [m, k] by [k, n] is 2mkn FLOPs, and twice as many in the backward pass, for both gradients. This gives 6
    for each weight that a token meets (only the experts that it is routed to, and the router), and 6 for each weight of the head
    that a trained label meets. Embeddings are lookups and do not count, so tying them makes no difference.
    Attention is 12 x heads x head_dim for each pair of a query and a key (scores and values, each 2 forward and 4 backward) in
    one document, causal and within the layer's window. Grouped keys and values are multiplied once per query head. Norms,
    activations, softmax, rotary embedding, biases and the optimizer do not count.
    Narayanan et al. 2021, arXiv:2104.04473, appendix; Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for MFU.
    """
    family = FAMILIES.get(str(model.config.get("model_type")))
    if family is None or model.config.get("use_bidirectional_attention"):
        return None
    if any(key not in model.config for key in family.needs) or (family.expert_width and not num_experts(model.config)):
        return None
    layers = range(model.num_layers)
    windows = [_window(family, model.config, layer) for layer in layers]
    if _UNKNOWN in windows:
        return None
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = 2 * model.hidden_size * (query + key_value)
    weights = sum(attention + _mlp_weights(family, model, layer) for layer in layers)
    return TrainFlops(
        per_token=6.0 * weights,
        per_label=6.0 * model.vocab_size * model.hidden_size,
        per_pair=tuple((window, 12.0 * query * count) for window, count in Counter(windows).items()),
    )


def _pairs(length: int, window: int | None) -> int:
    """Count query-key pairs in a document: each token attends to itself and to earlier tokens, `window` in total."""
    span = length if window is None else min(length, window)
    return span * (span + 1) // 2 + (length - span) * span


def _mlp_weights(family: _Family, model: ModelFacts, layer: int) -> int:
    """Count the MLP weights of a layer that multiply one token: those of the chosen and shared experts, and of the router."""
    config, hidden = model.config, model.hidden_size
    if family.expert_width is None or not is_sparse(config, layer):
        return 3 * hidden * model.intermediate_size
    shared = config["shared_expert_intermediate_size"] if family.shared_expert else 0
    chosen = 3 * hidden * (config["num_experts_per_tok"] * config[family.expert_width] + shared)
    # A shared expert has its own gate with one output.
    return chosen + hidden * (num_experts(config) + (1 if family.shared_expert else 0))


def _window(family: _Family, config: Mapping[str, Any], layer: int) -> int | None:
    """Return the number of tokens that a layer's queries attend to, including themselves; None for the whole document."""
    window = config.get("sliding_window", family.window)
    if family.switched and not config.get("use_sliding_window", False):
        window = None
    listed = config.get("layer_types") if family.listed else None
    if listed is not None:
        kind = listed[layer] if layer < len(listed) else ""
        if kind not in ("full_attention", "sliding_attention"):
            return _UNKNOWN
        return window if kind == "sliding_attention" else None
    return window if family.slides(config, layer) else None
