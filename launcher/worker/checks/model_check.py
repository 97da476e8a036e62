"""Checks of a model before anything is started: whether its weight files hold its tensors, and whether it isolates documents.

transformers itself compares the weights: it loads the model onto the meta device from tensors with names, types and shapes but no
data. Its own rules therefore apply (renamed and fused tensors, tied weights, prefixes, ignored tensors), and no weight is read.

`python -m launcher.worker.checks.model_check` probes whether a model sees later tokens or neighboring documents. It reads a
RunConfig as JSON from standard input, stores the verdict (launcher.models.stored_checks) and prints it as JSON. The probe uses a
small random model with the same kinds of layers, attention and windows, so it needs no weights and no GPU. An architecture that
cannot be reduced by these rules gets no verdict; the ranks then probe the loaded model. It also counts the model's parameters, if
the headers of its weight files do not: transformers builds the model on the meta device.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.clusters import limits
from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.data import cache_dir
from launcher.errors import ConfigError, LauncherError, Problem, RunError
from launcher.models import stored_checks, weight_files
from launcher.models.found_model import FoundModel, find_model
from launcher.models.remote_code import code_option, folder_to_load, without_code
from launcher.models.weight_files import WeightReport
from launcher.plan.launch_plan import IsolationVerdict, ModelFacts, Outcome

if TYPE_CHECKING:
    from torch import Tensor

# transformers' message for a kernel that an architecture does not support.
_UNSUPPORTED = "does not support an attention implementation"
_CPU_KERNELS = ("auto", "varlen", "sdpa", "eager")
_VOCABULARY, _WIDTH, _NUM_EXPERTS = 256, 64, 16
# More layers than the period of any known layer layout.
_NUM_LAYERS = 16
_MAX_PARAMETERS = 300_000_000
_NOISE = 0.04
# Keys of transformers configs with the width of an MLP or of a latent, and with the number of experts.
_MLP_WIDTHS = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"),
    *("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_VOCABULARY_SIZES = ("vocab_size", "vocab_size_per_layer_input")
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id")


def require_weights(found: FoundModel, say: Callable[[str], None]) -> None:
    """Reject weights that do not cover the model. Comparison results are cached; `say` shows a line to the user."""
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
            report = compare_weights(folder, model)
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


def compare_weights(folder: Path, model: ModelSection) -> WeightReport:
    """Load the folder's model without data and report tensors that are missing, unexpected or of a different shape."""
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
    blank = _build_blank_model(folder, model)
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
        message = f"model.path: the weight files do not fit the model: {_find_reason(error)}"
        raise ConfigError(Problem(message, "model.path", str(folder), "download the model folder again")) from error
    mismatched = (
        f"{name} is {list(in_files)} in the files and {list(in_model)} in the model"
        for name, in_files, in_model in info["mismatched_keys"]
    )
    return WeightReport(tuple(sorted(info["missing_keys"])), tuple(sorted(mismatched)), tuple(sorted(info["unexpected_keys"])))


def _build_blank_model(folder: Path, model: ModelSection) -> Any:
    """Build the ranks' model on the meta device."""
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
        message = f"model.path: transformers does not accept config.json: {_find_reason(error)}"
        remedy = "correct this value, or use the config.json of a causal language model that belongs to the weights"
        raise ConfigError(Problem(message, where="model.path", value=str(folder / "config.json"), remedy=remedy)) from error


def _find_reason(error: Exception) -> str:
    """Return the line of an error that names the reason: the first lines of some only name the check."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if lines[0].endswith(":") else lines[0]


def check_isolation(model: ModelSection, facts: ModelFacts) -> IsolationVerdict:
    """Probe a reduced model, store the verdict and return it; also store the number of parameters, unless the facts have it.

    Without memory, processes, files or disk space for the probe, it raises RunError and stores no verdict.
    """
    if not facts.num_params_exact and (num_params := _count_parameters(model, facts)) is not None:
        stored_checks.save_num_params(facts, model, num_params)
    kernel, outcome, detail = _probe(model, facts)
    version = importlib.metadata.version("transformers")
    verdict = IsolationVerdict(outcome=outcome, kernel=kernel, transformers=version, detail=detail)
    stored_checks.save_verdict(facts, model, verdict)
    return verdict


def _probe(model: ModelSection, facts: ModelFacts) -> tuple[str, Outcome, str]:
    """Return a verdict's attention kernel, outcome and detail."""
    if model.attention not in _CPU_KERNELS:
        return model.attention, "unknown", f"{model.attention} needs a GPU"
    import torch

    from launcher.train import attention
    from launcher.train.isolation import probe
    from launcher.train.model import CausalLMLoss

    try:
        config, remote = _read_config(model, facts)
        candidates = list(reduce_config(config))
    except LauncherError:
        raise
    except Exception as error:
        return model.attention, "unknown", _describe(error)
    device = torch.device("cpu")
    kernel = attention.choose_kernel(model, device, config)
    if kernel == attention.VARLEN:
        if not attention.can_varlen(model, config, device):
            return kernel, "unsupported", ""
        attention.register_varlen()
    reason = ""
    for reduced in candidates:
        try:
            hf = build_reduced_model(reduced, kernel, **remote)
            trained = CausalLMLoss(hf, flatten=kernel == attention.VARLEN).eval()

            def own_logits(ids: Tensor, positions: Tensor, hf: Any = hf) -> Tensor | None:
                # varlen needs document boundaries, which the model's own forward pass does not get.
                hf.set_attn_implementation("sdpa" if kernel == attention.VARLEN else kernel)
                try:
                    logits: Tensor = hf(input_ids=ids, use_cache=False).logits
                except Exception as error:
                    _describe(error)
                    return None
                finally:
                    hf.set_attn_implementation(kernel)
                return logits

            outcome, detail = probe(trained, own_logits, int(hf.get_input_embeddings().num_embeddings), device)
        except Exception as error:
            if _UNSUPPORTED in str(error):
                return kernel, "unsupported", ""
            # Not every architecture can be built or run at every reduced size.
            reason = reason or _describe(error)
            continue
        if outcome != "unknown":
            return kernel, outcome, "" if outcome == "isolated" else detail
        reason = reason or detail
    return kernel, "unknown", reason


