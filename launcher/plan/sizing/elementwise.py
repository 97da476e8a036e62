"""Bytes that operations other than matrix products and attention read and write in a forward and backward pass. Pure.

Norms, rotary embedding, the MLP's gate, sums and the loss do little arithmetic, so memory bandwidth determines their time. The
bytes were counted in the layers of transformers 5.24, where each operation reads its inputs and writes its output
(test_step_time.py and test_layer_sizes.py in tests/plan measure them with fake tensors). H is the hidden size, w the bytes per
element, q and kv the widths of queries and keys, I the intermediate size, V the vocabulary:

    norm                (124 + 2w) H    about ten operations in fp32, most of them backward; 28H more if the weight is in fp32
    rotary embedding    23w (q + kv)    halves negated and joined, two products and a sum
    MLP's gate          14w I           activation and product, and their gradients
    sums                21w H           two residuals, and gradients of what several products read
    experts             14w I + 20w H   for each chosen one, whose tokens are gathered and added up; 45w H if the weights of
                                        this sum are in fp32, 60w I more if the gate's values are limited
    joined heads        8w q            where only a part of each head has a rotary embedding; 30w q if heads are expanded from
                                        latents, 37w q if the embedding is computed in fp32
    loss                40V             logits and their gradient in fp32, for each trained token
    head's weight       its gradient is filled, read and written for each chunk of tokens, in fp32 if there are several, and
                        scaled; a tied one is added to that of the embedding

Liger's kernels read and write each tensor once: 10w H, 4w (q + kv) and 8w I. The fusions of torch's compiler are assumed to leave
COMPILED_SHARE. Neither is verified on a GPU.
"""

from __future__ import annotations

import math
from collections import Counter

from launcher.plan.architecture.layers import (
    FP32_ROTARY_TABLES,
    FP32_ROUTING_WEIGHTS,
    LIMITED_GATES,
    Experts,
    attention_sizes,
    experts_by_layer,
    num_layer_norms,
    query_key_norms,
)
from launcher.plan.launch_plan import ModelFacts
from launcher.plan.sizing.activations import FP32, Kernels, has_fp32_norms

# Share of a layer's bytes that its forward pass moves; a recomputed layer moves them again.
FORWARD_SHARE = 0.30
COMPILED_SHARE = 0.6
LOGIT_BYTES = 40


def _bytes_of_layer(model: ModelFacts, experts: Experts | None, kernels: Kernels) -> float:
    """Return the bytes per token that a layer's forward and backward pass move, excluding products and attention."""
    width, hidden = kernels.width, model.hidden_size
    attention = attention_sizes(model)
    norm = 124 + 2 * width + (28 if has_fp32_norms(model) else 0)
    eager = num_layer_norms(model) * norm * hidden + 23 * width * attention.rotated
    fused = num_layer_norms(model) * 10 * width * hidden + 4 * width * attention.rotated
    normalized = attention.query + attention.key if query_key_norms(model) else sum(attention.latents)
    eager += norm * normalized
    fused += 10 * width * normalized
    joined = width * attention.query * _joined_passes(model)
    eager, fused = eager + joined, fused + joined
    gated = model.intermediate_size
    if experts:
        in_gate = 74 if model.model_type in LIMITED_GATES else 14
        in_sum = 45 if model.model_type in FP32_ROUTING_WEIGHTS else 20
        chosen = experts.chosen * width * (in_gate * experts.size + in_sum * hidden)
        eager, fused, gated = eager + chosen, fused + chosen, experts.shared_size
    eager += 14 * width * gated
    fused += 8 * width * gated
    sums = 21 * width * hidden
    if kernels.liger:
        return fused + sums
    return (eager + sums) * (COMPILED_SHARE if kernels.compiled else 1.0)


def _joined_passes(model: ModelFacts) -> int:
    """Return how often the queries of a layer are read or written to join the parts of heads."""
    attention = attention_sizes(model)
    if model.model_type in FP32_ROTARY_TABLES:
        return 37
    return 30 if attention.latents else 8 if attention.unrotated else 0


def bytes_of_layers(model: ModelFacts, kernels: Kernels, recomputed_share: float) -> float:
    """Return the bytes per token that all layers move; `recomputed_share` of them repeat their forward pass."""
    kinds = Counter(experts_by_layer(model))
    layers = sum(count * _bytes_of_layer(model, experts, kernels) for experts, count in kinds.items())
    return layers * (1 + FORWARD_SHARE * recomputed_share)


def bytes_of_loss(model: ModelFacts, width: int, trained_tokens: float, chunk_tokens: int) -> float:
    """Return the bytes that the loss moves excluding its products, with the logits of `chunk_tokens` at a time."""
    num_chunks = max(1, math.ceil(trained_tokens / chunk_tokens))
    of_weight = 2 * (FP32 if num_chunks > 1 else width) * num_chunks + 3 * width + (4 * width if model.tie_word_embeddings else 0)
    return model.vocab_size * (LOGIT_BYTES * trained_tokens + of_weight * model.hidden_size)
