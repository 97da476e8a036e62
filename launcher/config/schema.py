"""All settings: `RunConfig`, its sections (sections/), the description of each, and what an unknown key was meant to be.

Pure: checks that read the disk or devices, such as whether a path exists, are in launcher.facts and launcher.plan.
"""

from __future__ import annotations

import difflib
import functools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from launcher.config.sections.cluster import ClusterSection, LocalSection
from launcher.config.sections.data import DataSection
from launcher.config.sections.evaluation import EvalSection, EvaluateSection
from launcher.config.sections.fields import SettingsSection
from launcher.config.sections.model import ModelSection
from launcher.config.sections.ray import RaySection
from launcher.config.sections.run import RunSection, TrackingSection
from launcher.config.sections.slurm import SlurmSection
from launcher.config.sections.static import StaticSection
from launcher.config.sections.train import (
    CheckpointSection,
    DeepSpeedSection,
    ExportSection,
    ObjectiveSection,
    OptimSection,
    TrainSection,
)
from launcher.errors import did_you_mean

# By `cluster.kind`. The classes that submit are in launcher.clusters.backends.BACKENDS.
SECTIONS: dict[str, type[ClusterSection]] = {
    "local": LocalSection,
    "slurm": SlurmSection,
    "ray": RaySection,
    "static": StaticSection,
}

if TYPE_CHECKING:
    AnyCluster = ClusterSection
else:
    AnyCluster = Annotated[functools.reduce(operator.or_, SECTIONS.values()), Field(discriminator="kind")]


def choose_kind(value: Any) -> Any:
    """Return the section with its kind; a section without a kind is for this machine."""
    return {"kind": "local", **value} if isinstance(value, dict) else value


class RunConfig(SettingsSection):
    """All settings of a run, resolved and checked."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    train: TrainSection
    eval: EvalSection = Field(default_factory=EvalSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    export: ExportSection = Field(default_factory=ExportSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    cluster: Annotated[AnyCluster, BeforeValidator(choose_kind)] = Field(default_factory=LocalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)

    @model_validator(mode="after")
    def _check_limits_and_sets(self) -> RunConfig:
        if self.run.max_usd is not None and self.cluster.price_per_gpu_hour is None:
            raise ValueError("run.max_usd needs the price of a GPU hour; set cluster.price_per_gpu_hour")
        if self.checkpoint.best_set not in (sets := self.eval.intervals):
            raise ValueError(f"checkpoint.best_set names no evaluation set; set it to {' or '.join(sets)}")
        return self


_SCALARS = {"integer": "int", "number": "float", "string": "text", "object": "mapping"}
_LOWER = (("exclusiveMinimum", ">"), ("minimum", ">="))
_UPPER = (("exclusiveMaximum", "<"), ("maximum", "<="))


@dataclass(frozen=True)
class Setting:
    """One setting: `type` as in `int > 0 or null`; `default` in YAML, None if a value is required.

    `kinds` are the cluster kinds that have the setting, empty if all have it.
    """

    key: str
    type: str
    default: str | None
    meaning: str
    kinds: tuple[str, ...] = ()


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return all settings by key, in the schema's order; `data.sources[].path` is the key of a list's items."""
    return {setting.key: setting for setting in settings_of(RunConfig, "")}


def settings_of(section: type[BaseModel], prefix: str) -> Iterator[Setting]:
    """Yield the settings of a section and of those below it, with `prefix` before their keys."""
    properties = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        nested = sections_of(field.annotation)
        meaning = field.description or (nested[0].__mro__[len(nested) > 1].__doc__ if nested else "") or ""
        if len(nested) > 1:
            # Sections that `kind` selects from: first the settings of all of them, then those of each one.
            yield Setting(key, "mapping", None, meaning)
            by_kind = {one.model_fields["kind"].default: {s.key: s for s in settings_of(one, f"{key}.")} for one in nested}
            any_kind = next(iter(by_kind.values()))
            shared = [k for k in any_kind if all(k in of_kind for of_kind in by_kind.values())]
            for k in shared:
                yield replace(any_kind[k], type=" | ".join(by_kind)) if k == f"{key}.kind" else any_kind[k]
            own = {k: setting for of_kind in by_kind.values() for k, setting in of_kind.items() if k not in shared}
            for k, setting in own.items():
                yield replace(setting, kinds=tuple(kind for kind, of_kind in by_kind.items() if k in of_kind))
            continue
        default = None if field.is_required() else as_yaml(field.get_default(call_default_factory=True))
        yield Setting(key, _describe_type(properties[name]), default, meaning)
        if nested:
            yield from settings_of(nested[0], f"{key}[]." if nested[0] is not field.annotation else f"{key}.")


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in an annotation: a single one, directly or as a list's items, or several to select from."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def _describe_type(schema: Mapping[str, Any]) -> str:
    """Return a JSON Schema as text: `bf16 | fp16 | fp32`, `int > 0 or null`, `0 <= float <= 1`, `list of name`."""
    if "anyOf" in schema:
        parts = [_describe_type(part) for part in schema["anyOf"] if part.get("type") != "null"]
        optional = any(part.get("type") == "null" for part in schema["anyOf"])
        return " | ".join(parts) + (" or null" if optional else "")
    if "const" in schema or "enum" in schema:
        return " | ".join(str(choice) for choice in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "boolean":
        return "true | false"
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_describe_type(item) for item in schema['prefixItems'])}]"
        return f"list of {_describe_type(schema['items'])}"
    if kind is None:
        return "mapping"
    name = schema.get("format") or _SCALARS[kind]
    lower = next((f"{sign} {schema[bound]:g}" for bound, sign in _LOWER if bound in schema), "")
    upper = next((f"{sign} {schema[bound]:g}" for bound, sign in _UPPER if bound in schema), "")
    if lower and upper:
        sign, number = lower.split()
        return f"{number} {sign.replace('>', '<')} {name} {upper}"
    return " ".join(filter(None, (name, lower, upper)))


