"""Activations of a decoder layer that wait for the backward pass, in bytes per token. Pure.

The tensors that autograd keeps were read from the layers of transformers 5.24 with saved_tensors_hooks; benchmarks/memory_plan.py
and tests/plan/test_layer_sizes.py measure them again. H is the hidden size, w the bytes per element, q, kv and o the widths of
queries, keys or values, and attention's output; fp32 sums take 4 bytes.

    norm          its input in fp32 and its output before the weight: 4H + wH, or 8H in architectures that multiply in fp32
    attention     queries, keys, values, output and the sums of the softmax: w (q + 2kv + o) + 4 heads
    eager kernel  also the softmax, in fp32 and in the type of the weights: (4 + w) heads per token of the row
    partial rotary embedding, or heads expanded from latents
                  the output once more, in another order: wo; a norm and a projection's input for each latent
    MLP           gate, activated gate, up and their product: 4wI
    experts       for each of the k chosen ones: input and output wH, and 4wI, or 7wI if the gate's values are limited
    router        4 for each expert; its input in fp32 if it computes in fp32: 4H
    projections   their inputs: wH each, if a norm comes before

Liger's kernels keep only a norm's input and recompute the activated gate; these terms are not measured. A compiled dense layer
keeps the same (benchmarks/compiled_memory.py measures it on CPUs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.plan.architecture import (
    FOUR_NORMS,
    FP32_NORMS,
    FP32_ROTARY_TABLES,
    FP32_ROUTERS,
    FP32_ROUTING_WEIGHTS,
    FUSED_QKV,
    LIMITED_GATES,
    POST_NORMS,
    Experts,
    attention_sizes,
    has_attention_dropout,
    has_residual_dropout,
    num_layer_norms,
    query_key_norms,
)
from launcher.plan.launch_plan import ModelFacts
from launcher.plan.sizing.kernels import FLASH_KERNELS, Kernels

FP32 = 4
# Elements of 8, 4 and 2 bytes that route a token to one expert: indices, their order and its inverse, weights.
_ROUTING_BYTES = 38
# Architectures whose eager kernel computes the softmax in the type of the weights.
_NARROW_SOFTMAX = ("gpt_oss",)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token of one layer.

    `saved` wait for the backward pass; `recomputed` exist a second time while a checkpointed layer is recomputed; `backward` are
    the gradients and temporary values at the peak of its backward pass.
    """

    saved: int
    recomputed: int
    backward: int


def layer_activations(model: ModelFacts, experts: Experts | None, kernels: Kernels) -> LayerActivations:
    """Return the activations of a layer with these experts in bytes per token."""
    hidden, width, is_fp32 = model.hidden_size, kernels.width, has_fp32_norms(model)
    saved = num_layer_norms(model) * _count_norm(hidden, 1, is_fp32, kernels)
    # Inputs of the projections of attention and of the MLP. In fp32, without a preceding norm, the input of attention is the
    # layer's.
    saved += 2 * width * hidden
    saved += _count_attention(model, kernels)
    of_mlp = _count_mlp(experts.shared_size if experts else model.intermediate_size, kernels)
    if experts:
        gate_elements = (7 if model.model_type in LIMITED_GATES else 4) * experts.size
        of_mlp += experts.chosen * (width * (2 * hidden + gate_elements) + _ROUTING_BYTES) + FP32 * (experts.number + 1)
        of_mlp += FP32 * hidden + experts.number if model.model_type in FP32_ROUTERS else 0
        of_mlp += width * hidden if experts.has_shared_gate else 0
    saved += of_mlp
    if has_residual_dropout(model):
        # The factors of both outputs that are added to the layer's input.
        saved += 2 * width * hidden
    # In fp32 a norm keeps its input itself, which a checkpoint holds too.
    recomputed = saved - (width * hidden if width == FP32 else 0)
    if experts and model.model_type in FP32_ROUTING_WEIGHTS and experts.size < hidden:
        # A recomputed layer frees the outputs of experts before the peak, which wide experts reach later.
        recomputed -= width * experts.chosen * hidden
    if has_residual_dropout(model):
        recomputed -= width * hidden
    if model.model_type in FOUR_NORMS and not is_fp32:
        recomputed += FP32 * hidden
    # Of the MLP: gradients of its output, and of both factors of the product.
    if experts is None:
        backward = width * (2 * model.intermediate_size + hidden)
    else:
        backward = width * experts.chosen * max(3 * hidden, 2 * experts.size - hidden)
        if model.model_type in FP32_ROUTING_WEIGHTS:
            # The gradients of the weighted outputs are in fp32. The shared expert has freed its activations by then.
            in_weighting = (2 * FP32 + 3 * width) * experts.chosen * hidden - _count_mlp(experts.shared_size, kernels)
            backward = width * hidden + max(backward, in_weighting)
        else:
            backward += FP32 * experts.number + (2 if experts.has_shared_gate else 1) * width * hidden
    if model.model_type in (*POST_NORMS, *FOUR_NORMS):
        backward = max(backward - _count_norm(hidden, 0, is_fp32, kernels), (3 * FP32 + 2 * width) * hidden)
    if kernels.attention == "eager":
        # Gradients of the probabilities and the softmax. The activations of the MLP are already free.
        of_softmax = width if model.model_type in _NARROW_SOFTMAX else FP32
        backward = max(backward, (width + of_softmax) * model.num_heads * kernels.row_tokens - of_mlp)
    return LayerActivations(saved, recomputed, backward)