def _count_parameters(model: ModelSection, facts: ModelFacts) -> int | None:
    """Count the trained parameters of the whole model, built on the meta device; None if transformers cannot build it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        config, remote = _read_config(model, facts)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **remote)
    except LauncherError:
        raise
    except Exception as error:
        _describe(error)
        return None
    return sum(parameter.numel() for parameter in hf.parameters() if parameter.requires_grad)


def _read_config(model: ModelSection, facts: ModelFacts) -> tuple[Any, dict[str, bool]]:
    """Return transformers' config of the model, and the option for code of its own."""
    from transformers import AutoConfig

    folder = folder_to_load(Path(facts.path), model.trust_remote_code, model.code_digest) if facts.path else None
    remote = code_option(model.trust_remote_code, folder)
    return AutoConfig.from_pretrained(folder, **remote) if folder else AutoConfig.for_model(**without_code(facts.config)), remote


def _describe(error: Exception) -> str:
    """Return an error as one line. Raises RunError if a limit of this machine caused it: it says nothing about the model."""
    described = f"{type(error).__name__}: {_find_reason(error)}"[:200]
    if limit := limits.cause_of(error, cache_dir.cache_root()):
        raise RunError(f"{limit}: {described}") from error
    return described


def reduce_config(config: Any) -> Iterator[Any]:
    """Yield smaller copies of a config, the smallest first; all keep order and kinds of layers, attention and its windows."""
    for is_narrow in (True, False):
        reduced = copy.deepcopy(config)
        for part in _iter_parts(reduced):
            if not isinstance(_get(part, "num_hidden_layers"), int):
                continue
            _cut_layers(part)
            if is_narrow:
                _shrink_widths(part)
            for keys, limit in ((_MLP_WIDTHS, _WIDTH), (_EXPERTS, _NUM_EXPERTS)):
                for key in keys:
                    if isinstance(value := _get(part, key), int):
                        setattr(part, key, min(value, limit))
            of_vocabulary = {**dict.fromkeys(_VOCABULARY_SIZES, _VOCABULARY), **{key: i for i, key in enumerate(_SPECIAL_IDS)}}
            for key, value in of_vocabulary.items():
                if _get(part, key) is not None:
                    setattr(part, key, value)
        yield reduced


def _iter_parts(config: Any) -> Iterator[Any]:
    """Yield a config and its nested configs, such as those of a text model and an image encoder."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "get_text_config"):
            yield from _iter_parts(value)


def _shrink_widths(config: Any) -> None:
    """Shrink all widths except the head dimension, which rotary embeddings depend on."""
    heads, kv_heads, hidden = (_get(config, key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return
    few = 4 if kv_heads not in (None, heads) and heads > 1 else 2
    narrow = few * (_get(config, "head_dim") or hidden // heads)
    config.num_attention_heads = few
    if isinstance(kv_heads, int):
        config.num_key_value_heads = few if kv_heads == heads else min(kv_heads, 2)
    # Some configs give other widths as multiples of the stream's.
    for key, value in list(vars(config).items()):
        if type(value) is int and value % hidden == 0 and any(word in key for word in ("size", "dim", "width")):
            setattr(config, key, value // hidden * narrow)


def _cut_layers(config: Any) -> None:
    """Cut layers from the end, as long as every kind of layer remains."""
    num_layers = config.num_hidden_layers
    values = config.to_dict().items()
    per_layer = {key: value for key, value in values if isinstance(value, list | tuple) and len(value) == num_layers}
    # If every layer has a different value, as in a list of layer indices, the values do not denote kinds.
    of_kinds = [value for value in per_layer.values() if len({str(kind) for kind in value}) < num_layers]
    kinds = [str(kind) for kind in zip(*of_kinds, strict=True)] if of_kinds else [""] * num_layers
    kept = min(num_layers, max(_NUM_LAYERS, 1 + max(kinds.index(kind) for kind in set(kinds))))
    for key, value in per_layer.items():
        setattr(config, key, value[:kept])
    config.num_hidden_layers = kept


def _get(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:
        # transformers raises its own error for values that differ between layers.
        return None


def build_reduced_model(config: Any, kernel: str, **remote: bool) -> Any:
    """Build a model in fp32 on the CPU; weights that are initialized to zero also get noise."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=kernel, **remote)
    if (size := sum(p.numel() for p in blank.parameters())) > _MAX_PARAMETERS:
        raise ValueError(f"the reduced model has {size:,} parameters")
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel, **remote)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    return hf.eval()


def main() -> int:
    # With so many small operations, threads would only wait for each other. Set this before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        verdict = check_isolation(config.model, find_model(config.model).facts)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(verdict.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
