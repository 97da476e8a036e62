"""Numbers of a decoder-only transformer from its config.json: parameters, and the FLOPs of training it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import ConfigError, Problem
from launcher.plan.launch_plan import ModelFacts

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Per-head norms on queries and keys.
_QK_NORM = ("qwen3", "qwen3_moe")
_QKV_BIAS = ("qwen2", "qwen2_moe")
_UNKNOWN = -1
# What some architectures do to their logits after the head, where the loss in chunks does not.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# transformers gives their masks no positions, so that the documents of a row would see each other.
_DOCUMENTS_MIX = ("gpt_oss",)
# Their layers carry a state, or look back with a convolution, from one document of a row into the next.
_CARRY_STATE = (
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling", "inkling2", "inkling2_loop"),
    *("jamba", "kimi_linear", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
)
_STATE_LAYERS = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding"}


@dataclass(frozen=True)
class _Family:
    """How transformers builds the layers of one `model_type`, where families differ in what they multiply.

    `needs` are keys whose default in transformers is not what ModelFacts takes for it: a config without them is not
    understood. `window` is the default of `sliding_window`; `switched` where `use_sliding_window` must be on for it; `slides`
    tells which layers attend within it, unless the config's `layer_types` says so (`listed`). `expert_width` is the key of the
    width of one expert, where there are some.
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
    """Facts of a model from its config; `num_params` is the exact count where weights were found.

    Raises:
        ConfigError: where the config lacks a number that planning needs.
    """
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int)]
    if missing:
        raise ConfigError(
            f"the model's config.json lacks {', '.join(missing)}",
            where=path or "model.config",
            remedy="only decoder-only language models are served",
        )
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


def problems_of(config: Mapping[str, Any], packing: bool) -> Iterator[Problem]:
    """What keeps a model with this config.json from being trained as the loop does, whatever it runs on."""
    model_type = str(config.get("model_type"))
    for name in _LOGIT_TRANSFORMS:
        if (value := config.get(name)) not in (None, 1, 1.0):
            what = f"this architecture changes its logits after the head ({name}={value}), which the loss in chunks does not do"
            yield Problem(what, "model.path", model_type, "choose another model")
    if packing and (model_type in _DOCUMENTS_MIX or carries_state(config)):
        what = "packed documents would see each other in this architecture"
        yield Problem(what, "model.path", model_type, "set data.packing=false")


def carries_state(config: Mapping[str, Any]) -> bool:
    """Whether what a layer computes for a row depends on the rows or documents that stand before it in one sequence."""
    layers = config.get("layer_types") or ()
    return str(config.get("model_type")).removesuffix("_text") in _CARRY_STATE or not _STATE_LAYERS.isdisjoint(layers)


def count_params(config: dict[str, Any], facts: dict[str, Any]) -> int:
    """Parameters of a Llama-like decoder (grouped-query attention, gated MLP, optionally mixture-of-experts)."""
    hidden, head_dim = facts["hidden_size"], facts["head_dim"]
    query, key_value = facts["num_heads"] * head_dim, facts["num_kv_heads"] * head_dim
    attention = 2 * hidden * query + 2 * hidden * key_value
    model_type = str(config.get("model_type", ""))
    if model_type in _QKV_BIAS:
        attention += query + 2 * key_value
    if model_type in _QK_NORM:
        attention += 2 * head_dim
    experts = _num_experts(config)
    if experts:
        mlp = experts * 3 * hidden * (config.get("moe_intermediate_size") or facts["intermediate_size"]) + hidden * experts
    else:
        mlp = 3 * hidden * facts["intermediate_size"]
    embeddings = facts["vocab_size"] * hidden * (1 if facts["tie_word_embeddings"] else 2)
    return embeddings + facts["num_layers"] * (attention + mlp + 2 * hidden) + hidden


def _num_experts(config: Mapping[str, Any]) -> int:
    return config.get("num_local_experts") or config.get("num_experts") or 0


@dataclass(frozen=True)
class TrainFlops:
    """FLOPs of forward and backward of one model: for each token, each trained label, and each pair that attends.

    `per_pair` has an entry for each window that some layers attend within, None for those that see the whole document: the
    FLOPs of one pair of a query and a key it may see, in all these layers together.
    """

    per_token: float
    per_label: float
    per_pair: tuple[tuple[int | None, float], ...]

    def of(self, doc_lengths: Sequence[int], num_labels: int) -> float:
        """FLOPs for documents of these lengths in tokens, `num_labels` of them trained; padding is not looked at."""
        # A batch has many documents and few lengths.
        counts = Counter(doc_lengths)
        pairs = sum(
            per_pair * sum(count * _pairs(length, window) for length, count in counts.items())
            for window, per_pair in self.per_pair
        )
        return self.per_token * sum(doc_lengths) + self.per_label * num_labels + pairs


def train_flops(model: ModelFacts) -> TrainFlops | None:
    """What a training step of this model computes, without recomputation; None where its architecture is not in FAMILIES.

    A multiplication of [m, k] by [k, n] is 2mkn FLOPs, and twice as many again in the backward pass, for both gradients:
    6 for each weight that a token meets (of the experts only those it is sent to, and the router) and for each weight of the
    head that a trained label meets; embeddings look up and do not count, so it makes no difference whether they are tied.
    Attention is 12 x heads x head_dim for each pair of a query and a key (scores and values, each 2 forward and 4 backward)
    that are in one document, causal and within the layer's window; grouped keys and values are multiplied once per query
    head. Norms, activations, softmax, rotary embedding, biases and the optimizer do not count.
    Narayanan et al. 2021, arXiv:2104.04473, appendix; Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for MFU.
    """
    family = FAMILIES.get(str(model.config.get("model_type")))
    if family is None or model.config.get("use_bidirectional_attention"):
        return None
    if any(key not in model.config for key in family.needs) or (family.expert_width and not _num_experts(model.config)):
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
    """Pairs of a query and a key it may see in a document: each token sees itself and those before, `window` in all."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _mlp_weights(family: _Family, model: ModelFacts, layer: int) -> int:
    """Weights of a layer's gated MLP that multiply one token: of all experts the chosen ones, the shared one, the router."""
    config, hidden = model.config, model.hidden_size
    is_sparse = layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
    if family.expert_width is None or not is_sparse:
        return 3 * hidden * model.intermediate_size
    shared = config["shared_expert_intermediate_size"] if family.shared_expert else 0
    chosen = 3 * hidden * (config["num_experts_per_tok"] * config[family.expert_width] + shared)
    # A shared expert has a gate of its own, of one output.
    return chosen + hidden * (_num_experts(config) + (1 if family.shared_expert else 0))


def _window(family: _Family, config: Mapping[str, Any], layer: int) -> int | None:
    """Tokens that a layer's queries see, their own among them; None for the whole document."""
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
