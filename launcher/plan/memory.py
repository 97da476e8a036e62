"""Model-state memory under ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054) and the size of a checkpoint.

launcher/plan/sizing/peak_memory.py adds activations, gathered weights, buffers and fragmentation.
"""

from __future__ import annotations

from launcher.config.sections.deepspeed import DeepSpeedSection
from launcher.plan.architecture.layers import largest_weight
from launcher.plan.launch_plan import Memory, ModelFacts, Saving, Topology
from launcher.plan.optimizers import FP32_BYTES, Optimizer

GIB = 2**30
# From this many parameters, all layers of a model recompute their activations if the memory of the GPUs is unknown.
RECOMPUTED_FROM = 2_000_000_000
# Elements of optimizer states on NVMe that are in memory at a time: one buffer each for weights, gradients and every state.
NVME_SUB_GROUP = 100_000_000
# The rest is for the data loader, the libraries, and the page cache that checkpoints are written through.
_USABLE_HOST_SHARE = 0.8


def num_hpz_ranks(deepspeed: DeepSpeedSection, ranks_per_node: int) -> int:
    """Return the number of ranks that share a second copy of the weights; 1 means that there is no second copy."""
    return ranks_per_node if deepspeed.hpz_partition_size == "node" else int(deepspeed.hpz_partition_size)


def max_parameter_elements(facts: ModelFacts) -> int:
    """Return the number of elements of the largest parameter: the embedding, or a weight of a layer."""
    return max(facts.vocab_size * facts.hidden_size, largest_weight(facts))


def layer_elements(facts: ModelFacts) -> int:
    """Return the elements of a decoder layer, averaged if only some layers have experts."""
    embeddings = facts.vocab_size * facts.hidden_size * (1 if facts.tie_word_embeddings else 2)
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
    on_device = {
        "weights": weights if deepspeed.offload_params == "none" else 0.0,
        "gradients": gradients if deepspeed.offload_optimizer == "none" else 0.0,
        "optimizer": states if deepspeed.offload_optimizer == "none" else 0.0,
    }
    host = 0.0
    host += weights if deepspeed.offload_params == "cpu" else 0.0
    host += gradients + states if deepspeed.offload_optimizer == "cpu" else 0.0
    if deepspeed.offload_optimizer == "nvme":
        host += gradients + num_nvme_buffers(optimizer) * FP32_BYTES * min(per_rank, NVME_SUB_GROUP / GIB)
    if topology.device == "cpu":
        host = sum(on_device.values()) + host
    return Memory(
        weights_gib=round(weights, 3),
        gradients_gib=round(gradients, 3),
        optimizer_gib=round(states, 3),
        per_rank_gib=round(sum(on_device.values()), 3),
        host_per_node_gib=round(host * topology.ranks_per_node, 3),
        device_gib=device_gib,
    )


def plan_saving(
    num_params: int,
    asynchronous: bool,
    optimizer: Optimizer,
    deepspeed: DeepSpeedSection,
    memory: Memory,
    topology: Topology,
    host_gib: float | None,
) -> Saving:
    """Decide whether checkpoints are written in the background, which needs a copy of each rank's states in main memory.

    `host_gib` is the main memory of a node; None if unknown.
    """
    if not asynchronous:
        return Saving(background=False, host_gib_per_node=0.0)
    copies = checkpoint_bytes(num_params, optimizer) / topology.nodes / GIB
    if "nvme" in (deepspeed.offload_optimizer, deepspeed.offload_params):
        note = "states on NVMe cannot be read while training uses them, so training waits while a checkpoint is written"
        return Saving(background=False, host_gib_per_node=0.0, note=note)
    if host_gib is not None and memory.host_per_node_gib + copies > _USABLE_HOST_SHARE * host_gib:
        note = (
            f"training waits while a checkpoint is written: a copy of the states takes {copies:.1f} GiB of main memory per node, "
            f"which has {host_gib:.0f} GiB, of which the run uses {memory.host_per_node_gib:.1f} GiB"
        )
        return Saving(background=False, host_gib_per_node=0.0, note=note)
    return Saving(background=True, host_gib_per_node=round(copies, 3))


def checkpoint_bytes(num_params: int, optimizer: Optimizer) -> int:
    """Return the bytes of one checkpoint over all ranks: fp32 weights and optimizer states."""
    return num_params * optimizer.bytes_per_param