def as_yaml(value: Any) -> str:
    """Return a value as it is written in a file or on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    return str(value)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the scalars in nested mappings and lists, with their keys below `key`, such as data.sources[0].path."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from leaves(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from leaves(v, f"{key}[{i}]")
    else:
        yield key, value


# Names in transformers, TRL, DeepSpeed, torchtitan and other trainers, mapped to the equivalent setting here.
_NAMES_ELSEWHERE = {
    "run.name": "run_name experiment_name job_name",
    "run.root": "output_dir out_dir save_dir output_path",
    "run.seed": "random_seed data_seed",
    "model.path": "model_name_or_path model_id model_path base_model pretrained pretrained_model_name_or_path",
    "model.dtype": "bf16 fp16 fp32 precision mixed_precision torch_dtype",
    "model.attention": "attn_implementation flash_attention flash_attn use_flash_attention",
    "model.activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute",
    "model.liger": "use_liger_kernel liger_kernel",
    "data.path": "dataset dataset_path dataset_name train_file data_path data_files",
    "data.max_length": "max_seq_len max_seq_length seq_len seq_length sequence_length context_length max_len cutoff_len",
    "data.packing": "pack packed sample_packing",
    "data.chat_template": "template prompt_template",
    "data.eval_fraction": "val_fraction val_size validation_split test_size",
    "optim.name": "optimizer optimizer_name optimizer_type",
    "optim.lr": "learning_rate max_lr base_lr peak_lr",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "optim.warmup_steps": "warmup warmup_ratio num_warmup_steps lr_warmup_steps",
    "optim.weight_decay": "wd l2",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "epsilon adam_epsilon",
    "train.max_steps": "steps num_steps total_steps train_steps max_train_steps training_steps num_train_steps",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "train.global_batch_size": "batch_size train_batch_size effective_batch_size total_batch_size gradient_accumulation_steps "
    "grad_accum_steps grad_accum accumulation_steps accumulate_grad_batches",
    "train.micro_batch_size": "per_device_train_batch_size per_device_batch_size train_micro_batch_size_per_gpu local_batch_size",
    "train.grad_clip": "max_grad_norm gradient_clipping clip_grad_norm gradient_clip_val max_norm",
    "eval.every": "eval_steps eval_interval eval_freq val_check_interval",
    "checkpoint.save_every": "save_steps save_interval checkpoint_interval save_freq checkpointing_steps",
    "checkpoint.keep_last": "save_total_limit keep_latest_k max_checkpoints",
    "export.push_to_hub": "hub_model_id",
    "cluster.nodes": "num_nodes nnodes n_nodes num_machines",
    "cluster.ranks_per_node": "gpus num_gpus n_gpus ngpus nproc_per_node devices num_processes",
    "cluster.time": "walltime time_limit",
    "tracking.kind": "report_to wandb logger",
    "tracking.project": "wandb_project project_name",
}
# Names of other trainers for features that the launcher does not have, and what to do instead.
_NOT_SERVED = {
    re.compile(r"lora|peft|adapter"): "all parameters are trained: remove it; for LoRA use PEFT with TRL, Axolotl, "
    "LLaMA-Factory or Unsloth",
    re.compile(r"load_in_[48]bit|^quantiz.*config|^bnb_"): "all parameters are trained, and quantized ones cannot be: remove it",
    re.compile(r"^(finetuning|fine_tuning|tuning)_(type|method)$"): "all parameters are trained: remove it",
}
_NUM_SHOWN = 3


@functools.cache
def _list_synonyms() -> Mapping[str, str]:
    return {name: setting for setting, names in _NAMES_ELSEWHERE.items() for name in names.split()}


def find_meant_setting(key: str) -> str:
    """Return the setting that another trainer's name stands for; empty for all other names. The section is ignored."""
    return _list_synonyms().get(_take_last_part(key), "")


def _take_last_part(key: str) -> str:
    return key.rpartition(".")[2].lower().lstrip("-").replace("-", "_")


def suggest_setting(key: str) -> str:
    """Return `did you mean SETTING?` for a key that does not exist, or an empty text.

    The last part of the key is searched in every section. Names of other trainers are recognized, even for unsupported features.
    """
    key = key.lower()
    # Settings of held-out rows belong to the data: eval.max_rows is data.eval_max_rows.
    if key.startswith("eval.") and (of_data := f"data.eval_{key.removeprefix('eval.')}") in settings():
        return f"did you mean {of_data}?"
    if meant := find_meant_setting(key):
        return f"did you mean {meant}?"
    if instead := next((text for pattern, text in _NOT_SERVED.items() if pattern.search(_take_last_part(key))), ""):
        return instead
    names = list(settings())
    if guess := did_you_mean(key, names):
        return guess
    by_last_part: dict[str, list[str]] = {}
    for name in names:
        if "." in name and "[]" not in name:
            by_last_part.setdefault(name.rpartition(".")[2], []).append(name)
    for name, setting in _list_synonyms().items():
        by_last_part.setdefault(name, []).append(setting)
    close = difflib.get_close_matches(key.rpartition(".")[2], by_last_part, n=1, cutoff=0.75)
    return f"did you mean {' or '.join(by_last_part[close[0]][:_NUM_SHOWN])}?" if close else ""
