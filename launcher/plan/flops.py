"""Training FLOPs of a decoder-only transformer, from its config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.plan.architecture import MIXTURES, attention_sizes, experts_by_layer, experts_of, mlp_elements
from launcher.plan.launch_plan import ModelFacts


@dataclass(frozen=True)
class _Family:
    """How transformers builds the layers of one `model_type`, as far as it affects FLOPs.

    A config without the keys `needs`, or those of its experts, is not supported: their defaults in transformers differ from
    those of ModelFacts. `window` is the default of `sliding_window`; with `switched`, it applies only if `use_sliding_window` is
    on. `slides` returns whether a layer attends within the window; with `listed`, the config's `layer_types` takes precedence.
    """

    needs: tuple[str, ...] = ("num_key_value_heads",)
    window: int | None = None
    switched: bool = False
    slides: Callable[[Mapping[str, Any], int], bool] = lambda config, layer: True
    listed: bool = False


def _read_int(config: Mapping[str, Any], key: str, default: int) -> int:
    return value if isinstance(value := config.get(key), int) else default


def _is_past_full_layers(config: Mapping[str, Any], layer: int) -> bool:
    default = 62 if config.get("model_type") == "dots1" else 28
    return layer >= _read_int(config, "max_window_layers", default)


def _is_even(config: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0


def _has_no_rope(config: Mapping[str, Any], layer: int) -> bool:
    has_rope = config.get("no_rope_layers")
    if isinstance(has_rope, list) and layer < len(has_rope):
        return not has_rope[layer]
    return (layer + 1) % (_read_int(config, "no_rope_layer_interval", 4) or 1) == 0


_KV_HEADS = ("num_key_value_heads",)
_OWN_HEAD_DIM = ("num_key_value_heads", "head_dim")
_LATENTS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# From configuration_*.py and modeling_*.py of each in transformers 5.24; tests/plan/test_flops.py counts each of them.
FAMILIES = {
    "llama": _Family(needs=()),
    "mistral": _Family(window=4096),
    "ministral": _Family(needs=_OWN_HEAD_DIM, window=4096, listed=True),
    "ministral3": _Family(needs=_OWN_HEAD_DIM),
    "qwen2": _Family(window=4096, switched=True, slides=_is_past_full_layers, listed=True),
    "qwen3": _Family(needs=_OWN_HEAD_DIM, window=4096, switched=True, slides=_is_past_full_layers, listed=True),
    "gemma": _Family(needs=_OWN_HEAD_DIM),
    "gemma2": _Family(needs=_OWN_HEAD_DIM, window=4096, slides=_is_even, listed=True),
    "gemma3_text": _Family(
        needs=_OWN_HEAD_DIM,
        window=4096,
        slides=lambda config, layer: (layer + 1) % (_read_int(config, "sliding_window_pattern", 6) or 1) != 0,
        listed=True,
    ),
    "olmo2": _Family(needs=()),
    "olmo3": _Family(needs=(), window=4096, slides=lambda config, layer: (layer + 1) % 4 != 0, listed=True),
    "phi3": _Family(needs=()),
    "smollm3": _Family(switched=True, slides=_has_no_rope, listed=True),
    "glm": _Family(needs=_OWN_HEAD_DIM),
    "glm4": _Family(needs=_OWN_HEAD_DIM),
    "ernie4_5": _Family(needs=_OWN_HEAD_DIM),
    "exaone4": _Family(needs=(*_KV_HEADS, "layer_types"), window=4096, listed=True),
    "cwm": _Family(needs=_OWN_HEAD_DIM, window=8192, slides=lambda config, layer: layer % 4 != 0, listed=True),
    "hunyuan_v1_dense": _Family(needs=("head_dim",)),
    "internlm3": _Family(needs=_OWN_HEAD_DIM),
    "seed_oss": _Family(needs=_OWN_HEAD_DIM),
    "olmoe": _Family(needs=()),
    "mixtral": _Family(),
    "qwen2_moe": _Family(
        window=4096,
        switched=True,
        slides=lambda config, layer: layer % 2 == 0 and layer < _read_int(config, "max_window_layers", 28),
        listed=True,
    ),
    "qwen3_moe": _Family(window=4096, switched=True),
    "glm4_moe": _Family(needs=_OWN_HEAD_DIM),
    "dots1": _Family(window=4096, slides=_is_past_full_layers, listed=True),
    "minimax_m2": _Family(needs=_OWN_HEAD_DIM),
    "gpt_oss": _Family(needs=_OWN_HEAD_DIM, window=128, slides=_is_even, listed=True),
    "ernie4_5_moe": _Family(),
    "deepseek_v3": _Family(needs=_LATENTS),
    "glm4_moe_lite": _Family(needs=_LATENTS),
}


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
        of_pairs: float = 0
        for window, per_pair in self.per_pair:
            num_pairs = 0
            for length, count in counts.items():
                # Each token attends to itself and to earlier tokens, `window` in total.
                span = length if window is None else min(length, window)
                num_pairs += count * (span * (span + 1) // 2 + (length - span) * span)
            of_pairs += per_pair * num_pairs
        return self.per_token * sum(doc_lengths) + self.per_label * num_labels + of_pairs


def missing_sizes(model: ModelFacts) -> tuple[str, ...]:
    """Return the keys that FLOPs need and that config.json lacks, for an architecture in FAMILIES."""
    config, missing = model.config, []
    for key in FAMILIES[model.model_type].needs + (MIXTURES[model.model_type].others if model.model_type in MIXTURES else ()):
        kind = list if key == "layer_types" else int
        # Without a latent for queries, they are not expanded.
        if not isinstance(config.get(key), kind) and not (key == "q_lora_rank" and config.get(key, 0) is None):
            missing.append(key)
    if model.model_type in MIXTURES and experts_of(config) is None:
        missing.append(MIXTURES[model.model_type].number)
    return tuple(dict.fromkeys(missing))


def train_flops(model: ModelFacts) -> TrainFlops | None:
    """Return the FLOPs of training this model, without recomputation; None for an architecture that is not in FAMILIES.

    A multiplication of [m, k] by [k, n] is 2mkn FLOPs, and twice as many in the backward pass, for both gradients. This gives 6
    for each weight that a token meets (only the experts that it is routed to, and the router), and 6 for each weight of the head
    that a trained label meets. Embeddings are lookups and do not count, so tying them makes no difference.
    Attention is 12 x heads x head_dim for each pair of a query and a key (scores and values, each 2 forward and 4 backward) in
    one document, causal and within the layer's window; queries that are expanded from latents have another width than values.
    Grouped keys and values are multiplied once per query head. Norms, activations, softmax, rotary embedding, biases and the
    optimizer do not count.
    Narayanan et al. 2021, arXiv:2104.04473, appendix; Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for MFU.
    """
    family = FAMILIES.get(model.model_type)
    if family is None or missing_sizes(model) or model.config.get("use_bidirectional_attention"):
        return None
    # The number of tokens that the queries of each layer attend to, including themselves: None for the whole document.
    window = model.config.get("sliding_window", family.window)
    if not isinstance(window, int) or window < 1 or (family.switched and not model.config.get("use_sliding_window", False)):
        window = None
    kinds = model.config.get("layer_types") if family.listed else None
    if isinstance(kinds, list):
        kinds = kinds[: model.num_layers]
        if len(kinds) < model.num_layers or not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
            return None
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    else:
        slides = [window is not None and family.slides(model.config, layer) for layer in range(model.num_layers)]
        windows = [window if one else None for one in slides]
    attention = attention_sizes(model)
    # Of the experts, only the chosen ones multiply a token.
    of_mlps = Counter(experts_by_layer(model))
    weights = model.num_layers * attention.num_weights
    weights += sum(count * mlp_elements(model, experts, experts.chosen if experts else 0) for experts, count in of_mlps.items())
    per_pair = 6.0 * (attention.query + attention.output)
    return TrainFlops(
        per_token=6.0 * weights,
        per_label=6.0 * model.vocab_size * model.hidden_size,
        per_pair=tuple((window, per_pair * count) for window, count in Counter(windows).items()),
    )
