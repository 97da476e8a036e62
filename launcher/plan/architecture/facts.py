"""The facts of a model that the plan needs, from its config.json."""

from __future__ import annotations

from collections import Counter
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.architecture.layers import (
    SIZE_KEYS,
    attention_sizes,
    experts_by_layer,
    mlp_elements,
    num_layer_norms,
    query_key_norms,
)
from launcher.plan.launch_plan import ModelFacts

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = ("num_key_value_heads", "head_dim", "intermediate_size", *SIZE_KEYS)
# Far above any model. The plan goes through all layers, which would take all memory if their number had no limit.
_MAX_LAYERS, _MAX_SIZE, _MAX_DIGITS = 10_000, 1 << 31, 30
# Keys that transformers maps to the first names above in the configs of GPT-2, GPT-J, GPT-Neo, BLOOM, MPT and others.
_OTHER_NAMES = ("n_embd", "n_layer", "n_head", "d_model", "n_layers", "n_heads", "num_layers", "num_heads")
# Architectures whose embeddings are tied unless config.json says otherwise.
_TIED = ("gemma", "gemma2", "gemma3_text", "smollm3", "ernie4_5", "ernie4_5_moe")
_QKV_BIAS = ("qwen2", "qwen2_moe", "seed_oss")


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
    for key in ("num_key_value_heads", "head_dim", "intermediate_size"):
        if not isinstance(value := config.get(key), int | None):
            message, remedy = f"{key} is not a whole number", "use the config.json that belongs to the model"
            raise ConfigError(message, where=path or "model.config", value=str(value)[:_MAX_DIGITS], remedy=remedy)
    for key in (*_NEEDED, *_OPTIONAL):
        least, most = int(key in _NEEDED), _MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE
        if isinstance(value := config.get(key), int) and not least <= value <= most:
            message, remedy = f"{key} is not between {least} and {most:,}", "use the config.json that belongs to the model"
            raise ConfigError(message, where=path or "model.config", value=str(value)[:_MAX_DIGITS], remedy=remedy)
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
