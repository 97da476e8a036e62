"""Activations of a decoder layer that wait for the backward pass, in bytes per token. Pure.

The tensors that autograd keeps were read from the layers of transformers 5.24 with saved_tensors_hooks; benchmarks/memory_plan.py
measures them again. H is the hidden size, w the bytes per element; fp32 sums take 4 bytes.

    norm          its input in fp32 and its output before the weight: 4H + wH, or 8H in architectures that multiply in fp32
    attention     queries, keys, values, output and the sums of the softmax: w (2q + 2kv) + 4 heads
    MLP           gate, activated gate, up and their product: 4wI
    experts       for each of the k chosen ones: input and output wH, and 4wI
    projections   their inputs: wH each, if a norm comes before

Liger's kernels keep only a norm's input and recompute the activated gate; these terms are not measured. A compiled dense layer
keeps the same (benchmarks/compiled_memory.py measures it on CPUs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.plan.architecture.layers import (
    CLAMPED_GATES,
    FOUR_NORMS,
    FP32_ROUTERS,
    FP32_ROUTING_WEIGHTS,
    OWN_ROTARY_TABLES,
    POST_NORMS,
    WIDE_NORMS,
    AttentionSizes,
    Experts,
    attention_sizes,
    query_key_norms,
    sparse_experts,
)
from launcher.plan.launch_plan import ModelFacts

FP32 = 4
# Elements of 8, 4 and 2 bytes that route a token to one expert: indices, their order and its inverse, weights.
_ROUTING_BYTES = 38
FLASH_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen")
# Queries, keys and values are one product, whose memory is kept as long as the values are; dropout copies the output.
_FUSED_QKV = ("phi3",)


@dataclass(frozen=True)
class Kernels:
    """How a layer computes: bytes per element, attention kernel, tokens per row, whether rows are packed, Liger, FP8.

    `compiled` is whether torch.compile makes its kernels.
    """

    width: int
    attention: str
    row_tokens: int
    packed: bool = True
    liger: bool = False
    fp8: bool = False
    compiled: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether elementwise operations are fused and keep only their inputs."""
        return self.liger or self.compiled


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token of one layer.

    `saved` wait for the backward pass; `recomputed` exist a second time while a checkpointed layer is recomputed; `backward` are
    the gradients and temporary values at the peak of its backward pass.
    """

    saved: int
    recomputed: int
    backward: int


def layer_activations(model: ModelFacts, layer: int, kernels: Kernels) -> LayerActivations:
    """Return the activations of a layer in bytes per token."""
    hidden, width = model.hidden_size, kernels.width
    model_type = str(model.config.get("model_type"))
    wide, experts = model_type in WIDE_NORMS, sparse_experts(model, layer)
    post_norms = model_type in (*POST_NORMS, *FOUR_NORMS)
    saved = num_layer_norms(model) * _norm(hidden, 1, wide, kernels)
    # Inputs of the projections of attention and of the MLP. In fp32, without a preceding norm, the input of attention is the
    # layer's.
    saved += 2 * width * hidden
    saved += _attention(model, model_type, wide, kernels)
    saved += _experts(hidden, experts, model_type, kernels) if experts else _mlp(model.intermediate_size, kernels)
    if experts and experts.shared_size:
        saved += _mlp(experts.shared_size, kernels)
    if experts and experts.has_shared_gate:
        saved += width * hidden
    # In fp32 a norm keeps its input itself, which a checkpoint holds too.
    recomputed = saved - (width * hidden if width == FP32 else 0)
    if experts and model_type in FP32_ROUTING_WEIGHTS and experts.size < hidden:
        # Unlike saved outputs of narrow experts, recomputed ones are freed at the peak.
        recomputed -= width * experts.chosen * hidden
    if model_type in FOUR_NORMS and not wide:
        recomputed += FP32 * hidden
    backward = _mlp_backward(model, experts, kernels) - (_norm(hidden, 0, wide, kernels) if post_norms else 0)
    if post_norms:
        backward = max(backward, (3 * FP32 + 2 * width) * hidden)
    return LayerActivations(saved, recomputed, backward)


def num_layer_norms(model: ModelFacts) -> int:
    """Return the number of a layer's norms over its hidden states."""
    return 4 if str(model.config.get("model_type")) in FOUR_NORMS else 2


def has_wide_norms(model: ModelFacts) -> bool:
    """Return whether norms multiply by their weight in fp32."""
    return str(model.config.get("model_type")) in WIDE_NORMS


