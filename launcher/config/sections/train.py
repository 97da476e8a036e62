"""The sections for what training does: steps and batches, the optimizer, checkpoints, export."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from launcher.config.sections.fields import Count, Flag, Fraction, HubId, Name, Positive, PositiveInt, Section, Url


class TrainSection(Section):
    """How long training lasts, and in which batches."""

    max_steps: PositiveInt | None = Field(None, description="Number of optimizer steps; set either this or train.epochs.")
    epochs: Positive | None = Field(None, description="Passes over the data; set either this or train.max_steps.")
    global_batch_size: PositiveInt = Field(64, description="Rows per optimizer step over all ranks.")
    micro_batch_size: PositiveInt | None = Field(
        None, description="Rows per rank in one forward pass. Unset: the plan chooses one that divides the batch."
    )
    grad_clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="Maximum gradient norm; 0 turns clipping off."
    )
    largest_batch_first: Flag | None = Field(
        None,
        description="Before the first step, run the batch that needs most memory, without training on it. Unset: only on GPUs.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("neither train.max_steps nor train.epochs is set; set one of them")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("train.max_steps and train.epochs are both set; unset one of them with null")
        return self


class OptimSection(Section):
    """The optimizer and its learning-rate schedule."""

    name: str = Field("adamw", description="The optimizer: adamw, or another row of OPTIMIZERS in launcher/plan/optimizers.py.")
    lr: Positive = Field(1e-5, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
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
    def _betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if max(value) >= 1:
            raise ValueError("each must be below 1; 0.9 and 0.95 are usual")
        return value


class CheckpointSection(Section):
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


class ExportSection(Section):
    """The Hugging Face folder that is written when training is complete, and its upload."""

    enabled: Flag = Field(True, description="Write the Hugging Face folder when training is complete.")
    push_to_hub: HubId | None = Field(
        None, description="Hub repository that receives the exported folder at the end; it is created as private. Needs HF_TOKEN."
    )

    @model_validator(mode="after")
    def _something_to_push(self) -> ExportSection:
        if self.push_to_hub and not self.enabled:
            raise ValueError("export.push_to_hub needs the exported folder, and export.enabled is off; set export.enabled=true")
        return self
