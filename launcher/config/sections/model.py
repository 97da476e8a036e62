"""The section for the model, and the forms in which it names weights."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from launcher.config.sections.fields import HUB_ID_PATTERN, NAME_PATTERN, Checkpointing, Flag, Name, SettingsSection, Sha256, Text

PACKAGE_PATTERN = re.compile(r"package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(/[\w.-]+)+")
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
RUN_PREFIX = "run:"
RUN_PATTERN = re.compile(rf"{RUN_PREFIX}(?P<run>{NAME_PATTERN.pattern}|(?:/|\./|\.\./|~).*?)(?:@(?P<step>[0-9]+))?")


class ModelSection(SettingsSection):
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
            "dense architectures that Liger supports; each rank imports it first; if one fails, all train without it, with an "
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
    def _check_form(cls, value: str | None, info: ValidationInfo) -> str | None:
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
    def _require_weights(self) -> ModelSection:
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


def is_run(value: str | None) -> bool:
    """Return whether a model path names the weights of another run."""
    return value is not None and value.startswith(RUN_PREFIX)


def is_local_path(value: str) -> bool:
    """Return whether a value is a path: absolute, starting with ./, ../ or ~, or with more parts than a Hub id."""
    return value.startswith(("/", "./", "../", "~")) or value in (".", "..") or (value.count("/") > 1 and ":" not in value)
