"""Numbers of a decoder-only transformer from its config.json: parameters, and FLOPs per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.launch_plan import ModelFacts

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Per-head norms on queries and keys.
_QK_NORM = ("qwen3", "qwen3_moe")
_QKV_BIAS = ("qwen2", "qwen2_moe")


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
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    if experts:
        mlp = experts * 3 * hidden * (config.get("moe_intermediate_size") or facts["intermediate_size"]) + hidden * experts
    else:
        mlp = 3 * hidden * facts["intermediate_size"]
    embeddings = facts["vocab_size"] * hidden * (1 if facts["tie_word_embeddings"] else 2)
    return embeddings + facts["num_layers"] * (attention + mlp + 2 * hidden) + hidden


def train_flops(model: ModelFacts, doc_lengths: Sequence[int], num_labels: int) -> float:
    """FLOPs of forward and backward over documents of these lengths, without recomputation.

    Per token 6 x the weights that multiply it (embeddings look up, so they do not count; the head counts only
    where a label is trained), and 6 x layers x heads x head_dim x length^2 for causal attention per document
    (Narayanan et al. 2021, arXiv:2104.04473, appendix; halved for causality).
    """
    config = model.config
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = 2 * model.hidden_size * (query + key_value)
    if config.get("num_local_experts") or config.get("num_experts"):
        width = config.get("moe_intermediate_size") or model.intermediate_size
        mlp = int(config.get("num_experts_per_tok", 1)) * 3 * model.hidden_size * width
    else:
        mlp = 3 * model.hidden_size * model.intermediate_size
    tokens = sum(doc_lengths)
    dense = 6.0 * tokens * model.num_layers * (attention + mlp)
    head = 6.0 * num_labels * model.vocab_size * model.hidden_size
    scores = 6.0 * model.num_layers * query * sum(n * n for n in doc_lengths)
    return dense + head + scores
