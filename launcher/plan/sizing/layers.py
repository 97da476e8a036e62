"""How the layers of a run compute (attention kernel, Liger, recomputation), and what they keep for the backward pass. Pure.

A plan assumes kernels; only the ranks know what they can import.

Activations are in bytes per token. The tensors that autograd keeps were read from the layers of transformers 5.24 with
saved_tensors_hooks; benchmarks/memory_plan.py and tests/plan/test_layer_sizes.py measure them again. H is the hidden size, w the
bytes per element, q, kv and o the widths of queries, keys or values, and attention's output; fp32 sums take 4 bytes.

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

from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
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

# The values of model.activation_checkpointing, beside `every N`.
ALL, NONE, AUTO = "all", "none", "auto"
FLASH_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen")
# Dense architectures (model_type) that Liger has kernels for. Experts are excluded: Liger's are untested under ZeRO-3.
LIGER_ARCHITECTURES = (
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
)
FP32 = 4
# Elements of 8, 4 and 2 bytes that route a token to one expert: indices, their order and its inverse, weights.
_ROUTING_BYTES = 38
# Architectures whose eager kernel computes the softmax in the type of the weights.
_NARROW_SOFTMAX = ("gpt_oss",)


@dataclass(frozen=True)
class Kernels:
    """How a layer computes: bytes per element, attention kernel, tokens per row, whether rows are packed, Liger.

    `compiled` is whether torch.compile makes its kernels.
    """

    width: int
    attention: str
    row_tokens: int
    packed: bool = True
    liger: bool = False
    compiled: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether elementwise operations are fused and keep only their inputs."""
        return self.liger or self.compiled


def attention_kernel(config: RunConfig, model: ModelFacts, device: str) -> str:
    """Return the attention kernel that a plan assumes. varlen also stands for FlashAttention, which keeps the same tensors.

    For `auto`, this is the kernel with which the model was probed, unless that kernel cannot compute this run's attention on
    GPUs.
    """
    if config.model.attention != AUTO:
        return config.model.attention
    if model.isolation is not None and model.isolation.kernel not in (AUTO, "varlen"):
        return model.isolation.kernel
    cannot_use_varlen = config.model.dtype == "fp32" or has_attention_dropout(model)
    return "sdpa" if device == "cuda" and cannot_use_varlen else "varlen"


def uses_liger(config: RunConfig, model: ModelFacts, device: str, packages: Mapping[str, str]) -> bool:
    """Return whether the ranks of a plan try Liger's kernels; `packages` are those installed here, with their versions."""
    section = config.model
    if section.liger != AUTO:
        return section.liger and device == "cuda"
    return has_liger_kernels(section, model, device) and ("liger-kernel" in packages or may_lack_liger(config))


def may_lack_liger(config: RunConfig) -> bool:
    """Return whether only the ranks can tell if Liger is installed: `auto`, and they run in another Python than this one.

    The plan is then for the case without it. Planned for Liger, a run whose image lacks the package would be out of memory after
    its model has loaded on rented GPUs. The price is at most one step of micro-batch or recomputation, which model.liger=true
    takes back.
    """
    return config.model.liger == AUTO and not config.cluster.uses_own_python


def has_liger_kernels(section: ModelSection, model: ModelFacts, device: str) -> bool:
    """Return whether Liger can compute this model on this device. It does not know classes in code that comes with a model."""
    return device == "cuda" and model.model_type in LIGER_ARCHITECTURES and not section.trust_remote_code


def describe_liger(config: RunConfig, model: ModelFacts, device: str, is_used: bool) -> str:
    """Return which of Liger's kernels a plan assumes and why, as one line about the plan; empty on CPUs."""
    section = config.model
    if device != "cuda":
        return ""
    if is_used:
        condition = " if the ranks have liger-kernel, and planned without them (model.liger=true plans with them)"
        return f"Liger's kernels{condition if may_lack_liger(config) else ''}"
    if section.liger == AUTO and has_liger_kernels(section, model, device):
        return "without Liger, which is not installed here (pip install 'launcher[gpu]')"
    return "" if section.liger == AUTO else "without Liger (model.liger=false)"


def checkpointing_interval(checkpointing: str) -> int:
    """Return N if every Nth layer is recomputed: 1 for `all`, 0 for `none`.

    Raises:
        ValueError: for any other value, including `auto`.
    """
    return int({ALL: "1", NONE: "0"}.get(checkpointing) or checkpointing.removeprefix("every "))


def checkpointed_layers(checkpointing: str, num_layers: int) -> tuple[bool, ...]:
    """Return, for each layer, whether it is recomputed: with `every N`, layers 0, N, 2N and so on.

    A recomputed layer needs the memory of a layer's activations a second time. If the last layer is not recomputed, its own
    activations are free by then.
    """
    every = checkpointing_interval(checkpointing)
    return tuple(every > 0 and layer % every == 0 for layer in range(num_layers))


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
    hidden, width = model.hidden_size, kernels.width
    saved = num_layer_norms(model) * _count_norm(model, hidden, 1, kernels)
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
    if model.model_type in FOUR_NORMS and model.model_type not in FP32_NORMS:
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
        backward = max(backward - _count_norm(model, hidden, 0, kernels), (3 * FP32 + 2 * width) * hidden)
    if kernels.attention == "eager":
        # Gradients of the probabilities and the softmax. The activations of the MLP are already free.
        of_softmax = width if model.model_type in _NARROW_SOFTMAX else FP32
        backward = max(backward, (width + of_softmax) * model.num_heads * kernels.row_tokens - of_mlp)
    return LayerActivations(saved, recomputed, backward)


def final_norm_bytes(model: ModelFacts, kernels: Kernels) -> tuple[int, int]:
    """Return the bytes per token of the norm before the head: those that it keeps, and its peak in the backward pass."""
    # This norm is in no layer, so it is not compiled.
    return _count_norm(model, model.hidden_size, 1, replace(kernels, compiled=False)), 6 * FP32 * model.hidden_size


def shared_bytes(model: ModelFacts, kernels: Kernels) -> int:
    """Return the bytes per token that all layers share: rotary tables, token ids, positions, and an attention mask."""
    kinds = 2 if model.model_type == "gemma3_text" else 1
    mask = kernels.row_tokens if kernels.packed and kernels.attention not in FLASH_KERNELS else 0
    return 2 * kinds * kernels.width * model.head_dim + 16 + mask


def _count_norm(model: ModelFacts, size: int, num_rows: int, kernels: Kernels) -> int:
    of_input = 0 if kernels.is_fused else FP32
    of_output = FP32 if model.model_type in FP32_NORMS and not kernels.is_fused else kernels.width
    return (of_input + of_output) * size + FP32 * num_rows


def _count_attention(model: ModelFacts, kernels: Kernels) -> int:
    width, heads, sizes = kernels.width, model.num_heads, attention_sizes(model)
    saved = 0
    if norms := query_key_norms(model):
        num_rows = heads + model.num_kv_heads if norms == "per head" else 2
        saved += _count_norm(model, sizes.query + sizes.key, num_rows, kernels)
    for latent in sizes.latents:
        saved += _count_norm(model, latent, 1, kernels) + width * latent
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
