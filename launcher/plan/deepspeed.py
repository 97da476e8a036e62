"""The ZeRO-3 JSON, sized to the model.

The gradient bucket and the persistence threshold follow the rules of Hugging Face's integration for `auto` (hidden size squared,
ten times the hidden size). A floor keeps small models from sending thousands of small messages. One layer is prefetched, and
weights may stay until the next two and a half layers have been gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config.sections.model import ModelSection
from launcher.config.sections.train import DeepSpeedSection, TrainSection
from launcher.plan.architecture import experts_of
from launcher.plan.launch_plan import Batch, ModelFacts, Topology
from launcher.plan.optimizers import Optimizer
from launcher.plan.sizing.memory import NVME_SUB_GROUP, layer_elements, max_parameter_elements, num_hpz_ranks, num_nvme_buffers

# Below this many elements, a message costs more in latency than in transfer.
_SMALLEST_BUCKET = 2**24
# Weights that may be gathered at a time: DeepSpeed's default, or this many layers of a large model.
_LIVE_ELEMENTS, _LIVE_LAYERS = 1_000_000_000, 2.5
# From this many ranks, gradients are summed in fp32, because each addition in bf16 rounds to 8 bits.
_WIDE_SUM_FROM_RANKS = 65
# DeepSpeed's default for offload_optimizer.buffer_count, for optimizer states on NVMe.
_DEFAULT_NVME_BUFFERS = 4
# If a weight on NVMe is used twice in quick succession, as between forward and backward, DeepSpeed prefetches it twice and fails
# (partitioned_param_coordinator.py, __prefetch_nvme_param_partitions). Weights that it keeps for later occupy its few buffers. So
# weights on NVMe are fetched when they are used, and released right after.
_NO_PREFETCH = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}

# Bytes per element.
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}


def gathered_width(rendered: Mapping[str, Any], dtype: str) -> int:
    """Return the bytes per element of a weight on its way to other ranks: int8 if quantized (ZeRO++, arXiv:2306.10209)."""
    return 1 if rendered["zero_optimization"].get("zero_quantized_weights", False) else WIDTHS[dtype]


def reduced_width(rendered: Mapping[str, Any], dtype: str) -> int:
    """Return the bytes per element of the type in which ranks sum gradients."""
    return WIDTHS.get(rendered.get("communication_data_type", dtype), WIDTHS[dtype])


def render(
    deepspeed: DeepSpeedSection,
    model: ModelSection,
    train: TrainSection,
    batch: Batch,
    topology: Topology,
    facts: ModelFacts,
    optimizer: Optimizer,
    nvme_folder: str | None,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration as a JSON-able mapping; `deepspeed.extra` is merged last.

    `nvme_folder` is this run's folder on each node's NVMe disk, if it uses one. DeepSpeed names its files only by rank.
    """
    hidden, layer = facts.hidden_size, layer_elements(facts)
    # Two and a half layers of experts would take the memory that activations need.
    live = _LIVE_ELEMENTS if experts_of(facts.config) else max(_LIVE_ELEMENTS, int(_LIVE_LAYERS * layer))
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": NVME_SUB_GROUP if deepspeed.offload_optimizer == "nvme" else 1_000_000_000,
        "reduce_bucket_size": max(hidden * hidden, _SMALLEST_BUCKET),
        "stage3_prefetch_bucket_size": max(layer, _SMALLEST_BUCKET),
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = _describe_offload(deepspeed.offload_optimizer, nvme_folder)
    if deepspeed.offload_optimizer == "nvme" and num_nvme_buffers(optimizer) > _DEFAULT_NVME_BUFFERS:
        zero["offload_optimizer"]["buffer_count"] = num_nvme_buffers(optimizer)
    if deepspeed.offload_params != "none":
        zero["offload_param"] = _describe_offload(deepspeed.offload_params, nvme_folder)
    if deepspeed.offload_params == "nvme":
        zero["offload_param"] |= {"max_in_cpu": 0, "buffer_size": -(-max_parameter_elements(facts) // topology.world_size)}
        zero |= _NO_PREFETCH
    hpz = num_hpz_ranks(deepspeed, topology.ranks_per_node)
    if hpz > 1:
        zero["zero_hpz_partition_size"] = hpz
    if deepspeed.quantized_weights:
        zero["zero_quantized_weights"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.grad_clip,
        "steps_per_print": 2**31 - 1,
        # DeepSpeed's timers would wait twice per micro-batch for the GPU, and so for the copies of an in-flight save.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }
    if not optimizer.is_known_to_deepspeed:
        config["zero_allow_untested_optimizer"] = True
    if model.dtype != "fp32":
        config[model.dtype] = {"enabled": True}
        if topology.world_size >= _WIDE_SUM_FROM_RANKS:
            config["communication_data_type"] = "fp32"
        if batch.accumulation > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge_keys(config, deepspeed.extra)


def _describe_offload(device: str, nvme_folder: str | None) -> dict[str, Any]:
    offload: dict[str, Any] = {"device": device, "pin_memory": True}
    if device == "nvme":
        offload["nvme_path"] = nvme_folder
    return offload


def merge_keys(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        below = merged.get(key)
        merged[key] = merge_keys(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
