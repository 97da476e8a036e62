"""The Hugging Face model with its initial weights, partitioned by ZeRO-3 while it is built.

Under an HfDeepSpeedConfig, each rank reads its own part of the weights if the files store them as the model has them, or in the
parts that transformers fuses. Otherwise Hugging Face's `from_pretrained` partitions each weight while rank 0 loads it. No rank
ever holds the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.checkpoint.initial_weights import (
    StoredTensor,
    can_fill,
    can_fill_buffers,
    can_fuse,
    fill,
    fill_buffers,
    find_sources,
    stored_buffers,
)
from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError
from launcher.models.weight_files import WeightReport, read_header, weight_files
from launcher.plan.launch_plan import ModelFacts
from launcher.tracking.progress import MakeProgress

# Name endings of buffers that are filled, in fp32, when a model is built.
_BUILT_BUFFERS = ("inv_freq", "embed_scale")
# Prefixes of transformers' errors for weights whose shape does not match the model, or that cannot be fused.
_MISMATCH_ERRORS = ("Error(s) in loading state_dict", "Failed to apply weight conversion")


@contextmanager
def _share_hpz_group() -> Iterator[None]:
    """Let the models that a process builds share hpZ's process group, which DeepSpeed refuses to create twice."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group

    def create_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    groups._create_zero_param_parallel_group = create_once
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = create


@_share_hpz_group()
def build_with_weights(
    config: Any,
    model: ModelSection,
    facts: ModelFacts,
    folder: Path | None,
    make_progress: MakeProgress,
    has_checkpoint: bool,
    **options: Any,
) -> Any:
    """Build the Hugging Face model of a transformers config, with the weights of the plan's model, or random ones.

    `folder` is the one that transformers loads, which may be a private copy of the user's; None without a model folder.
    `options` go to transformers. With `has_checkpoint`, weights are neither loaded nor initialized.

    Raises:
        ConfigError: if weights are missing, have another shape, or their files are incomplete.
    """
    from transformers import AutoModelForCausalLM

    source = Path(facts.path) if facts.path is not None and facts.has_weights and model.init == "pretrained" else None
    if has_checkpoint and (hf := _build_empty(config, **options)) is not None:
        if not stored_buffers(hf):
            return hf
        # A checkpoint may lack the buffers that weight files contain, so they are read from the files.
        stored = _read_stored_tensors(source, config) if source is not None else {}
        sources = find_sources(hf, stored) if stored else None
        if sources is not None and can_fill_buffers(hf, sources.by_name):
            fill_buffers(hf, sources.by_name)
            return hf
        del hf  # freed before another one is built
    if folder is None or source is None:
        return _replace_frozen_parameters(AutoModelForCausalLM.from_config(config, **options))
    advance = make_progress("loading the weights", facts.num_params * options["dtype"].itemsize)
    hf = _load_own_parts(source, model, config, advance, **options)
    if hf is None:
        pickled = {} if model.allow_pickled_weights else {"use_safetensors": True}
        hf = _replace_frozen_parameters(_load_pretrained(folder, str(source), model, **options, **pickled))
    return hf


def _build_empty(config: Any, **options: Any) -> Any:
    """Build a model whose weights have no values; None if it has buffers that only initialization fills.

    Rotary frequency tables and the embedding scale get their values when the model is built. Buffers that weight files contain
    are left to the caller.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import deepspeed

    # Under ZeRO-3, transformers would gather and initialize the weights of each module.
    initialize = deepspeed.initialize_weights_zero3
    deepspeed.initialize_weights_zero3 = lambda model: None
    try:
        hf = _replace_frozen_parameters(AutoModelForCausalLM.from_config(copy.deepcopy(config), **options))
    finally:
        deepspeed.initialize_weights_zero3 = initialize
    tables = {name for name, buffer in hf.named_buffers() if buffer.is_floating_point() and not name.endswith(_BUILT_BUFFERS)}
    return hf if tables <= stored_buffers(hf).keys() else None


def _replace_frozen_parameters(hf: Any) -> Any:
    """Replace parameters that are not trained, such as the router corrections of ERNIE 4.5, by buffers of the same names.

    ZeRO-3 keeps no fp32 weights of them, from which a checkpoint could be written.
    """
    in_fp32 = getattr(hf, "_keep_in_fp32_modules_strict", None) or ()
    for prefix, module in hf.named_modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if not parameter.requires_grad:
                from deepspeed.runtime.zero.partition_parameters import GatheredParameters

                with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    value = parameter.detach().clone()
                delattr(module, name)
                module.register_buffer(name, value.float() if any(part in f"{prefix}.{name}" for part in in_fp32) else value)
    return hf


def _load_own_parts(folder: Path, model: ModelSection, config: Any, on_fill: Callable[[int], None], **options: Any) -> Any:
    """Load a partitioned model, each rank reading only its own part; None without ZeRO-3, or if the files prevent it.

    Raises:
        ConfigError: if the files lack a part of a tensor that transformers fuses, or a file is incomplete.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations import is_deepspeed_zero3_enabled

    # find_sources decides; this saves the time of building a model that it would not accept.
    transforms = get_checkpoint_conversion_mapping(config.model_type) or ()
    can_fuse_all = all(can_fuse(transform) for transform in transforms if isinstance(transform, WeightConverter))
    if not (stored := _read_stored_tensors(folder, config)) or not is_deepspeed_zero3_enabled() or not can_fuse_all:
        return None
    hf = _build_empty(config, **options)
    sources = find_sources(hf, stored) if hf is not None else None
    if sources is None:
        return None
    if sources.missing:
        raise ConfigError(WeightReport(missing=tuple(sorted(sources.missing))).problems(folder, model))
    if not can_fill(hf, sources.by_name) or not can_fill_buffers(hf, sources.by_name):
        return None
    fill(hf, sources.by_name, on_fill)
    fill_buffers(hf, sources.by_name)
    return hf


def _read_stored_tensors(folder: Path, config: Any) -> dict[str, StoredTensor]:
    """Return the tensors in the safetensors files of a folder by their names; none if their weights are quantized."""
    files = [] if getattr(config, "quantization_config", None) else weight_files(folder, with_pickled=False)
    headers = ((file, name, tensor) for file in files if file.is_file() for name, tensor in read_header(file).items())
    return {name: StoredTensor(file, name, tensor.dtype, tensor.shape, tensor.offset) for file, name, tensor in headers}


def _load_pretrained(folder: Path, path: str, model: ModelSection, **options: Any) -> Any:
    """Load the model with all of its weights from a folder; messages name it by `path`, which the user knows.

    Raises:
        ConfigError: if weights are missing or have another shape; transformers would initialize them randomly.
    """
    from transformers import AutoModelForCausalLM

    try:
        hf, loading = AutoModelForCausalLM.from_pretrained(folder, **options, output_loading_info=True)
    except RuntimeError as error:
        # A GPU that runs out of memory also raises a RuntimeError.
        if not str(error).startswith(_MISMATCH_ERRORS):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        message = f"the weight files do not fit the model: {next((line for line in lines if 'size mismatch' in line), lines[0])}"
        remedy = "compare them before you request a GPU: python -m launcher data, with the settings of the run"
        raise ConfigError(message, where="model.path", value=path, remedy=remedy) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(WeightReport(missing=tuple(missing)).problems(Path(path), model))
    return hf
