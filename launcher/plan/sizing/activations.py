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

from launcher.plan.architecture import is_sparse, num_experts
from launcher.plan.launch_plan import ModelFacts

FP32 = 4
# Elements of 8, 4 and 2 bytes that route a token to one expert: indices, their order and its inverse, weights.
_ROUTING_BYTES = 38
FLASH_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen")
# Architectures whose norms multiply by their weight in fp32.
_WIDE_NORMS = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3")
# Architectures with norms only after attention and MLP, or both before and after.
_POST_NORMS, _FOUR_NORMS = ("olmo2", "olmo3"), ("gemma2", "gemma3_text")
_HEAD_NORMS, _QK_NORMS = ("qwen3", "qwen3_moe", "gemma3_text"), ("olmo2", "olmo3", "olmoe")
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
    wide, experts = model_type in _WIDE_NORMS, is_sparse(model.config, layer)
    post_norms = model_type in (*_POST_NORMS, *_FOUR_NORMS)
    saved = num_layer_norms(model) * _norm(hidden, 1, wide, kernels)
    # Inputs of the projections of attention and of the MLP. In fp32, without a preceding norm, the input of attention is the
    # layer's.
    saved += 2 * width * hidden
    saved += _attention(model, model_type, wide, kernels)
    saved += _experts(model, kernels) if experts else _mlp(model.intermediate_size, kernels)
    if experts and (shared := model.config.get("shared_expert_intermediate_size")):
        saved += _mlp(shared, kernels) + 2 * width * hidden
    # In fp32 a norm keeps its input itself, which a checkpoint holds too.
    recomputed = saved - (width * hidden if width == FP32 else 0)
    backward = _mlp_backward(model, experts, kernels) - (_norm(hidden, 0, wide, kernels) if post_norms else 0)
    if post_norms:
        backward = max(backward, (3 * FP32 + 2 * width) * hidden)
    return LayerActivations(saved, recomputed, backward)


def num_layer_norms(model: ModelFacts) -> int:
    """Return the number of a layer's norms over its hidden states."""
    return 4 if str(model.config.get("model_type")) in _FOUR_NORMS else 2


def has_query_key_norms(model: ModelFacts) -> bool:
    """Return whether queries and keys are normalized."""
    return str(model.config.get("model_type")) in (*_HEAD_NORMS, *_QK_NORMS)


def has_wide_norms(model: ModelFacts) -> bool:
    """Return whether norms multiply by their weight in fp32."""
    return str(model.config.get("model_type")) in _WIDE_NORMS


def final_norm_bytes(model: ModelFacts, kernels: Kernels) -> tuple[int, int]:
    """Return the bytes per token of the norm before the head: those that it keeps, and its peak in the backward pass."""
    # This norm is in no layer, so it is not compiled.
    return _norm(model.hidden_size, 1, has_wide_norms(model), replace(kernels, compiled=False)), 6 * FP32 * model.hidden_size


def shared_bytes(model: ModelFacts, kernels: Kernels) -> int:
    """Return the bytes per token that all layers share: rotary tables, token ids, positions, and an attention mask."""
    kinds = 2 if str(model.config.get("model_type")) == "gemma3_text" else 1
    mask = kernels.row_tokens if kernels.packed and kernels.attention not in FLASH_KERNELS else 0
    return 2 * kinds * kernels.width * model.head_dim + 16 + mask


def expert_size(model: ModelFacts) -> int:
    """Return the intermediate size of one expert."""
    return int(model.config.get("moe_intermediate_size") or model.intermediate_size)


def _norm(size: int, num_rows: int, wide: bool, kernels: Kernels) -> int:
    if kernels.is_fused:
        return kernels.width * size + FP32 * num_rows
    return (FP32 + (FP32 if wide else kernels.width)) * size + FP32 * num_rows


def _attention(model: ModelFacts, model_type: str, wide: bool, kernels: Kernels) -> int:
    width, heads = kernels.width, model.num_heads
    query, key_value = heads * model.head_dim, model.num_kv_heads * model.head_dim
    saved = 0
    if model_type in _HEAD_NORMS:
        saved += _norm(query + key_value, heads + model.num_kv_heads, wide, kernels)
    elif model_type in _QK_NORMS:
        saved += _norm(query + key_value, 2, wide, kernels)
    if model_type in _FUSED_QKV:
        saved += width * (2 * query + key_value)
    masked = kernels.packed and kernels.attention not in FLASH_KERNELS
    # A mask disables grouped queries: keys and values are repeated for each head.
    keys_values = 2 * query if masked or kernels.attention == "eager" else 2 * key_value
    saved += width * (2 * query + keys_values)
    if kernels.attention == "eager":
        return saved + (FP32 + 2 * width) * heads * kernels.row_tokens
    # SDPA converts the mask to numbers that it adds, in every layer.
    return saved + FP32 * heads + (width * kernels.row_tokens if masked else 0)


def _mlp(size: int, kernels: Kernels) -> int:
    return (3 if kernels.is_fused else 4) * kernels.width * size


def _experts(model: ModelFacts, kernels: Kernels) -> int:
    chosen, width = int(model.config.get("num_experts_per_tok") or 1), kernels.width
    of_one = 2 * width * model.hidden_size + 4 * width * expert_size(model) + _ROUTING_BYTES
    return chosen * of_one + FP32 * num_experts(model.config) + FP32


def _mlp_backward(model: ModelFacts, experts: bool, kernels: Kernels) -> int:
    """Return the bytes at the peak of the MLP's backward pass: gradients of the output, and of both factors of the product."""
    width, hidden = kernels.width, model.hidden_size
    if not experts:
        return width * (2 * model.intermediate_size + hidden)
    chosen, size = int(model.config.get("num_experts_per_tok") or 1), expert_size(model)
    return width * (chosen * max(3 * hidden, 2 * size - hidden) + hidden) + FP32 * num_experts(model.config)
