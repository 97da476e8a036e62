"""Predicted time of a training step, for comparing combinations of settings. Pure.

It is the sum of six parts, some of which overlap:

    products       6 FLOPs per weight and token, 2 more in a recomputed layer, at the device's rate of products
    attention      pairs of queries and keys within documents, or within whole rows if the kernel computes all pairs
    elementwise    bytes that all other operations read and write, at the rate of the memory
    communication  per micro-batch: weights gathered for the forward pass, and again for the backward pass if they did not stay;
                   gradients reduced once (arXiv:1910.02054, section 7), each in its transfer type; copies of both
    hooks          Python: that of each module, and DeepSpeed's around it, or around each layer that is gathered as a whole
    optimizer      the bytes of its states, once per step

The bytes of elementwise operations were counted in the layers of transformers 5.24, where each operation reads its inputs and
writes its output (tests/plan/test_step_time.py measures them with fake tensors). H is the hidden size, w the bytes per element, q
and k the widths of queries and keys, I the intermediate size, V the vocabulary:

    norm                (124 + 2w) H    about ten operations in fp32, most of them backward; 28H more if the weight is in fp32
    rotary embedding    23w (q + k)     halves negated and joined, two products and a sum
    MLP's gate          14w I           activation and product, and their gradients
    experts             14w I + 20w H   for each chosen one, whose tokens are gathered and added up
    sums                21w H           two residuals, and gradients of what several products read
    loss                40V             logits and their gradient in fp32, for each trained token
    head's weight       its gradient is filled, read and written for each chunk of tokens, in fp32 if there are several, and
                        scaled; a tied one is added to that of the embedding

Liger's kernels read and write each tensor once: 10w H, 4w (q + k) and 8w I. The fusions of torch's compiler are assumed to leave
COMPILED_SHARE. Neither is verified on a GPU.

Rates holds what a device computes and moves per second. The rates of GPUs are data sheet figures times the shares assumed here,
until benchmarks/gpu.py measures a GPU; its row in launcher/plan/gpu_types.py then has its gemm_share. A run compares the
prediction with its first steps. benchmarks/predicted_speed.py measures the rates of CPUs and compares predictions with runs. The
speed range that a plan shows is based on published or measured MFU instead (launcher/plan/throughput.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from launcher.plan.architecture import FP32_NORMS, attention_sizes, experts_by_layer, num_layer_norms, query_key_norms
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import GpuType
from launcher.plan.launch_plan import Batch, DataFacts, ModelFacts, Topology
from launcher.plan.sizing.layers import FLASH_KERNELS, FP32, Kernels
from launcher.plan.sizing.memory import Pass, Sharding

# Shares of the peak FLOP/s that products and attention reach, and of the memory bandwidth. With these shares, products of Llama
# 3.1 8B on an H100 run at 46% of the peak if elementwise operations are counted with them, and at 55% with Liger.
GEMM_SHARE, ATTENTION_SHARE, MEMORY_SHARE = 0.62, 0.40, 0.80
# Tokens per micro-batch with which products reach half of their rate.
HALF_TOKENS = 512
# Bytes per second from one GPU to the others of its node, from a node to the others, and between a GPU and main memory.
NVLINK, PCIE, NETWORK = 250e9, 20e9, 50e9
# GPUs with less memory are cards without NVLink.
_NVLINK_FROM_GIB = 39.0
# Share of the computing time during which communication is hidden.
OVERLAP = 0.7
# DeepSpeed's hooks around a module in one pass, the rest of its Python, and the number of modules per layer. The sum is an
# assumption; measurements on CPUs show that about half of it remains if layers are gathered as a whole.
HOOK_S, DISPATCH_S, MODULES_OF_LAYER = 30e-6, 30e-6, 13
# Bytes per second at which a node's CPUs step the optimizer; bytes that a step moves per parameter.
_HOST_MEMORY, _STEP_BYTES = 100e9, 34
# Memory bandwidth of a GPU whose row has none: that of an H100, per FLOP.
_MEMORY_BYTES_PER_FLOP = 3.35 / 989
# Share of a layer's bytes that its forward pass moves; a recomputed layer moves them again.
FORWARD_SHARE = 0.30
COMPILED_SHARE = 0.6
_LOGIT_BYTES = 40


@dataclass(frozen=True)
class Rates:
    """What a device does per second: FLOPs of products and attention, bytes through its memory and over links.

    `memory` is the rate of elementwise operations, `copies` that of weights and gradients, `states` that of the optimizer. A
    reduction takes as long as a transfer of `reduce_factor` times its bytes. `half_tokens` lowers the rate of products in small
    micro-batches. Communication is hidden during the share `overlap` of computing. A device that `runs_ahead` computes while
    Python is in a module's hooks.
    """

    products: float
    attention: float
    memory: float
    copies: float
    states: float
    in_node: float
    reduce_factor: float = 1.0
    half_tokens: float = HALF_TOKENS
    overlap: float = OVERLAP
    runs_ahead: bool = True


def gpu_rates(gpu: GpuType, kernels: Kernels) -> Rates:
    """Return the rates of a GPU for these kernels; values that were not measured are assumed."""
    # In fp32 ranks do not round to TF32.
    peak = (gpu.fp32 if kernels.width == FP32 else gpu.bf16) * 1e12
    bandwidth = gpu.memory_tbs * 1e12 if gpu.memory_tbs is not None else gpu.bf16 * 1e12 * _MEMORY_BYTES_PER_FLOP
    memory = MEMORY_SHARE * bandwidth
    return Rates(
        products=(GEMM_SHARE if gpu.gemm_share is None else gpu.gemm_share) * peak,
        attention=ATTENTION_SHARE * peak,
        memory=memory,
        copies=memory,
        states=memory,
        in_node=NVLINK if gpu.memory_gib >= _NVLINK_FROM_GIB else PCIE,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part; `total_s` counts communication and hooks only if computing does not hide them."""

    products_s: float
    attention_s: float
    elementwise_s: float
    communication_s: float
    hooks_s: float
    optimizer_s: float
    overlap: float
    runs_ahead: bool

    @property
    def total_s(self) -> float:
        computing = self.products_s + self.attention_s + self.elementwise_s
        computing = max(computing, self.hooks_s) if self.runs_ahead else computing + self.hooks_s
        return computing + max(0.0, self.communication_s - self.overlap * computing) + self.optimizer_s


