"""Predicted time of a training step, for comparing combinations of settings. Pure.

It is the sum of six parts, some of which overlap:

    products       6 FLOPs per weight and token, 2 more in a recomputed layer, at the device's rate of products; products in
                   FP8 have their own rate (fp8.py in this folder)
    attention      pairs of queries and keys within documents, or within whole rows if the kernel computes all pairs
    elementwise    bytes that all other operations read and write (elementwise.py)
    communication  per micro-batch: weights gathered for the forward pass, and again for the backward pass if they did not stay;
                   gradients reduced once (arXiv:1910.02054, section 7), each in its transfer type; copies of both
    hooks          Python: that of each module, and DeepSpeed's around it, or around each layer that is gathered as a whole
    optimizer      the bytes of its states, once per step

Rates holds what a device computes and moves per second. The rates of GPUs are data sheet figures times the shares assumed here,
until benchmarks/gpu.py measures a GPU; its row in launcher/plan/gpu_types.py then has its gemm_share.
benchmarks/predicted_speed.py measures the rates of CPUs and compares predictions with runs. The speed range that a plan shows is
based on published or measured MFU instead (launcher/plan/throughput.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.plan.architecture.flops import TrainFlops
from launcher.plan.deepspeed import TransferWidths
from launcher.plan.gpu_types import GpuType
from launcher.plan.launch_plan import Batch, ModelFacts, Topology
from launcher.plan.sizing import elementwise
from launcher.plan.sizing.activations import FLASH_KERNELS, FP32, Kernels
from launcher.plan.sizing.fp8 import fp8_share, fp8_speed
from launcher.plan.sizing.peak_memory import Pass

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
HOST_MEMORY, STEP_BYTES = 100e9, 34
# Memory bandwidth of a GPU whose row has none: that of an H100, per FLOP.
_MEMORY_BYTES_PER_FLOP = 3.35 / 989


@dataclass(frozen=True)
class Rates:
    """What a device does per second: FLOPs of products and attention, bytes through its memory and over links.

    `memory` is the rate of elementwise operations, `copies` that of weights and gradients, `states` that of the optimizer.
    `between_nodes` is the rate of a node for all its ranks; `host_link` and `host_memory` count with offload. A reduction takes
    as long as a transfer of `reduce_factor` times its bytes. `half_tokens` lowers the rate of products in small micro-batches.
    Communication is hidden during the share `overlap` of computing. A device that `runs_ahead` computes while Python is in a
    module's hooks. Products in FP8 are `fp8_speed` times as fast as other products.
    """

    products: float
    attention: float
    memory: float
    copies: float
    states: float
    in_node: float
    between_nodes: float = NETWORK
    host_link: float = PCIE
    host_memory: float = HOST_MEMORY
    reduce_factor: float = 1.0
    half_tokens: float = HALF_TOKENS
    overlap: float = OVERLAP
    hook_s: float = HOOK_S
    dispatch_s: float = DISPATCH_S
    runs_ahead: bool = True
    fp8_speed: float = 1.0


def gpu_rates(gpu: GpuType, kernels: Kernels) -> Rates:
    """Return the rates of a GPU for these kernels; values that were not measured are assumed."""
    # In fp32 ranks do not round to TF32.
    peak = (gpu.peak_tflops({2: "bf16", 4: "fp32"}[kernels.width]) or gpu.bf16) * 1e12
    bandwidth = gpu.memory_tbs * 1e12 if gpu.memory_tbs is not None else gpu.bf16 * 1e12 * _MEMORY_BYTES_PER_FLOP
    memory = MEMORY_SHARE * bandwidth
    return Rates(
        products=(GEMM_SHARE if gpu.gemm_share is None else gpu.gemm_share) * peak,
        attention=ATTENTION_SHARE * peak,
        memory=memory,
        copies=memory,
        states=memory,
        in_node=NVLINK if gpu.memory_gib >= _NVLINK_FROM_GIB else PCIE,
        fp8_speed=fp8_speed(gpu, kernels),
    )


@dataclass(frozen=True)
class Documents:
    """The contents of rows: the usual document length in tokens, and the share of trained tokens."""

    tokens: int
    trained_share: float = 1.0


@dataclass(frozen=True)
class Transfers:
    """How ZeRO-3 moves weights and gradients: bytes per transfer, ranks with a second copy of the weights, and offload.

    Weights that are used again within `reuse_elements` stay. `accumulated_width` is the bytes per element of an accumulated
    gradient. With `whole_layers`, hooks are around layers.
    """

    widths: TransferWidths
    hpz_ranks: int
    reuse_elements: int
    accumulated_width: int
    whole_layers: bool = False
    offload_optimizer: str = "none"
    offload_params: str = "none"


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
    flops: TrainFlops,
    documents: Documents,
    batch: Batch,
    topology: Topology,
    transfers: Transfers,
    one_pass: Pass,
    rates: Rates,
) -> StepTime:
    """Predict the time of one step of `batch.accumulation` passes."""
    tokens, kernels = one_pass.tokens, one_pass.kernels
    recomputed_share = sum(one_pass.checkpointed) / max(1, len(one_pass.checkpointed))
    again = 1 + recomputed_share / 3
    trained = tokens * documents.trained_share
    in_layers = flops.per_token * again
    if kernels.fp8:
        converted = fp8_share(model, flops.per_token / 6)
        in_layers *= 1 - converted + converted / rates.fp8_speed
    # Products in FP8 count as the FLOPs that bf16 would compute in the same time.
    products = tokens * in_layers + trained * flops.per_label
    length = documents.tokens if kernels.attention in FLASH_KERNELS else kernels.row_tokens
    pairs = (flops.of([length], 0) - flops.per_token * length) / length * tokens * again
    if kernels.attention not in FLASH_KERNELS:
        pairs *= 2
    moved = tokens * elementwise.bytes_of_layers(model, kernels, recomputed_share)
    moved += elementwise.bytes_of_loss(model, kernels.width, trained, one_pass.chunk_tokens)
    gathered = 1 if transfers.whole_layers else MODULES_OF_LAYER
    python_s = model.num_layers * (gathered * rates.hook_s + MODULES_OF_LAYER * rates.dispatch_s)
    passes, micro_batches = 2 + recomputed_share, batch.accumulation
    return StepTime(
        products_s=micro_batches * products / rates.products * (tokens + rates.half_tokens) / tokens,
        attention_s=micro_batches * pairs / rates.attention,
        elementwise_s=micro_batches * moved / rates.memory,
        communication_s=micro_batches * _communication_s(model.num_params, transfers, topology, kernels, passes, rates),
        hooks_s=micro_batches * passes * python_s,
        optimizer_s=_optimizer_s(model.num_params, topology, transfers, rates),
        overlap=rates.overlap,
        runs_ahead=rates.runs_ahead,
    )


def _communication_s(
    num_params: int, transfers: Transfers, topology: Topology, kernels: Kernels, passes: float, rates: Rates
) -> float:
    """Return the seconds of communication per micro-batch: each transfer takes as long as its slowest link."""
    ranks, nodes, world_size = topology.ranks_per_node, topology.nodes, topology.world_size
    # For one byte per parameter.
    in_node_s = num_params * (ranks - 1) / ranks / rates.in_node
    slowest_s = max(in_node_s, num_params * (nodes - 1) / nodes / rates.between_nodes)
    # With a second copy inside each node, the backward pass gathers within the node.
    again_s = in_node_s if transfers.hpz_ranks > 1 else slowest_s
    # Between its uses in the forward and backward pass, a weight is followed in each pass by all the weights behind it.
    gathered_again = max(0.0, 1 - transfers.reuse_elements / passes / num_params)
    weight, gradient = transfers.widths.weight, transfers.widths.gradient
    seconds = weight * (slowest_s + gathered_again * again_s) + rates.reduce_factor * gradient * slowest_s
    seconds += num_params * _copied_bytes(transfers, kernels.width, world_size, gathered_again) / rates.copies
    if transfers.offload_params != "none":
        seconds += 2 * kernels.width * num_params / world_size / rates.host_link
    return seconds


def _copied_bytes(transfers: Transfers, width: int, world_size: int, gathered_again: float) -> float:
    """Return the bytes per parameter that DeepSpeed's copies read and write in one micro-batch.

    Gathered weights go through a buffer (partition_parameters.py, AllGatherCoalescedHandle), unless one rank has all. Gradients
    are copied into a bucket, put in rank order and divided (coalesced_collectives.py), and added to the accumulated gradients.
    """
    weights = 2 * width * (1 + 1 / world_size) * (1 + gathered_again) if world_size > 1 else 0.0
    accumulated = width + (4 * FP32 if transfers.accumulated_width > width else width)
    return weights + 6 * width + accumulated / world_size


def _optimizer_s(num_params: int, topology: Topology, transfers: Transfers, rates: Rates) -> float:
    per_rank = num_params / topology.world_size
    if transfers.offload_optimizer == "none":
        return STEP_BYTES * per_rank / rates.states
    moved_s = 6 * per_rank / rates.host_link
    return moved_s + STEP_BYTES * per_rank * topology.ranks_per_node / rates.host_memory
