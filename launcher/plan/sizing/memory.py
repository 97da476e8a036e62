"""Memory of a rank under ZeRO-3: its model states (Rajbhandari et al. 2020, arXiv:1910.02054), and its peak by stage of a step.

Pure. The terms of the peak follow the code: launcher/train/loss.py for the loss, DeepSpeed 0.19.8's stage3.py and
partitioned_param_coordinator.py for weights and gradients, and layers.py in this folder. With T tokens per forward pass,
V the vocabulary, H the hidden size, C the tokens per chunk of logits, and w the bytes per element:

    loss           all activations, the hidden states and their gradients 2wTH, the head's gradient and the logits of a chunk:
                   4VH for the sum over chunks in fp32 (wVH with one chunk), with it 4CV for logits, in narrower types wCV more
                   for their gradient, or wVH for the sum in the type of the weights
    backward       all activations, one layer a second time if it is recomputed, the gradients inside it and of two weights
    optimizer step one sub-group's gradients in fp32, twice if they accumulate in another type
    gathered       DeepSpeed prefetches weights until stage3_max_live_parameters of them are gathered, and in addition those of
                   one module, or of a layer that is gathered as a whole; experts' weights stay until the backward pass of a
                   layer that is not recomputed, which holds them through a transposed view. A single rank gathers nothing, unless
                   its weights are in main memory: it computes with its partition itself (partition_parameters.py, NoGatherHandle)
    buckets        one of reduce_bucket_size elements; a larger weight's gradient is reduced in place, and copied for that

benchmarks/memory_plan.py compares these terms with measurements on CPUs, which do not include CUDA, NCCL and fragmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.config.sections.train import DeepSpeedSection
from launcher.plan.architecture import experts_by_layer, largest_weight
from launcher.plan.gpu_types import GpuType
from launcher.plan.launch_plan import Memory, ModelFacts, PeakMemory, StageMemory, Topology
from launcher.plan.optimizers import FP32_BYTES, Optimizer
from launcher.plan.sizing.layers import FP32, Kernels, final_norm_bytes, layer_activations, shared_bytes

GIB = 2**30
# From this many parameters, all layers of a model recompute their activations if the memory of the GPUs is unknown.
RECOMPUTED_FROM = 2_000_000_000
# Elements of optimizer states on NVMe that are in memory at a time: one buffer each for weights, gradients and every state.
NVME_SUB_GROUP = 100_000_000
# Memory for CUDA and NCCL, and the fragmentation factor with expandable segments, for GPU types that were not measured.
DEFAULT_RUNTIME_GIB, DEFAULT_FRAGMENTATION = 2.0, 1.03


def num_hpz_ranks(deepspeed: DeepSpeedSection, ranks_per_node: int) -> int:
    """Return the number of ranks that share a second copy of the weights; 1 means that there is no second copy."""
    return ranks_per_node if deepspeed.hpz_partition_size == "node" else int(deepspeed.hpz_partition_size)


def max_parameter_elements(facts: ModelFacts) -> int:
    """Return the number of elements of the largest parameter: the embedding, or a weight of a layer."""
    return max(head_elements(facts), largest_weight(facts))


def layer_elements(facts: ModelFacts) -> int:
    """Return the elements of a decoder layer, averaged if only some layers have experts."""
    embeddings = head_elements(facts) * (1 if facts.tie_word_embeddings else 2)
    return max(1, (facts.num_params - embeddings) // max(1, facts.num_layers))


def num_nvme_buffers(optimizer: Optimizer) -> int:
    """Return the number of buffers that DeepSpeed needs to step a sub-group on NVMe: weights, gradients and each state."""
    return 2 + len(optimizer.states)


def estimate_model_states(
    num_params: int,
    dtype: str,
    accumulation: int,
    optimizer: Optimizer,
    deepspeed: DeepSpeedSection,
    topology: Topology,
    device_gib: float | None,
) -> Memory:
    """Estimate model states in GiB, per rank on its device and per node in main memory."""
    width = 4 if dtype == "fp32" else 2
    per_rank = num_params / topology.world_size / GIB
    hpz = num_hpz_ranks(deepspeed, topology.ranks_per_node)
    weights = per_rank * width + (num_params / hpz / GIB * width if hpz > 1 else 0.0)
    # Gradients accumulate in fp32, so small terms are not rounded away.
    gradients = per_rank * (4 if accumulation > 1 else width)
    # DeepSpeed keeps a master copy of fp32 weights too.
    states = per_rank * optimizer.bytes_per_param
    on_device = weights if deepspeed.offload_params == "none" else 0.0
    host = weights if deepspeed.offload_params == "cpu" else 0.0
    if deepspeed.offload_optimizer == "none":
        on_device = on_device + gradients + states
    elif deepspeed.offload_optimizer == "cpu":
        host += gradients + states
    else:
        host += gradients + num_nvme_buffers(optimizer) * FP32_BYTES * min(per_rank, NVME_SUB_GROUP / GIB)
    if topology.device == "cpu":
        host += on_device
    return Memory(
        weights_gib=round(weights, 3),
        gradients_gib=round(gradients, 3),
        optimizer_gib=round(states, 3),
        per_rank_gib=round(on_device, 3),
        host_per_node_gib=round(host * topology.ranks_per_node, 3),
        device_gib=device_gib,
    )


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: its tokens, how layers compute, which are recomputed, and the tokens per chunk of logits."""

    tokens: int
    kernels: Kernels
    checkpointed: tuple[bool, ...]
    chunk_tokens: int


