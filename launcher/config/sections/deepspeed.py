"""The section for DeepSpeed, and the raw keys that it accepts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from launcher.config.sections.fields import Flag, PositiveInt, Section, Text

# The raw DeepSpeed keys that deepspeed.extra may contain; a name stands for the key with everything below it. They tune
# communication or report; none changes what is trained, or a number that the plan computes. DeepSpeed judges their values
# (launcher/worker/checks/deepspeed_check.py).
ALLOWED_EXTRA = (
    *("communication_data_type", "comms_logger", "csv_monitor", "disable_allgather", "dump_state", "flops_profiler"),
    *("memory_breakdown", "tensorboard", "wall_clock_breakdown"),
    *(f"aio.{name}" for name in ("block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit")),
    *(f"fp16.{name}" for name in ("hysteresis", "consecutive_hysteresis", "initial_scale_power", "loss_scale")),
    *(f"fp16.{name}" for name in ("loss_scale_window", "min_loss_scale")),
    *(f"zero_optimization.{name}" for name in ("contiguous_gradients", "ignore_unused_parameters", "leaf_module")),
    *(f"zero_optimization.{name}" for name in ("memory_efficient_linear", "overlap_comm", "reduce_scatter")),
    *(f"zero_optimization.{name}" for name in ("reduce_bucket_size", "round_robin_gradients", "sub_group_size")),
    *(f"zero_optimization.stage3_{name}" for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")),
    *(f"zero_optimization.stage3_{name}" for name in ("module_granularity_threshold", "param_persistence_threshold")),
    *("zero_optimization.stage3_use_all_reduce_for_fetch_params", "zero_optimization.use_multi_rank_bucket_allreduce"),
    *(f"zero_optimization.offload_optimizer.{name}" for name in ("buffer_count", "fast_init", "pin_memory")),
    *(f"zero_optimization.offload_param.{name}" for name in ("buffer_count", "pin_memory")),
)
QGZ, QGZ_IS_WRONG = (
    "zero_optimization.zero_quantized_gradients",
    "DeepSpeed 0.19.8 sums quantized gradients (qgZ) wrongly: it divides by the number of nodes instead of ranks, and reads bf16 "
    "as fp16, so that a run trains on wrong gradients without an error",
)
# Numbers of elements in DeepSpeed's section zero_optimization that the memory plan counts with, and those of them that the plan
# sets for weights on NVMe.
_KEPT_AHEAD = {"stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"}
_COUNTED = {"reduce_bucket_size", "sub_group_size", "stage3_param_persistence_threshold", *_KEPT_AHEAD}


class DeepSpeedSection(Section):
    """DeepSpeed ZeRO stage 3: where its states are stored, and how it communicates."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where optimizer states and fp32 weights are stored."
    )
    offload_params: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where partitioned weights are stored between uses."
    )
    nvme_path: Text | None = Field(
        None,
        description=(
            "Folder on a local NVMe disk, with the same path on every node; required for nvme. Each run uses its own folder in "
            "it."
        ),
    )
    hpz_partition_size: PositiveInt | Literal["node"] = Field(
        1,
        description=(
            "ZeRO++ hpZ: number of ranks that share a second copy of the weights; node: the ranks of one node; 1 turns it off."
        ),
    )
    quantized_weights: Flag = Field(False, description="ZeRO++ qwZ: gather weights in int8 (lossy).")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Raw DeepSpeed keys that tune communication or report, merged last. Keys that the plan or another setting "
            "decides are refused."
        ),
    )

    @model_validator(mode="after")
    def _consistent(self) -> DeepSpeedSection:
        if "nvme" in (self.offload_optimizer, self.offload_params) and not self.nvme_path:
            nvme_settings = [f"deepspeed.{k}" for k in ("offload_optimizer", "offload_params") if getattr(self, k) == "nvme"]
            raise ValueError(
                f"{' and '.join(nvme_settings)}: nvme needs a folder; set deepspeed.nvme_path to a folder on a local disk"
            )
        if self.nvme_path and not self.nvme_path.startswith("/"):
            raise ValueError("deepspeed.nvme_path: must be an absolute path, because every node uses it; begin it with /")
        zero = self.extra.get("zero_optimization")
        for key, value in zero.items() if isinstance(zero, dict) else ():
            if key in _COUNTED and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1):
                raise ValueError(f"deepspeed.extra.zero_optimization.{key}: must be a number of elements, 0 or more")
            if key in _KEPT_AHEAD and self.offload_params == "nvme":
                raise ValueError(f"deepspeed.extra.zero_optimization.{key}: DeepSpeed cannot keep weights from NVMe; remove it")
        return self
