"""Probes whether a model sees later tokens or neighboring documents: `python -m launcher.worker.checks.isolation_check`.

Reads a RunConfig as JSON from standard input, stores the verdict (launcher.models.isolation_verdicts) and prints it as JSON.
The probe uses a small random model of the same architecture, so it needs no weights and no GPU.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import model_source
from launcher.config.schema import ModelSection, RunConfig
from launcher.data import cache_dir
from launcher.errors import LauncherError, RunError
from launcher.models import isolation_verdicts
from launcher.models.private_code import code_option, folder_to_load
from launcher.models.remote_code import without_code
from launcher.plan.launch_plan import IsolationVerdict, ModelFacts
from launcher.worker import limits

if TYPE_CHECKING:
    from launcher.train.model import CausalLMLoss

# transformers' message for a kernel that an architecture does not support.
_UNSUPPORTED = "does not support an attention implementation"
_CPU_KERNELS = ("auto", "varlen", "sdpa", "eager")


def check(model: ModelSection, facts: ModelFacts) -> IsolationVerdict:
    """Probe a reduced model, store the verdict and return it.

    Raises:
        DataError: if the launcher's cache cannot be written.
        RunError: if this machine has no memory, processes, files or disk space left for the probe; then nothing is stored.
    """
    kernel, outcome, detail = _probe(model, facts)
    version = isolation_verdicts.transformers_version()
    verdict = IsolationVerdict(outcome=outcome, kernel=kernel, transformers=version, detail=detail)
    isolation_verdicts.save(facts, model, verdict)
    return verdict


def _probe(model: ModelSection, facts: ModelFacts) -> tuple[str, Any, str]:
    """Return a verdict's attention kernel, outcome and detail."""
    if model.attention not in _CPU_KERNELS:
        return model.attention, "unknown", f"{model.attention} needs a GPU"
    import torch
    from transformers import AutoConfig

    from launcher.train.isolation import NotMeasurable, measure_isolation
    from launcher.train.kernels import attention
    from launcher.train.model import CausalLMLoss
    from launcher.worker.checks import reduced_model

    folder = folder_to_load(Path(facts.path), model.trust_remote_code, model.code_digest) if facts.path else None
    remote = code_option(model.trust_remote_code, folder)
    reasons, differences, is_measured = [], [], False
    try:
        config = AutoConfig.from_pretrained(folder, **remote) if folder else AutoConfig.for_model(**without_code(facts.config))
        candidates = list(reduced_model.reductions(config))
    except Exception as error:
        _require_resources(error)
        return model.attention, "unknown", _describe(error)
    device = torch.device("cpu")
    kernel = attention.choose_kernel(model, device, config)
    if kernel == attention.VARLEN:
        if not attention.can_varlen(model, config, device):
            return kernel, "unsupported", ""
        attention.register_varlen()
    for reduced in candidates:
        hf = None
        try:
            hf = reduced_model.build(reduced.config, kernel, **remote)
            trained = CausalLMLoss(hf, flatten=kernel == attention.VARLEN).eval()
            isolation = measure_isolation(trained, _num_embeddings(hf), device)
            difference = _logits_difference(hf, trained)
        except Exception as error:
            _require_resources(error)
            if _UNSUPPORTED in str(error):
                return kernel, "unsupported", ""
            if hf is not None and not isinstance(error, NotMeasurable) and _own_logits(hf) is not None:
                differences.append(f"it fails with {_describe(error)}")
            # Not every architecture can be built or run at every reduced size.
            if reduced.is_complete:
                reasons.append(_describe(error))
            continue
        is_measured = True
        if not isolation.is_causal:
            return kernel, "not_causal", isolation.describe()
        if difference:
            return kernel, "other_logits", difference
        if not isolation.is_isolated:
            return kernel, "leaks", isolation.describe()
        if reduced.is_complete:
            return kernel, "isolated", ""
    if differences and not is_measured:
        return kernel, "other_logits", differences[0]
    return kernel, "unknown", reasons[0]


def _require_resources(error: Exception) -> None:
    """Raise RunError if a limit of this machine caused `error`, which then says nothing about the architecture."""
    if limit := limits.cause_of(error, cache_dir.cache_root()):
        raise RunError(f"{limit}: {_describe(error)}") from error


def _own_logits(hf: Any) -> Any:
    """Return the model's own logits for a few tokens, or None if they cannot be computed from ids alone.

    Instead of `varlen`, they are computed with one of transformers' attention implementations.
    """
    import torch

    from launcher.train.isolation import few_tokens
    from launcher.train.kernels import attention

    kernel = hf.config._attn_implementation
    try:
        if kernel == attention.VARLEN:
            hf.set_attn_implementation("sdpa")
        with torch.no_grad():
            return hf(input_ids=few_tokens(_num_embeddings(hf))[0], use_cache=False).logits
    except Exception as error:
        _require_resources(error)
        return None
    finally:
        hf.set_attn_implementation(kernel)


def _num_embeddings(hf: Any) -> int:
    return int(hf.get_input_embeddings().num_embeddings)


def _logits_difference(hf: Any, model: CausalLMLoss) -> str:
    """Return how the model's own logits differ from training's; empty if they do not differ, or if the model has none."""
    import torch

    from launcher.train.isolation import describe_logits_difference, few_tokens

    own = _own_logits(hf)
    if own is None:
        return ""
    with torch.no_grad():
        return describe_logits_difference(own, model(*few_tokens(_num_embeddings(hf))))


def _describe(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # A first line with this ending announces the reason.
    return f"{type(error).__name__}: {lines[-1] if lines[0].endswith(':') else lines[0]}"[:200]


def main() -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # With so many small operations, threads would only wait for each other. Set this before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        verdict = check(config.model, model_source.read_model_facts(config.model))
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    print(verdict.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