@dataclass(frozen=True)
class Sharding:
    """How ZeRO-3 holds and moves weights and gradients: DeepSpeed's section zero_optimization, ranks, and where states are.

    `states_bytes` are a rank's model states on its device, `gradient_width` the bytes per element of an accumulated gradient,
    `reduced_width` and `gathered_width` those of a gradient and a weight on their way to other ranks. `hpz_ranks` share a second
    copy of the weights. With `whole_layers`, a layer's weights are gathered as a whole.
    """

    zero: Mapping[str, Any]
    world_size: int
    states_bytes: int
    gradient_width: int
    reduced_width: int
    gathered_width: int
    hpz_ranks: int = 1
    offload_optimizer: str = "none"
    offload_params: str = "none"
    whole_layers: bool = False


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of the activations of a pass: all those that wait for the backward pass, and the additions of its peaks."""

    saved: int
    backward: int
    final_norm: int


def activation_bytes(model: ModelFacts, one_pass: Pass) -> ActivationBytes:
    """Return the bytes of the activations of the decoder layers."""
    kernels, tokens = one_pass.kernels, one_pass.tokens
    held, peak = shared_bytes(model, kernels), 0
    # All layers are of one kind, or of two kinds if only some have experts.
    layers = experts_by_layer(model)
    by_kind = {experts: layer_activations(model, experts, kernels) for experts in set(layers)}
    for experts, is_recomputed in zip(layers, one_pass.checkpointed, strict=True):
        activations = by_kind[experts]
        held += kernels.width * model.hidden_size if is_recomputed else activations.saved
        # In the backward pass of this layer, the activations of later layers are already free.
        peak = max(peak, held + activations.backward + (activations.recomputed if is_recomputed else 0))
    kept, norm_peak = final_norm_bytes(model, kernels)
    return ActivationBytes((held + kept) * tokens, peak * tokens, (held + norm_peak) * tokens)


def head_elements(model: ModelFacts) -> int:
    """Return the elements of the head's weight."""
    return model.vocab_size * model.hidden_size


def loss_bytes(model: ModelFacts, one_pass: Pass) -> int:
    """Return the bytes that the loss adds to the activations: hidden states, gradients, and the logits of a chunk."""
    width, tokens, head = one_pass.kernels.width, one_pass.tokens, head_elements(model)
    chunk, narrow = min(one_pass.chunk_tokens, tokens), width if width < FP32 else 0
    is_summed = narrow and tokens > chunk
    logits = (FP32 + narrow) * chunk * model.vocab_size
    gradient = FP32 * head + max(logits, narrow * head) if is_summed else width * head + logits
    return 2 * width * tokens * model.hidden_size + gradient


