"""Predicted time of a training step, to compare combinations of settings with each other. Pure.

The sum of four parts, of which some overlap:

    products       6 FLOPs for each weight and token, 2 more for a recomputed layer, at the GPU's gemm_share of its peak; those in
                   FP8 at a share of the peak of FP8 (fp8.py beside this file)
    attention      pairs of queries and keys within documents, or of whole rows where the kernel computes all, at ATTENTION_SHARE
    communication  weights gathered twice, and gradients reduced once, for each micro-batch (arXiv:1910.02054, section 7), each
                   in the type of its transfer
    hooks          DeepSpeed's Python around each module, which the GPU waits for where a micro-batch is small

and the optimizer step once. All rates are assumptions until benchmarks/gpu.py measures a GPU, whose row in
launcher/plan/gpu_types.py then has its gemm_share; they order combinations, and a run on GPUs compares its speed with them. The
range that a plan shows as its speed rests on published or measured MFU instead (launcher/plan/throughput.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema import DeepSpeedSection
from launcher.plan.architecture import TrainFlops
from launcher.plan.deepspeed import TransferWidths
from launcher.plan.gpu_types import GpuType
from launcher.plan.launch_plan import Batch, ModelFacts, Topology
from launcher.plan.sizing.activations import FLASH_KERNELS, Kernels
from launcher.plan.sizing.fp8 import fp8_share, fp8_speed

# The share of the peak that products reach, where no GPU of the type was measured, and the factor by which Liger raises it.
GEMM_SHARE, LIGER_FACTOR = 0.48, 0.54 / 0.48
ATTENTION_SHARE = 0.40
# Tokens of a micro-batch with which the products reach half of their share of the peak.
HALF_TOKENS = 512
# Bytes per second of one GPU to the others of its node, of a node to the others, and between a GPU and main memory.
NVLINK, PCIE, NETWORK = 250e9, 20e9, 50e9
# GPUs with less memory are cards without NVLink.
_NVLINK_FROM_GIB = 39.0
# The share of the products' time during which communication is hidden.
OVERLAP = 0.7
# One module's hooks in one pass, and modules of a layer.
HOOK_S, MODULES_OF_LAYER = 60e-6, 13
# Bytes per second in which a GPU steps the optimizer, and a node's CPUs do; bytes that a step moves for a parameter.
GPU_MEMORY, HOST_MEMORY, STEP_BYTES = 1.5e12, 100e9, 34


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part; `total_s` counts communication as far as it is not hidden."""

    products_s: float
    attention_s: float
    communication_s: float
    hooks_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        computing = max(self.products_s + self.attention_s, self.hooks_s)
        return computing + max(0.0, self.communication_s - OVERLAP * computing) + self.optimizer_s


def predict_step(
    model: ModelFacts,
    flops: TrainFlops,
    doc_tokens: int,
    batch: Batch,
    topology: Topology,
    deepspeed: DeepSpeedSection,
    hpz_ranks: int,
    widths: TransferWidths,
    kernels: Kernels,
    recomputed_share: float,
    gpu: GpuType,
) -> StepTime:
    """Predict one step; `doc_tokens` is the usual length of a document, `recomputed_share` the share of layers that recompute."""
    peak = gpu.peak_tflops({2: "bf16", 4: "tf32"}[kernels.width]) or gpu.bf16
    tokens = batch.micro_batch_size * kernels.row_tokens
    again = 1 + recomputed_share / 3
    in_layers = flops.per_token * again
    if kernels.fp8:
        converted = fp8_share(model, flops.per_token / 6)
        in_layers *= 1 - converted + converted / fp8_speed(gpu, kernels)
    # Those of FP8 as the FLOPs that bf16 would compute in their time.
    products = tokens * (in_layers + flops.per_label)
    length = doc_tokens if kernels.attention in FLASH_KERNELS else kernels.row_tokens
    pairs = (flops.of([length], 0) - flops.per_token * length) / length * tokens * again
    if kernels.attention not in FLASH_KERNELS:
        pairs *= 2
    share = GEMM_SHARE if gpu.gemm_share is None else gpu.gemm_share
    gemm = share * (LIGER_FACTOR if kernels.liger else 1.0) * tokens / (tokens + HALF_TOKENS)
    passes = 2 + recomputed_share
    micro_batches = batch.accumulation
    communication_s = _communication_s(model.num_params, widths, topology, hpz_ranks, gpu)
    if deepspeed.offload_params != "none":
        communication_s += 2 * kernels.width * model.num_params / topology.world_size / PCIE
    return StepTime(
        products_s=micro_batches * products / (gemm * peak * 1e12),
        attention_s=micro_batches * pairs / (ATTENTION_SHARE * peak * 1e12),
        communication_s=micro_batches * communication_s,
        hooks_s=micro_batches * passes * model.num_layers * MODULES_OF_LAYER * HOOK_S,
        optimizer_s=_optimizer_s(model.num_params, topology, deepspeed),
    )


def _communication_s(num_params: int, widths: TransferWidths, topology: Topology, hpz_ranks: int, gpu: GpuType) -> float:
    """Return the seconds of one micro-batch: each of three transfers takes as long as its slowest link."""
    inside = NVLINK if gpu.memory_gib >= _NVLINK_FROM_GIB else PCIE
    ranks, nodes = topology.ranks_per_node, topology.nodes
    # Of one byte for each parameter.
    in_node_s = num_params * (ranks - 1) / ranks / inside
    slowest_s = max(in_node_s, num_params * (nodes - 1) / nodes / NETWORK)
    # With a second copy inside each node, the backward pass gathers there.
    again_s = in_node_s if hpz_ranks > 1 else slowest_s
    return widths.weight * (slowest_s + again_s) + widths.gradient * slowest_s


def _optimizer_s(num_params: int, topology: Topology, deepspeed: DeepSpeedSection) -> float:
    per_rank = num_params / topology.world_size
    if deepspeed.offload_optimizer == "none":
        return STEP_BYTES * per_rank / GPU_MEMORY
    moved_s = 6 * per_rank / PCIE
    return moved_s + STEP_BYTES * per_rank * topology.ranks_per_node / HOST_MEMORY