def has_fp32_norms(model: ModelFacts) -> bool:
    """Return whether norms multiply by their weight in fp32."""
    return model.model_type in FP32_NORMS


def final_norm_bytes(model: ModelFacts, kernels: Kernels) -> tuple[int, int]:
    """Return the bytes per token of the norm before the head: those that it keeps, and its peak in the backward pass."""
    # This norm is in no layer, so it is not compiled.
    return _count_norm(
        model.hidden_size, 1, has_fp32_norms(model), replace(kernels, compiled=False)
    ), 6 * FP32 * model.hidden_size


def shared_bytes(model: ModelFacts, kernels: Kernels) -> int:
    """Return the bytes per token that all layers share: rotary tables, token ids, positions, and an attention mask."""
    kinds = 2 if model.model_type == "gemma3_text" else 1
    mask = kernels.row_tokens if kernels.packed and kernels.attention not in FLASH_KERNELS else 0
    return 2 * kinds * kernels.width * model.head_dim + 16 + mask


def _count_norm(size: int, num_rows: int, is_fp32: bool, kernels: Kernels) -> int:
    if kernels.is_fused:
        return kernels.width * size + FP32 * num_rows
    return (FP32 + (FP32 if is_fp32 else kernels.width)) * size + FP32 * num_rows


def _count_attention(model: ModelFacts, kernels: Kernels) -> int:
    width, heads, sizes, is_fp32 = kernels.width, model.num_heads, attention_sizes(model), has_fp32_norms(model)
    saved = 0
    if norms := query_key_norms(model):
        num_rows = heads + model.num_kv_heads if norms == "per head" else 2
        saved += _count_norm(sizes.query + sizes.key, num_rows, is_fp32, kernels)
    for latent in sizes.latents:
        saved += _count_norm(latent, 1, is_fp32, kernels) + width * latent
    if model.model_type in FUSED_QKV:
        # Queries, keys and values are one product, whose memory is kept as long as the values are.
        saved += width * (2 * sizes.query + sizes.key)
    elif sizes.unrotated:
        # Each head is joined from a rotated and a plain part, which changes the order in memory. The output of a kernel has this
        # order, so the next projection gets a copy of it.
        if not sizes.latents:
            saved += width * sizes.output if kernels.attention in FLASH_KERNELS else 0
        elif kernels.attention in FLASH_KERNELS and sizes.query > sizes.output:
            # Values are padded to the width of queries, and so is the output.
            saved += width * (2 * sizes.query - sizes.output)
        else:
            # Values are a view of the product that also holds the plain part of the keys.
            saved += width * (sizes.unrotated + sizes.output)
    if model.model_type in FP32_ROTARY_TABLES:
        saved += 2 * FP32 * model.head_dim
    is_masked = kernels.packed and kernels.attention not in FLASH_KERNELS
    # A mask disables grouped queries: keys and values are repeated for each head.
    is_repeated = is_masked or kernels.attention == "eager"
    saved += width * (sizes.query + sizes.output + (sizes.query + sizes.output if is_repeated else sizes.key + sizes.value))
    if kernels.attention == "eager":
        # The softmax in its own type and in that of the weights.
        has_one_type = model.model_type in _NARROW_SOFTMAX or width == FP32
        of_pair = width if has_one_type else FP32 + width
        if has_attention_dropout(model):
            # The mask, and the result if it is not a copy in another type anyway.
            of_pair += 1 + (width if has_one_type else 0)
        return saved + of_pair * heads * kernels.row_tokens
    # SDPA converts the mask to numbers that it adds, in every layer.
    return saved + FP32 * heads + (width * kernels.row_tokens if is_masked else 0)


def _count_mlp(size: int, kernels: Kernels) -> int:
    return (3 if kernels.is_fused else 4) * kernels.width * size
