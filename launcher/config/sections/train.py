"""The sections for what training does: steps and batches, the optimizer, DeepSpeed, checkpoints, export."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from launcher.config.sections.fields import (
    Count,
    Flag,
    Fraction,
    HubId,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    SettingsSection,
    Text,
    Url,
)


class TrainSection(SettingsSection):
    """How long training lasts, and in which batches."""

    max_steps: PositiveInt | None = Field(None, description="Number of optimizer steps; set either this or train.epochs.")
    epochs: Positive | None = Field(None, description="Passes over the data; set either this or train.max_steps.")
    global_batch_size: PositiveInt = Field(64, description="Rows per optimizer step over all ranks.")
    micro_batch_size: PositiveInt | None = Field(
        None, description="Rows per rank in one forward pass. Unset: the plan chooses one that divides the batch."
    )
    grad_clip: NonNegative = Field(1.0, description="Maximum gradient norm; 0 turns clipping off.")
    largest_batch_first: Flag | None = Field(
        None,
        description="Before the first step, run the batch that needs most memory, without training on it. Unset: only on GPUs.",
    )
    proof: Flag = Field(
        False,
        description="Prove that the first step of each attempt agrees with references: losses, gradients, reduction, update.",
    )

    @model_validator(mode="after")
    def _require_one_length(self) -> TrainSection:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("neither train.max_steps nor train.epochs is set; set one of them")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("train.max_steps and train.epochs are both set; unset one of them with null")
        return self


class ObjectiveSection(SettingsSection):
    """The loss that training minimizes."""

    name: str = Field(
        "sft",
        description="The objective: sft (supervised fine-tuning), or another row of OBJECTIVES in launcher/plan/objectives.py.",
    )


class OptimSection(SettingsSection):
    """The optimizer and its learning-rate schedule."""

    name: str = Field("adamw", description="The optimizer: adamw, or another row of OPTIMIZERS in launcher/plan/optimizers.py.")
    lr: Positive = Field(1e-5, description="Peak learning rate.")
    weight_decay: NonNegative = Field(
        0.0, description="Decoupled weight decay; not applied to norms, biases and other one-dimensional weights."
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="Decay rates of the two moments.")
    eps: Positive = Field(1e-8, description="Added to the denominator, for numerical stability.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="Shape after the warm-up; wsd is warm-up, stable, decay."
    )
    warmup_steps: Count = Field(0, description="Steps over which the learning rate rises linearly from zero.")
    min_lr_ratio: Fraction = Field(
        0.1, description="Learning rate at the last step, as a share of optim.lr (cosine, linear, wsd)."
    )
    decay_fraction: Fraction = Field(0.2, description="Share of all steps used for the final decay (wsd).")

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if max(value) >= 1:
            raise ValueError("each must be below 1; 0.9 and 0.95 are usual")
        return value


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


class DeepSpeedSection(SettingsSection):
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
    def _check_storage_and_extra(self) -> DeepSpeedSection:
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


class CheckpointSection(SettingsSection):
    """When checkpoints are written, which are kept, and where copies go."""

    save_every: Count = Field(0, description="Steps between checkpoints; 0: only at the end and when stopped.")
    keep_last: PositiveInt = Field(2, description="Number of newest committed checkpoints to keep; older ones are removed.")
    keep_every: Count = Field(0, description="Checkpoints at multiples of this many steps are never removed; 0: none.")
    keep_best: Count = Field(
        0, description="Number of checkpoints with the lowest loss to keep in addition; only evaluated steps count."
    )
    best_set: Name = Field("held_out", description="Evaluation set whose loss decides which checkpoints are best.")
    async_save: Flag = Field(
        True,
        description=(
            "Write checkpoints in the background, from a copy in main memory, while training continues. false: training waits "
            "until they are written; no copy is made."
        ),
    )
    mirror: Url | None = Field(
        None,
        description=(
            "Folder to which every committed checkpoint is copied in the background: s3://bucket/runs, or any other URL that "
            "fsspec supports. `resume URL/NAME` continues a run from there."
        ),
    )


class ExportSection(SettingsSection):
    """The Hugging Face folder that is written when training is complete, and its upload."""

    enabled: Flag = Field(True, description="Write the Hugging Face folder when training is complete.")
    push_to_hub: HubId | None = Field(
        None, description="Hub repository that receives the exported folder at the end; it is created as private. Needs HF_TOKEN."
    )

    @model_validator(mode="after")
    def _require_export(self) -> ExportSection:
        if self.push_to_hub and not self.enabled:
            raise ValueError("export.push_to_hub needs the exported folder, and export.enabled is off; set export.enabled=true")
        return self
