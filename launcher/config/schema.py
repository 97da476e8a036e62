"""The settings of a run: one frozen class per section, every field with its meaning and unit.

Pure: nothing here reads disk, network, environment or devices. Checks that do, such as whether a path exists, are in
launcher.facts and launcher.plan.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from launcher.config.sections.backends import AnyCluster, choose_kind
from launcher.config.sections.cluster import LocalSection
from launcher.config.sections.costs import CostsSection
from launcher.config.sections.data import DataSection
from launcher.config.sections.evaluate import EvaluateSection
from launcher.config.sections.evaluation import HELD_OUT, EvalSection
from launcher.config.sections.fields import (
    HUB_ID_PATTERN,
    NAME_PATTERN,
    Checkpointing,
    Count,
    Flag,
    Fraction,
    Name,
    Positive,
    PositiveInt,
    Section,
    Sha256,
    Text,
    matching,
)
from launcher.config.sections.train import CheckpointSection, ExportSection, TrainSection

PACKAGE_PATTERN = re.compile(r"package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(/[\w.-]+)+")
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
RUN_PREFIX = "run:"
RUN_PATTERN = re.compile(rf"{RUN_PREFIX}(?P<run>{NAME_PATTERN.pattern}|(?:/|\./|\.\./|~).*?)(?:@(?P<step>[0-9]+))?")


class RunSection(Section):
    """Name, directory, seed and limits of the run."""

    name: Name | None = Field(
        None,
        description=(
            "Name of the run and of its directory. Unset: the name of the run's file, or else of model and data, followed by the "
            "time of submission."
        ),
    )
    root: Text = Field("runs", description="Folder that holds run directories; on a cluster, all nodes must share it.")
    seed: Count = Field(42, description="Seeds weight initialization and, together with the epoch, the order of rows.")
    max_hours: Positive | None = Field(
        None,
        description=(
            "Hours after which the run saves and stops, summed over all attempts; time in a queue does not count. Raise it to "
            "resume a run that reached it. Unset: no limit."
        ),
    )
    max_usd: Positive | None = Field(
        None,
        description=(
            "Cost in US dollars at which the run saves and stops: the GPU hours of all attempts, each at its own price. Raise "
            "it to resume a run that reached it. Needs cluster.price_per_gpu_hour; a typical price is not used."
        ),
    )
    confirm_usd: Positive | None = Field(
        None,
        description=(
            "Cost in US dollars above which `train` asks before it starts, and `resume` before the run gets more steps. They "
            "compare the highest cost that is expected or that a limit allows, for all runs of the command together, and also "
            "ask if a cost is unknown. Without a terminal, they refuse to start unless --yes is given. Unset: they never ask."
        ),
    )


class ModelSection(Section):
    """The model: its weights, tokenizer, number types and kernels."""

    name: Name = Field("model", description="Short name; part of the run's default name.")
    path: Text | None = Field(
        None,
        description=(
            "Weights to start from: a local folder, a hub id such as Qwen/Qwen3-8B, package:MODULE/FILE.gguf for a file in an "
            "installed Python package, or run:NAME for the newest checkpoint of another run; run:NAME@STEP selects a step, "
            "run:/path/of/run a run outside run.root. May be unset only with init=random."
        ),
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub id. Unset: the default branch.")
    tokenizer: Text | None = Field(
        None, description="Source of the tokenizer, in the same forms as model.path except run:. Unset: model.path."
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="Load the weights of model.path, or draw random ones for the architecture (tests, dry runs)."
    )
    config: dict[str, Any] | None = Field(
        None,
        description=(
            "The model's config.json as a mapping. With init=random and no path, it defines the architecture; with a hub id, the "
            "launcher can plan before anything is downloaded."
        ),
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "bf16",
        description=(
            "Type of weights and activations in compute; optimizer state and master weights are fp32. auto: bf16 on GPUs and on "
            "CPUs with AVX-512 or AMX, and fp32 on other CPUs, where PyTorch computes bf16 a hundred times slower."
        ),
    )
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = Field(
        "auto",
        description=(
            "Attention kernel. auto: on GPUs, except for fp32, FlashAttention 4, 3 or 2, whichever is installed and supports the "
            "GPU; otherwise, and on CPUs, varlen (torch's attention within each document). Models that varlen cannot compute use "
            "SDPA, which is slow for long rows of packed documents, or eager."
        ),
    )
    activation_checkpointing: Checkpointing = Field(
        "auto",
        description=(
            "Layers that recompute their activations in the backward pass, which takes about a third more compute and far less "
            "memory: all, none, or `every N` for each Nth layer. true means all, false none. auto: the plan chooses the fastest "
            "option that fits into a GPU's memory; none on CPUs."
        ),
    )
    liger: Literal["auto"] | Flag = Field(
        "auto",
        description=(
            "Liger's fused kernels for norms, rotary embedding and MLP on GPUs. auto: used if installed (the extra `gpu`), for "
            "dense architectures that Liger supports; each rank tries it first, and if one fails, all train without it, with an "
            "alert. If the ranks run in another Python than the command (a container image on Slurm, a Ray cluster elsewhere), "
            "they decide, and the plan's memory is for the case without it. true: refuse a run that cannot use it. CPUs never "
            "use it."
        ),
    )
    compile: Flag = Field(
        False,
        description=(
            "Compile each decoder layer with torch.compile during training, which fuses its elementwise operations into few "
            "kernels. The first step and the first evaluation take about a minute longer. Needs gcc on GPUs, g++ on CPUs, and "
            "Python's header files."
        ),
    )
    trust_remote_code: Flag = Field(
        False,
        description=(
            "Run Python code that comes with the model; needs model.revision pinned to a 40-digit commit or, for a folder, "
            "model.code_digest."
        ),
    )
    code_digest: Sha256 | None = Field(
        None,
        description=(
            "Digest of the Python files in the model's folder: with model.trust_remote_code, no other code from a folder runs. "
            "The error message shows the digest to set."
        ),
    )
    allow_pickled_weights: Flag = Field(False, description="Accept pytorch_model*.bin files, which can run code when loaded.")

    @field_validator("path", "tokenizer")
    @classmethod
    def _source_has_a_known_form(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or is_local_path(value) or HUB_ID_PATTERN.fullmatch(value):
            return value
        if PACKAGE_PATTERN.fullmatch(value) or (info.field_name == "path" and RUN_PATTERN.fullmatch(value)):
            return value
        if is_run(value):
            raise ValueError(
                "is not a reference to a run; write run:NAME or run:NAME@STEP; a run outside run.root is run:/path or run:./path"
                if info.field_name == "path"
                else "cannot be a run; remove it: the tokenizer comes with the weights of model.path"
            )
        raise ValueError(
            "is neither a folder, a hub id, a file of a package nor a run; write a folder as /path or ./path, "
            "a hub id as owner/name, a package's file as package:MODULE/FILE, a run as run:NAME or run:NAME@STEP"
        )

    @model_validator(mode="after")
    def _complete(self) -> ModelSection:
        if self.init == "pretrained" and self.path is None:
            raise ValueError("model.path is required with model.init=pretrained; set it to a folder or a hub id")
        if self.init == "random" and self.path is None and self.config is None:
            raise ValueError("model.init=random needs an architecture; set model.path or model.config")
        if self.init == "random" and is_run(self.path):
            raise ValueError("model.init=random would ignore the weights of model.path=run:...; set model.init=pretrained")
        if self.path is None and self.tokenizer is None:
            raise ValueError("model.tokenizer is required where model.path is unset; set it to a folder or a hub id")
        is_folder = is_local_path(self.path or "") or is_run(self.path)
        if self.trust_remote_code and not is_folder and not COMMIT_PATTERN.fullmatch(self.revision or ""):
            raise ValueError("model.trust_remote_code needs a fixed revision; pin model.revision to a full 40-digit commit")
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


# W&B refuses longer tags.
Tag = Annotated[Name, matching(r".{1,64}", "is longer than W&B's limit of 64 characters; shorten it")]


class TrackingSection(Section):
    """Where metrics go besides metrics.jsonl and the terminal."""

    kind: Literal["wandb", "none"] = Field(
        "wandb", description="wandb: Weights & Biases; none: only metrics.jsonl and the terminal."
    )
    project: Name = Field("launcher", description="W&B project.")
    entity: Name | None = Field(None, description="W&B user or team. Unset: the account's default.")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online if WANDB_API_KEY or a W&B login is found, else offline. disabled: no W&B."
    )
    group: Name | None = Field(None, description="W&B group.")
    tags: tuple[Tag, ...] = Field((), description="W&B tags, of at most 64 characters.")


class RunConfig(Section):
    """All settings of a run, resolved and checked."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    data: DataSection
    optim: OptimSection = Field(default_factory=OptimSection)
    train: TrainSection
    eval: EvalSection = Field(default_factory=EvalSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    export: ExportSection = Field(default_factory=ExportSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    cluster: Annotated[AnyCluster, BeforeValidator(choose_kind)] = Field(default_factory=LocalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    costs: CostsSection = Field(default_factory=CostsSection)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.run.max_usd is not None and self.cluster.price_per_gpu_hour is None:
            raise ValueError("run.max_usd needs the price of a GPU hour; set cluster.price_per_gpu_hour")
        sets = (HELD_OUT, *(one.name for one in self.eval.all_sets))
        if self.checkpoint.best_set not in sets:
            raise ValueError(f"checkpoint.best_set names no evaluation set; set it to {' or '.join(sets)}")
        return self


def is_run(value: str | None) -> bool:
    """Return whether a model path names the weights of another run."""
    return value is not None and value.startswith(RUN_PREFIX)


def is_local_path(value: str) -> bool:
    """Return whether a value is a path: absolute, starting with ./, ../ or ~, or with more parts than a Hub id."""
    return value.startswith(("/", "./", "../", "~")) or value in (".", "..") or (value.count("/") > 1 and ":" not in value)