def final_norm_bytes(model: ModelFacts, kernels: Kernels) -> tuple[int, int]:
    """Return the bytes per token of the norm before the head: those that it keeps, and its peak in the backward pass."""
    # This norm is in no layer, so it is not compiled.
    return _norm(model.hidden_size, 1, has_wide_norms(model), replace(kernels, compiled=False)), 6 * FP32 * model.hidden_size


def shared_bytes(model: ModelFacts, kernels: Kernels) -> int:
    """Return the bytes per token that all layers share: rotary tables, token ids, positions, and an attention mask."""
    kinds = 2 if str(model.config.get("model_type")) == "gemma3_text" else 1
    mask = kernels.row_tokens if kernels.packed and kernels.attention not in FLASH_KERNELS else 0
    return 2 * kinds * kernels.width * model.head_dim + 16 + mask


def _norm(size: int, num_rows: int, wide: bool, kernels: Kernels) -> int:
    if kernels.is_fused:
        return kernels.width * size + FP32 * num_rows
    return (FP32 + (FP32 if wide else kernels.width)) * size + FP32 * num_rows


def _attention(model: ModelFacts, model_type: str, wide: bool, kernels: Kernels) -> int:
    width, heads, sizes = kernels.width, model.num_heads, attention_sizes(model)
    query, masked = sizes.query, kernels.packed and kernels.attention not in FLASH_KERNELS
    saved = 0
    if norms := query_key_norms(model):
        saved += _norm(query + sizes.key, heads + model.num_kv_heads if norms == "per head" else 2, wide, kernels)
    for latent in sizes.latents:
        saved += _norm(latent, 1, wide, kernels) + width * latent
    if model_type in _FUSED_QKV:
        saved += width * (2 * query + sizes.key)
    # A mask disables grouped queries: keys and values are repeated for each head.
    keys_values = query + sizes.output if masked or kernels.attention == "eager" else sizes.key + sizes.value
    saved += width * (query + keys_values + sizes.output)
    if model_type in OWN_ROTARY_TABLES:
        saved += 2 * FP32 * model.head_dim
    if sizes.plain:
        saved += width * _of_partial_rotation(sizes, kernels)
    if kernels.attention == "eager":
        return saved + (FP32 + 2 * width) * heads * kernels.row_tokens
    # SDPA converts the mask to numbers that it adds, in every layer.
    return saved + FP32 * heads + (width * kernels.row_tokens if masked else 0)


def _of_partial_rotation(sizes: AttentionSizes, kernels: Kernels) -> int:
    """Return the additional elements per token where each head is joined from a rotated and a plain part.

    Joining changes the order in memory, which the output of a kernel has too, so the next projection gets a copy of it.
    """
    if not sizes.latents:
        return sizes.output if kernels.attention in FLASH_KERNELS else 0
    if kernels.attention in FLASH_KERNELS and sizes.query > sizes.output:
        # Values are padded to the width of queries, and so is the output.
        return 2 * (sizes.query - sizes.output) + sizes.output
    # Values are a view of the product that also holds the plain part of the keys.
    return sizes.plain + sizes.output


def _mlp(size: int, kernels: Kernels) -> int:
    return (3 if kernels.is_fused else 4) * kernels.width * size


def _experts(hidden: int, experts: Experts, model_type: str, kernels: Kernels) -> int:
    in_gate = 7 if model_type in CLAMPED_GATES else 4
    of_one = 2 * kernels.width * hidden + in_gate * kernels.width * experts.size + _ROUTING_BYTES
    of_router = FP32 * hidden + experts.number if model_type in FP32_ROUTERS else 0
    return experts.chosen * of_one + FP32 * experts.number + FP32 + of_router


def _mlp_backward(model: ModelFacts, experts: Experts | None, kernels: Kernels) -> int:
    """Return the bytes at the peak of the MLP's backward pass: gradients of the output, and of both factors of the product."""
    width, hidden = kernels.width, model.hidden_size
    if experts is None:
        return width * (2 * model.intermediate_size + hidden)
    if model.config.get("model_type") in FP32_ROUTING_WEIGHTS:
        # The gradients of the weighted outputs are in fp32. The shared expert has freed its activations by then.
        return (2 * FP32 + 3 * width) * experts.chosen * hidden + width * hidden - _mlp(experts.shared_size, kernels)
    of_chosen = width * experts.chosen * max(3 * hidden, 2 * experts.size - hidden)
    return of_chosen + FP32 * experts.number + (2 if experts.has_shared_gate else 1) * width * hidden