def estimate_peak(model: ModelFacts, one_pass: Pass, sharding: Sharding, gpu: GpuType | None) -> PeakMemory:
    """Estimate the peak memory of a rank in each stage of a step; `gpu` is None for CPUs, which have no CUDA or NCCL."""
    width, zero = one_pass.kernels.width, sharding.zero
    head, weight = head_elements(model), largest_weight(model)
    activations = activation_bytes(model, one_pass)
    ahead = zero["stage3_max_live_parameters"] if zero["stage3_prefetch_bucket_size"] else 0
    # Experts' weights stay gathered from the forward pass of a layer that is not recomputed until its backward pass.
    layers = zip(experts_by_layer(model), one_pass.checkpointed, strict=True)
    kept = [experts for experts, is_recomputed in layers if experts and not is_recomputed]
    held = sum(3 * experts.number * experts.size * model.hidden_size for experts in kept)
    # The elements that are fetched at a time.
    unit = max(weight, layer_elements(model)) if sharding.whole_layers else weight
    is_gathered = sharding.world_size > 1 or sharding.offload_params != "none"
    in_loss = width * min(model.num_params, max(ahead, head) + unit + held) * is_gathered
    in_backward = width * min(model.num_params, max(ahead, unit) + unit + held) * is_gathered
    # A gradient waits for the next one before it is reduced; its partitions are converted to the accumulation type.
    pending = (2 * width + sharding.gradient_width / sharding.world_size) * weight
    pending += _count_reduction_copies(weight, width, sharding)
    if sharding.whole_layers:
        # The gradients of a layer wait until its last gradient exists.
        pending += width * max(0, layer_elements(model) - weight)
    head_gradient = width * head
    # The gradient of a tied head waits for the gradient of the embedding.
    if model.tie_word_embeddings:
        pending += head_gradient
    # The head's gradient is converted while the norm's temporary values are freed.
    converted = sharding.gradient_width * head / sharding.world_size
    if not model.tie_word_embeddings:
        converted += _count_reduction_copies(head, width, sharding)
    norm_temporary = max(converted, activations.final_norm - activations.saved)
    in_layer = activations.backward - activations.saved
    sub_group = min(zero["sub_group_size"], model.num_params / sharding.world_size)
    copies = FP32 + (sharding.gradient_width if sharding.gradient_width != FP32 else 0)
    stages = (
        _make_stage("loss", activations.saved, in_loss, 0, loss_bytes(model, one_pass)),
        _make_stage("final norm", activations.saved, in_backward, head_gradient, norm_temporary),
        _make_stage("backward", activations.saved, in_backward, pending, in_layer),
        _make_stage("optimizer step", 0, 0, 0, copies * sub_group if sharding.offload_optimizer == "none" else 0),
    )
    buckets = sharding.reduced_width * zero["reduce_bucket_size"]
    tensors = (sharding.states_bytes + buckets) / GIB + max(stage.total_gib for stage in stages)
    runtime, fragmentation = 0.0, 1.0
    if gpu is not None:
        runtime = DEFAULT_RUNTIME_GIB if gpu.runtime_gib is None else gpu.runtime_gib
        fragmentation = DEFAULT_FRAGMENTATION if gpu.fragmentation is None else gpu.fragmentation
    return PeakMemory(
        states_gib=_to_gib(sharding.states_bytes),
        buckets_gib=_to_gib(buckets),
        stages=stages,
        fragmentation_gib=round(tensors * (fragmentation - 1), 4),
        runtime_gib=runtime,
        peak_gib=round(tensors * fragmentation + runtime, 4),
        is_measured=gpu is not None and gpu.runtime_gib is not None and gpu.fragmentation is not None,
    )


def _count_reduction_copies(elements: int, width: int, sharding: Sharding) -> int:
    """Return the bytes of the copies of a gradient while it is reduced (coalesced_collectives.py, reduce_scatter_coalesced).

    One copy is in the type in which ranks sum, if that is wider. Another copy is padded, if the ranks do not divide the elements.
    """
    copies = int(sharding.reduced_width != width) + int(elements % sharding.world_size != 0)
    return copies * sharding.reduced_width * elements


def _make_stage(name: str, activations: float, gathered: float, gradients: float, temporary: float) -> StageMemory:
    return StageMemory(
        name=name,
        activations_gib=_to_gib(activations),
        gathered_gib=_to_gib(gathered),
        gradients_gib=_to_gib(gradients),
        temporary_gib=_to_gib(temporary),
    )


def _to_gib(num_bytes: float) -> float:
    return round(num_bytes / GIB, 4)