def predict_step(
    model: ModelFacts,
    data: DataFacts | None,
    batch: Batch,
    topology: Topology,
    sharding: Sharding,
    one_pass: Pass,
    rates: Rates,
) -> StepTime | None:
    """Predict the time of one step of `batch.accumulation` passes over documents of mean length.

    Without data, a fully trained document fills a row. None for states on NVMe, and if the model's FLOPs are not known.
    """
    flops, offloads = train_flops(model), (sharding.offload_optimizer, sharding.offload_params)
    if flops is None or "nvme" in offloads:
        return None
    tokens, kernels, length, trained = one_pass.tokens, one_pass.kernels, one_pass.kernels.row_tokens, float(one_pass.tokens)
    width, num_params, nodes, world_size = kernels.width, model.num_params, topology.nodes, topology.world_size
    if data is not None and data.num_docs and data.num_tokens:
        trained *= data.num_trained_tokens / data.num_tokens
        if kernels.attention in FLASH_KERNELS:
            length = max(1, round(data.num_tokens / data.num_docs))
    recomputed_share = sum(one_pass.checkpointed) / max(1, len(one_pass.checkpointed))
    again, passes = 1 + recomputed_share / 3, 2 + recomputed_share
    products = tokens * flops.per_token * again + trained * flops.per_label
    pairs = (flops.of([length], 0) - flops.per_token * length) / length * tokens * again
    if kernels.attention not in FLASH_KERNELS:
        pairs *= 2
    moved = tokens * bytes_of_layers(model, kernels, recomputed_share)
    moved += bytes_of_loss(model, width, trained, one_pass.chunk_tokens)

    # Each transfer takes as long as its slowest link. For one byte per parameter:
    in_node_s = num_params * (topology.ranks_per_node - 1) / topology.ranks_per_node / rates.in_node
    slowest_s = max(in_node_s, num_params * (nodes - 1) / nodes / NETWORK)
    # With a second copy inside each node, the backward pass gathers within the node.
    again_s = in_node_s if sharding.hpz_ranks > 1 else slowest_s
    # Between its uses in the forward and backward pass, a weight is followed in each pass by all the weights behind it.
    gathered_again = max(0.0, 1 - sharding.zero["stage3_max_reuse_distance"] / passes / num_params)
    communication_s = sharding.gathered_width * (slowest_s + gathered_again * again_s)
    communication_s += rates.reduce_factor * sharding.reduced_width * slowest_s
    # Gathered weights are copied through a buffer (partition_parameters.py, AllGatherCoalescedHandle), unless one rank has all.
    # Gradients are copied into a bucket, put in rank order and divided (coalesced_collectives.py), and accumulated.
    copied = 2 * width * (1 + 1 / world_size) * (1 + gathered_again) if world_size > 1 else 0.0
    copied += 6 * width + (width + (4 * FP32 if sharding.gradient_width > width else width)) / world_size
    communication_s += num_params * copied / rates.copies
    if sharding.offload_params != "none":
        communication_s += 2 * width * num_params / world_size / PCIE

    python_s = (1 if sharding.whole_layers else MODULES_OF_LAYER) * HOOK_S + MODULES_OF_LAYER * DISPATCH_S
    per_rank = num_params / world_size
    optimizer_s = _STEP_BYTES * per_rank / rates.states
    if sharding.offload_optimizer != "none":
        optimizer_s = 6 * per_rank / PCIE + _STEP_BYTES * per_rank * topology.ranks_per_node / _HOST_MEMORY
    return StepTime(
        products_s=batch.accumulation * products / rates.products * (tokens + rates.half_tokens) / tokens,
        attention_s=batch.accumulation * pairs / rates.attention,
        elementwise_s=batch.accumulation * moved / rates.memory,
        communication_s=batch.accumulation * communication_s,
        hooks_s=batch.accumulation * passes * model.num_layers * python_s,
        optimizer_s=optimizer_s,
        overlap=rates.overlap,
        runs_ahead=rates.runs_ahead,
    )


