"""Compares a model's weight files with the model's tensors before anything is started.

transformers itself does the comparison: it loads the model onto the meta device from tensors with names, types and shapes but
no data. Its own rules therefore apply (renamed and fused tensors, tied weights, prefixes, ignored tensors), and no weight is
read. torch and transformers are imported only for the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, LauncherError, Problem
from launcher.models import weight_files
from launcher.models.found_model import FoundModel
from launcher.models.remote_code import code_option, folder_to_load
from launcher.models.weight_files import WeightReport


def require_weights(found: FoundModel, say: Callable[[str], None]) -> None:
    """Reject weights that do not cover the model. Comparison results are cached; `say` shows a line to the user.

    Raises:
        ConfigError: if tensors are missing or have a different shape, a file is damaged, or config.json is rejected.
    """
    model, folder = found.section, found.folder
    if model.path is None or model.init == "random":
        return
    if folder is None:
        problem = "model.path: the weights are incomplete after the download"
        remedy = "check the files of the repository, choose another model.revision, or use a local folder"
        raise ConfigError(Problem(problem, where="model.path", value=model.path, remedy=remedy))
    if not (folder / "config.json").is_file():
        # A run from a mirror has its weights in its checkpoints; its base model may not be on this machine.
        return
    report = found.weight_report
    if report is None:
        say("comparing the weight files with the model (once)")
        try:
            report = compare(folder, model)
        except LauncherError:
            raise
        except Exception as error:
            # A failure here may not occur on the nodes, where the ranks compare again while they load.
            first = next(iter(str(error).strip().splitlines()), "")
            say(f"note: the weight files could not be compared with the model: {type(error).__name__}: {first}")
            return
        weight_files.save_report(folder, model, report)
    if problems := report.problems(folder, model):
        raise ConfigError(problems)


def compare(folder: Path, model: ModelSection) -> WeightReport:
    """Load the folder's model without data and report tensors that are missing, unexpected or of a different shape.

    Raises:
        ConfigError: if a weight file is damaged, transformers rejects config.json, or parts of a tensor cannot be fused.
    """
    import torch
    from transformers.modeling_utils import load_state_dict, str_to_torch_dtype
    from transformers.utils import logging

    # A table and a progress bar.
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tensors: dict[str, Any] = {}
    for file in weight_files.weight_files(folder, model.allow_pickled_weights):
        if file.suffix == ".safetensors":
            for name, header in weight_files.read_header(file).items():
                tensors[name] = torch.empty(header.shape, dtype=str_to_torch_dtype[header.dtype], device="meta")
        else:
            tensors.update(load_state_dict(file, map_location="meta"))
    blank = _blank_model(folder, model)
    try:
        _, info = type(blank).from_pretrained(
            None,
            config=blank.config,
            state_dict=tensors,
            device_map="meta",
            dtype=blank.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        # Raised where parts of a tensor are missing or have another shape.
        message = f"model.path: the weight files do not fit the model: {_reason(error)}"
        raise ConfigError(Problem(message, "model.path", str(folder), "download the model folder again")) from error
    mismatched = (
        f"{name} is {list(in_files)} in the files and {list(in_model)} in the model"
        for name, in_files, in_model in info["mismatched_keys"]
    )
    return WeightReport(tuple(sorted(info["missing_keys"])), tuple(sorted(mismatched)), tuple(sorted(info["unexpected_keys"])))


def _blank_model(folder: Path, model: ModelSection) -> Any:
    """Build the ranks' model on the meta device.

    Raises:
        ConfigError: if transformers rejects config.json, which it would do on every node too.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.train.model import DTYPES

    path = folder_to_load(folder, model.trust_remote_code, model.code_digest)
    remote = code_option(model.trust_remote_code, path)
    try:
        config = AutoConfig.from_pretrained(path, **remote)
        with torch.device("meta"):
            # Weights do not depend on the attention kernel, and this machine may lack the ranks' kernel.
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype], attn_implementation="eager", **remote)
    except (LauncherError, OSError, ImportError):
        raise
    except Exception as error:
        message = f"model.path: transformers does not accept config.json: {_reason(error)}"
        remedy = "correct this value, or use the config.json of a causal language model that belongs to the weights"
        raise ConfigError(Problem(message, where="model.path", value=str(folder / "config.json"), remedy=remedy)) from error


def _reason(error: Exception) -> str:
    """Return the line of an error that names the reason: the first lines of some only name the check."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if lines[0].endswith(":") else lines[0]
