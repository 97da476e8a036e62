"""The raw DeepSpeed keys that `deepspeed.extra` may contain, and why other keys are refused. Pure.

The tables cover every top-level key of DeepSpeed 0.19.8; tests/config/test_deepspeed_keys.py compares them with the installed
version. DeepSpeed itself checks the names inside a section (launcher/worker/checks/deepspeed_check.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

from launcher.config.error_messages import shown
from launcher.config.origin import Origins
from launcher.errors import Problem, did_you_mean

EXTRA = "deepspeed.extra"
KEYS_PAGE = "https://www.deepspeed.ai/docs/config-json"

# Keys that tune communication or reports; they change neither the training nor the numbers of the plan.
VALUES = frozenset(
    {
        "communication_data_type",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "log_level",
        "memory_breakdown",
        "vocabulary_size",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
SECTIONS = frozenset(
    {
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "csv_monitor",
        "flops_profiler",
        "fp16",
        "tensorboard",
        "zero_optimization",
        "zero_optimization.leaf_module",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
    }
)

# The launcher sets these keys from its own settings: another value would make the run differ from its plan.
SET_BY: Mapping[str, str] = {
    "activation_checkpointing": "model.activation_checkpointing",
    "bf16.enabled": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16.enabled": "model.dtype",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "steps_per_print": "train.log_every",
    "torch_autocast": "model.dtype",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "wandb": "tracking.kind",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_params",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_param.device": "deepspeed.offload_params",
    "zero_optimization.offload_param.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.param_persistence_threshold": "deepspeed.param_persistence_threshold",
    "zero_optimization.prefetch_bucket_size": "deepspeed.prefetch_bucket_size",
    "zero_optimization.reduce_bucket_size": "deepspeed.reduce_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "deepspeed.param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size": "deepspeed.prefetch_bucket_size",
    "zero_optimization.zero_hpz_partition_size": "deepspeed.hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "deepspeed.quantized_weights",
}

_REMOVED = "DeepSpeed has removed this feature"
_CHECKPOINTS = "the launcher writes and reads checkpoints itself"
_DATA = "the launcher chooses the rows of each step itself"
_PARALLEL = "every rank holds its own rows and a partition of all weights; other kinds of parallelism are not supported"
_FP32_STATES = "the memory plan and checkpoints rely on fp32 weights, gradients and moments in the optimizer"
_MEAN = "ZeRO stage 3 with reduce-scatter averages gradients in one way only"
_WHOLE_STATES = "the memory plan and checkpoints rely on all states being where deepspeed.offload_optimizer puts them"
_SIZED_BUFFERS = "the plan sizes the buffers for weights on NVMe"
_WRONG_SUMS = (
    "DeepSpeed 0.19.8 sums quantized gradients (qgZ) wrongly: it divides by the number of nodes instead of ranks, and reads bf16 "
    "as fp16, so that a run trains on wrong gradients without an error"
)
_NO_PIPELINE = "checkpoints of states on NVMe are not tested with pipelined transfers"
REFUSED: Mapping[str, str] = {
    "aio.use_gds": "its buffers are in GPU memory, which the memory plan does not count",
    "amp": _REMOVED,
    "autotuning": "it starts runs of its own",
    "bf16.bf16_master_weights_and_grads": _FP32_STATES,
    "bf16.bf16_optimizer_states": _FP32_STATES,
    "bf16.check_grad_overflow": "the launcher relies on DeepSpeed skipping steps with gradients that are not finite",
    "checkpoint": _CHECKPOINTS,
    "compile": "the launcher does not compile DeepSpeed's engine",
    "compression_training": _REMOVED,
    "curriculum_learning": _REMOVED,
    "data_efficiency": _DATA,
    "data_parallel_size": _PARALLEL,
    "data_types": "the memory plan counts gradients in the types that it sets itself",
    "dataloader_drop_last": _DATA,
    "datastates_ckpt": _CHECKPOINTS,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "expert_parallel": _PARALLEL,
    "fp16.auto_cast": "the model casts its inputs itself",
    "fp16.fp16_master_weights_and_grads": _FP32_STATES,
    "gradient_allreduce_op": _MEAN,
    "gradient_predivide_factor": _MEAN,
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "it serves text generation between steps, which the launcher does not do",
    "managed_gradient_accumulation": "the launcher leaves accumulation to DeepSpeed",
    "nebula": _REMOVED,
    "pipeline": _PARALLEL,
    "prescale_gradients": _MEAN,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "tensor_parallel": _PARALLEL,
    "timers": "the launcher measures throughput itself; DeepSpeed's timer waits for the GPU in each micro-batch",
    "use_data_before_expert_parallelism": _PARALLEL,
    "weight_quantization": "it trains weights that were rounded, and the export would not say so",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed has replaced it with offload_optimizer.pin_memory",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _WHOLE_STATES,
    "zero_optimization.offload_optimizer.pipeline_read": _NO_PIPELINE,
    "zero_optimization.offload_optimizer.pipeline_write": _NO_PIPELINE,
    "zero_optimization.offload_optimizer.ratio": _WHOLE_STATES,
    "zero_optimization.offload_optimizer.super_offload": _WHOLE_STATES,
    "zero_optimization.offload_param.buffer_size": _SIZED_BUFFERS,
    "zero_optimization.offload_param.max_in_cpu": _SIZED_BUFFERS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage": "only ZeRO stage 3 is supported",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.zenflow": _WHOLE_STATES,
    "zero_optimization.zero_quantized_gradients": _WRONG_SUMS,
    "zero_optimization.zeropp_loco_param": _REMOVED,
}

# Keys that the plan chooses for states on NVMe, by the setting that puts the states there.
_SET_FOR_NVME: Mapping[str, str] = {
    "zero_optimization.sub_group_size": "offload_optimizer",
    "zero_optimization.max_live_parameters": "offload_params",
    "zero_optimization.max_reuse_distance": "offload_params",
    "zero_optimization.stage3_max_live_parameters": "offload_params",
    "zero_optimization.stage3_max_reuse_distance": "offload_params",
}
_OFFLOAD = {"zero_optimization.offload_optimizer": "offload_optimizer", "zero_optimization.offload_param": "offload_params"}


class _Refusal(NamedTuple):
    """A dotted key of `deepspeed.extra` with its value, the reason to refuse it, and the remedy."""

    key: str
    value: Any
    message: str
    remedy: str = "remove it"


def top_level_keys() -> set[str]:
    """Return every top-level key of the tables."""
    return {key for key in (*VALUES, *SECTIONS, *SET_BY, *REFUSED) if "." not in key}


def extra_problems(values: Mapping[str, Any], origins: Origins, skip: Set[str] = frozenset()) -> Iterator[Problem]:
    """Yield the problems of `deepspeed.extra` in composed, unvalidated settings; `skip` has the keys that are already reported.

    The schema reports keys that are not text and sections that are not mappings.
    """
    deepspeed, model = _mapping(values.get("deepspeed")), _mapping(values.get("model"))
    for name, value in _mapping(deepspeed.get("extra")).items():
        for refusal in _refusals(name, value, deepspeed, model) if isinstance(name, str) else ():
            key = f"{EXTRA}.{refusal.key}"
            if key not in skip:
                text = "" if isinstance(refusal.value, dict | list) else shown(key, refusal.value)
                yield Problem(f"{key}: {refusal.message}", origins.of(key), text, refusal.remedy)


def _refusals(name: str, value: Any, deepspeed: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[_Refusal]:
    """Yield the refusals of a top-level key and of the keys inside it."""
    if name in top_level_keys():
        yield from _inside(name, value, deepspeed, model)
        return
    guess = did_you_mean(name, sorted(top_level_keys()))
    remedy = guess or f"{KEYS_PAGE} lists DeepSpeed's keys"
    yield _Refusal(name, value, "DeepSpeed has no such key", remedy)


def _inside(key: str, value: Any, deepspeed: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[_Refusal]:
    if _agrees(key, value, model):
        return
    if key in SET_BY:
        # The offloads have DeepSpeed's own values.
        setting = f"{SET_BY[key]}={value}" if key.endswith(".device") and isinstance(value, str) else SET_BY[key]
        yield _Refusal(key, value, f"the launcher sets this from {SET_BY[key]}", f"remove it, and set {setting}")
    elif key in REFUSED:
        yield _Refusal(key, value, REFUSED[key])
    elif key in _SET_FOR_NVME and deepspeed.get(_SET_FOR_NVME[key]) == "nvme":
        yield _Refusal(key, value, f"the plan sets this with deepspeed.{_SET_FOR_NVME[key]}=nvme")
    elif value == "auto":
        reason = "only Hugging Face's Trainer fills in auto"
        yield _Refusal(key, value, reason, "write the value, or remove it")
    elif key in SECTIONS and not isinstance(value, dict):
        yield _Refusal(key, value, "is not a mapping", "write its keys one by one")
    elif isinstance(value, dict):
        refusals = [refusal for name in value for refusal in _inside(f"{key}.{name}", value[name], deepspeed, model)]
        yield from refusals or _without_effect(key, value, deepspeed, model)


def _agrees(key: str, value: Any, model: Mapping[str, Any]) -> bool:
    """Return whether a key repeats the value that the launcher sets, as a complete DeepSpeed file does."""
    if key == "zero_optimization.stage":
        return value == 3
    return value is True and key == f"{model.get('dtype', 'bf16')}.enabled"


def _without_effect(key: str, value: Any, deepspeed: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[_Refusal]:
    """Yield a refusal for a section that another setting turns off."""
    dtype = model.get("dtype", "bf16")
    if key in ("bf16", "fp16") and key != ("bf16" if dtype == "auto" else dtype):
        yield _Refusal(key, value, f"has no effect with model.dtype={dtype}", f"set model.dtype={key}, or remove it")
    if key in _OFFLOAD and deepspeed.get(_OFFLOAD[key], "none") == "none":
        setting = f"deepspeed.{_OFFLOAD[key]}"
        yield _Refusal(key, value, f"has no effect with {setting}=none", f"set {setting} to cpu or nvme, or remove it")


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}