def bytes_of_layers(model: ModelFacts, kernels: Kernels, recomputed_share: float) -> float:
    """Return the bytes per token that all layers move, excluding products and attention; some repeat their forward pass."""
    width, hidden, attention, total = kernels.width, model.hidden_size, attention_sizes(model), 0.0
    norm = 10 * width if kernels.liger else 124 + 2 * width + (28 if model.model_type in FP32_NORMS else 0)
    rotary, gate = (4, 8) if kernels.liger else (23, 14)
    normalized = attention.query + attention.key if query_key_norms(model) else sum(attention.latents)
    for experts, count in Counter(experts_by_layer(model)).items():
        moved = norm * (num_layer_norms(model) * hidden + normalized) + rotary * width * (attention.query + attention.key)
        moved += gate * width * (experts.shared_size if experts else model.intermediate_size) + 21 * width * hidden
        if experts:
            moved += experts.chosen * width * (14 * experts.size + 20 * hidden)
        total += count * (moved * (COMPILED_SHARE if kernels.compiled and not kernels.liger else 1.0))
    return total * (1 + FORWARD_SHARE * recomputed_share)


def bytes_of_loss(model: ModelFacts, width: int, trained_tokens: float, chunk_tokens: int) -> float:
    """Return the bytes that the loss moves excluding its products, with the logits of `chunk_tokens` at a time."""
    num_chunks = max(1, math.ceil(trained_tokens / chunk_tokens))
    of_weight = 2 * (FP32 if num_chunks > 1 else width) * num_chunks + 3 * width + (4 * width if model.tie_word_embeddings else 0)
    return model.vocab_size * (_LOGIT_BYTES * trained_tokens + of_weight * model.hidden_size)
