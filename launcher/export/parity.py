"""Parity check of an export: transformers loads the folder completely, and its logits match the engine's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from launcher.checkpoint.manifest import REFERENCE_LOGITS
from launcher.errors import CheckpointError
from launcher.models.remote_code import code_option

# The exported weights equal the engine's, so only kernels and the order of sums differ.
# bf16 and fp16 round each result to 2^-9 and 2^-12 of its size; over tens of layers that moves logits by some 0.05, and
# KL ~ Var(difference) / 2 ~ 1e-3. A weight that is wrong, missing or misplaced costs tenths of a nat. In fp32
# the same reasoning gives 1e-9; the bound leaves room for TF32 matrix products.
MAX_MEAN_KL_LOW_PRECISION = 1e-2
MAX_MEAN_KL_FP32 = 1e-5

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_KL_ROWS = 64
_FORWARD_TOKENS = 16


@dataclass(frozen=True)
class LogitParity:
    """Difference between the exported model's logits and the engine's on the same tokens.

    `mean_kl` is KL(engine || export) in nats, averaged over `num_tokens`; `top1_agreement` is a fraction;
    `max_mean_kl` is the bound for the dtypes that were compared.
    """

    max_abs_diff: float
    mean_kl: float
    top1_agreement: float
    num_tokens: int
    max_mean_kl: float


def build_on_meta(folder: Path, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """Build the model of `folder`'s config on the meta device. Raises CheckpointError if transformers cannot build it."""
    remote = code_option(trust_remote_code, folder)
    # transformers imports a class on first access, which must not happen on the meta device.
    model_class = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **remote)
        with torch.device("meta"):
            built: transformers.PreTrainedModel = model_class.from_config(
                config, attn_implementation=_choose_attention(config), **remote
            )
    except Exception as error:  # every user of the folder would get the same error
        message = f"{type(error).__name__}: {error}"
        raise CheckpointError("transformers cannot build the model", where=str(folder / "config.json"), value=message) from error
    return built


def require_same_tensors(built: transformers.PreTrainedModel, saved: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a model with those that a checkpoint holds. Raises CheckpointError if names or shapes differ."""
    tied = built.all_tied_weights_keys
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if name not in tied}
    differing = sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
    if not differing:
        return
    first = differing[0]
    raise CheckpointError(
        f"the model's config and the checkpoint differ in {len(differing)} tensors",
        value=f"{first}: {saved.get(first, 'absent')} in the checkpoint, {expected.get(first, 'absent')} by the config",
    )


def read_reference_logits(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """Read the tokens and reference logits of a checkpoint, None if it has none."""
    path = checkpoint / REFERENCE_LOGITS
    return load_file(path) if path.exists() else None


def choose_dtype(reference_logits: Mapping[str, torch.Tensor] | None, exported: str) -> str:
    """Return the dtype in which to load an export for the comparison.

    An engine in bf16 or fp16 rounds its fp32 weights, which moves the logits by more than its products do. An export in another
    dtype rounds less or differently, so it is loaded in the engine's.
    """
    engine = None if reference_logits is None else reference_logits["logits"].dtype
    return next((name for name, dtype in _DTYPES.items() if dtype == engine and name != "fp32"), exported)


def load_exported(
    folder: Path, *, dtype: str, device: str = "cpu", trust_remote_code: bool = False
) -> transformers.PreTrainedModel:
    """Load an exported folder with transformers in `dtype`; raise CheckpointError if any weight is missing or left over."""
    # Otherwise transformers' progress bar would appear in a rank's log.
    transformers.utils.logging.disable_progress_bar()
    remote = code_option(trust_remote_code, folder)
    try:
        attention = _choose_attention(transformers.AutoConfig.from_pretrained(folder, **remote))
        model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[dtype], attn_implementation=attention, **remote, output_loading_info=True
        )
    except Exception as error:  # every user of the folder would get the same error
        message = f"{type(error).__name__}: {error}"
        raise CheckpointError("transformers cannot load the exported folder", where=str(folder), value=message) from error
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in loading_info.items() if keys}:
        names = "; ".join(f"{kind}: {', '.join(keys[:3])}" for kind, keys in wrong.items())
        raise CheckpointError("transformers does not find the model's weights in the exported folder", value=names)
    return model.to(device).eval()


def _choose_attention(config: Any) -> str:
    """Return SDPA, or eager attention for architectures that do not support it; never a kernel that the config names."""
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


@torch.no_grad()
def require_finite(model: transformers.PreTrainedModel) -> None:
    """Run one short forward pass. Raises CheckpointError if its logits are not finite."""
    ids = torch.arange(_FORWARD_TOKENS, device=model.device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    if not torch.isfinite(model(input_ids=ids, use_cache=False).logits).all():
        raise CheckpointError(
            "the exported model's logits are not finite", remedy="export an earlier checkpoint, or lower optim.lr and train again"
        )


@torch.no_grad()
def check_parity(model: transformers.PreTrainedModel, reference_logits: Mapping[str, torch.Tensor], *, dtype: str) -> LogitParity:
    """Compare a loaded model's logits with the engine's.

    `reference_logits` holds `input_ids` [1, T], `position_ids` [1, T] and `logits` [1, T, V] in the engine's compute dtype.
    """
    device = model.device
    inputs = {key: reference_logits[key].to(device) for key in ("input_ids", "position_ids")}
    # With a cache, transformers does not detect from the position ids where packed documents begin.
    logits = model(**inputs, use_cache=False).logits[0]
    engine = reference_logits["logits"][0]
    max_abs_diff = kl = agree = 0.0
    for ours, theirs in zip(engine.split(_KL_ROWS), logits.split(_KL_ROWS), strict=True):
        p, q = ours.to(device).double(), theirs.double()
        difference = (p - q).abs().max().item()
        max_abs_diff = difference if not difference <= max_abs_diff else max_abs_diff
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    num_tokens = len(engine)
    both_fp32 = engine.dtype == torch.float32 and dtype == "fp32"
    bound = MAX_MEAN_KL_FP32 if both_fp32 else MAX_MEAN_KL_LOW_PRECISION
    return LogitParity(max_abs_diff, kl / num_tokens, agree / num_tokens, num_tokens, bound)


def require_parity(parity: LogitParity) -> None:
    """Raise CheckpointError if the exported model's logits differ by more than rounding: see the comment on `MAX_MEAN_KL_*`."""
    if not parity.mean_kl <= parity.max_mean_kl:  # a NaN fails as well
        raise CheckpointError(
            "the exported model's logits differ from the trained model's",
            value=(
                f"mean KL {parity.mean_kl:.3g} nats over {parity.num_tokens} tokens, rounding explains {parity.max_mean_kl:g}; "
                f"largest logit difference {parity.max_abs_diff:.3g}, same most likely token for {parity.top1_agreement:.1%}"
            ),
            remedy="verify the checkpoint, and export it in the dtype used in training",
        )
