"""Compares a model's weight files with the model's tensors before anything is started.

transformers itself does the comparison: it loads the model onto the meta device from tensors with names, types and shapes but
no data. Its own rules therefore apply (renamed and fused tensors, tied weights, prefixes, ignored tensors), and no weight is
read. torch and transformers are imported only for the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import model_source
from launcher.config.schema import ModelSection
from launcher.errors import ConfigError, LauncherError, Problem
from launcher.models import weight_files
from launcher.models.private_code import code_option, folder_to_load
from launcher.models.weight_files import ShapeMismatch, WeightReport

if TYPE_CHECKING:
    from torch import Tensor


def require_weights(model: ModelSection, say: Callable[[str], None]) -> None:
    """Reject weights that do not cover the model. Comparison results are cached; `say` shows a line to the user.

    Raises:
        ConfigError: if tensors are missing or have a different shape, a file is damaged, or config.json is rejected.
    """
    if model.path is None or model.init == "random":
        return
    folder = model_source.pretrained_folder(model)
    if folder is None:
        problem = "model.path: the weights are incomplete after the download"
        remedy = "check the files of the repository, choose another model.revision, or use a local folder"
        raise ConfigError(Problem(problem, where="model.path", value=model.path, remedy=remedy))
    if not (folder / "config.json").is_file():
        # A run from a mirror has its weights in its checkpoints; its base model may not be on this machine.
        return
    report = weight_files.load_report(folder, model)
    if report is None:
        say("comparing the weight files with the model (once)")
        try:
            with _quiet():
                report = compare(folder, model)
        except LauncherError:
            raise
        except Exception as error:
            # A failure here may not occur on the nodes, where the ranks compare again while they load.
            say(f"note: the weight files could not be compared with the model: {_first_line(error)}")
            return
        weight_files.save_report(folder, model, report)
    if problems := report.problems(folder, model):
        raise ConfigError(problems)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' table and progress bar."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _load_config(folder: Path, model: ModelSection) -> Any:
    """Return the model's config as transformers reads it.

    Raises:
        ConfigError: if transformers rejects its values, which it would do on every node too.
    """
    from transformers import AutoConfig

    try:
        path = folder_to_load(folder, model.trust_remote_code, model.code_digest)
        return AutoConfig.from_pretrained(path, **code_option(model.trust_remote_code, path))
    except (LauncherError, OSError, ImportError):
        raise
    except Exception as error:
        # The first lines of some errors only name the check.
        reason = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        message = f"model.path: transformers does not accept config.json: {reason[-1] if reason[0].endswith(':') else reason[0]}"
        remedy = "correct this value, or use the config.json that belongs to the weights"
        raise ConfigError(Problem(message, where="model.path", value=str(folder / "config.json"), remedy=remedy)) from error


def compare(folder: Path, model: ModelSection) -> WeightReport:
    """Load the folder's model without data and report tensors that are missing, unexpected or of a different shape.

    Raises:
        ConfigError: if a weight file is damaged, or transformers rejects config.json.
        RuntimeError: if tensors cannot be fused although none is missing or of a different shape.
    """
    tensors = _tensors(folder, model)
    blank = _blank_model(folder, model)
    try:
        loaded, info = _load(blank, tensors)
    except RuntimeError:
        # transformers then names neither the tensors that cannot be fused nor any other problem: load the rest without them.
        unfused = _unfused_parts(blank, tensors)
        if not unfused:
            raise
        loaded, info = blank, _load(blank, {name: tensor for name, tensor in tensors.items() if name not in unfused})[1]
    shapes = {name: (tuple(in_files), tuple(in_model)) for name, in_files, in_model in info["mismatched_keys"]}
    missing: set[str] = set()
    mismatched: set[ShapeMismatch] = set()
    for name in (*info["missing_keys"], *shapes):
        absent, misshapen = _differences(loaded, tensors, name)
        missing |= absent
        mismatched |= misshapen
        if not absent and not misshapen:
            # The model's own tensor differs, but none of its source tensors does.
            if name in shapes:
                mismatched.add(ShapeMismatch(name, *shapes[name]))
            else:
                missing.add(name)
    by_name = sorted(mismatched, key=lambda mismatch: mismatch.name)
    return WeightReport(tuple(sorted(missing)), tuple(by_name), tuple(sorted(info["unexpected_keys"])))


def _tensors(folder: Path, model: ModelSection) -> dict[str, Tensor]:
    """Return tensors on the meta device under their names in the weight files."""
    import torch
    from transformers.modeling_utils import load_state_dict, str_to_torch_dtype

    tensors: dict[str, Tensor] = {}
    for file in weight_files.weight_files(folder, model.allow_pickled_weights):
        if file.suffix == ".safetensors":
            for name, header in weight_files.read_header(file).items():
                tensors[name] = torch.empty(header.shape, dtype=str_to_torch_dtype[header.dtype], device="meta")
        else:
            tensors.update(load_state_dict(file, map_location="meta"))
    return tensors


def _blank_model(folder: Path, model: ModelSection) -> Any:
    """Build the ranks' model on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from launcher.train.model import DTYPES

    config = _load_config(folder, model)
    remote = code_option(model.trust_remote_code, folder)
    with torch.device("meta"):
        # Weights do not depend on the attention kernel, and this machine may lack the ranks' kernel.
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype], attn_implementation="eager", **remote)


def _load(blank: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """Return the model loaded from tensors on the meta device, and transformers' loading info."""
    loaded: tuple[Any, dict[str, Any]] = type(blank).from_pretrained(
        None,
        config=blank.config,
        state_dict=dict(tensors),
        device_map="meta",
        dtype=blank.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return loaded


def _unfused_parts(blank: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the tensors in the files that would be fused with missing or differently shaped ones."""
    parts: set[str] = set()
    for name in blank.state_dict():
        sources = _sources(blank, name)
        if len(sources) > 1 and any(_differences(blank, tensors, name)):
            parts |= {part for source in sources if (part := _name_in_files(blank, tensors, source)) is not None}
    return parts


def _differences(hf: Any, tensors: Mapping[str, Tensor], name: str) -> tuple[set[str], set[ShapeMismatch]]:
    """Return the sources of the model's tensor `name` that the files lack or have in another shape, by their names there."""
    missing: set[str] = set()
    mismatched: set[ShapeMismatch] = set()
    for source, shape in _sources(hf, name).items():
        part = _name_in_files(hf, tensors, source)
        if part is None:
            missing.add(source)
        elif tuple(tensors[part].shape) != shape:
            mismatched.add(ShapeMismatch(part, tuple(tensors[part].shape), shape))
    return missing, mismatched


def _name_in_files(hf: Any, tensors: Mapping[str, Tensor], name: str) -> str | None:
    """Return the name with or without the prefix of the base model, whichever the files have, or None if they have neither."""
    return next((known for known in (name, name.removeprefix(f"{hf.base_model_prefix}.")) if known in tensors), None)


def _sources(hf: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the source tensors, in the weight files, of the model's tensor `name`."""
    from transformers.core_model_loading import revert_weight_conversion

    tensor = hf.get_parameter_or_buffer(name)
    try:
        sources = revert_weight_conversion(hf, {name: tensor})
    except Exception:
        # A tensor that is converted together with others is looked up by its own name.
        sources = {name: tensor}
    return {source: tuple(part.shape) for source, part in sources.items()}
