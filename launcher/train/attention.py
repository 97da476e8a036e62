"""Attention kernels: chooses the one that a model computes with, and adds `varlen`, which needs only torch.

SDPA computes all pairs of tokens in a row and masks most of them. `varlen` computes each packed document separately: with torch's
variable-length FlashAttention on GPUs, and with one causal SDPA per document on CPUs.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError

VARLEN = "varlen"
# Architectures whose FlashAttention attends across documents: transformers does not pass document boundaries to it.
FLASH_CROSSES_DOCUMENTS = ("gpt_neo",)
# FlashAttention's packages, fastest first: kernel, module to import, and the compute capabilities it is built for.
_FLASH_KERNELS = (
    ("flash_attention_4", "flash_attn.cute", (9, 10)),
    ("flash_attention_3", "flash_attn_interface", (9,)),
    ("flash_attention_2", "flash_attn", (8, 9, 10, 12)),
)
# Arguments that change the result and that neither SDPA nor the variable-length kernel supports.
_UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias")


def choose_kernel(model: ModelSection, device: torch.device, config: Any) -> str:
    """Return the attention kernel for a model with this transformers config: the configured one, else the fastest available.

    Raises:
        ConfigError: if FlashAttention is configured and its package is missing: transformers would fetch a kernel from the Hub.
    """
    chosen = model.attention
    if chosen != "auto":
        if any(kernel == chosen and not _can_import(module) for kernel, module, _ in _FLASH_KERNELS):
            message = f"model.attention: {chosen} is not installed here, and the launcher does not use code from the Hub instead"
            remedy = "install flash-attn, or leave model.attention=auto"
            raise ConfigError(message, where="model.attention", value=chosen, remedy=remedy)
        return chosen
    if device.type == "cuda" and can_flash(model, config):
        from transformers import utils

        major, _ = torch.cuda.get_device_capability(device)
        for kernel, module, capabilities in _FLASH_KERNELS:
            is_installed = getattr(utils, f"is_flash_attn_{kernel[-1]}_available", lambda: False)
            # Only the import tells whether it works, not package metadata.
            if major in capabilities and is_installed() and _can_import(module):
                return kernel
    if can_varlen(model, config, device):
        return VARLEN
    return "sdpa" if _has(config, "_supports_sdpa", default=True) else "eager"


def kernel_of(config: Any) -> str:
    """Return the attention kernel of a model; transformers has a public way to set it, but none to read it."""
    return str(config._attn_implementation)


def choose_plain_kernel(config: Any) -> str:
    """Return sdpa, or the kernel that trains if SDPA cannot compute this architecture's attention."""
    has_softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    can_sdpa = _has(config, "_supports_sdpa", default=True) and not has_softcap
    return "sdpa" if can_sdpa and kernel_of(config) != "eager" else kernel_of(config)


def describe(config: Any, packing: bool) -> str:
    """Return a message that names the attention kernel, and whether it is slow for packed documents."""
    kernel = kernel_of(config)
    is_slow = packing and kernel in ("sdpa", "eager")
    slow = ", which computes all pairs of a row: packed documents are slow; model.attention=auto and flash-attn may help"
    return f"attention is computed by {kernel}{slow if is_slow else ''}"


def can_flash(model: ModelSection, config: Any) -> bool:
    """Return whether FlashAttention can compute this model in its dtype without attending across documents."""
    if model.dtype == "fp32" or config.model_type in FLASH_CROSSES_DOCUMENTS:
        return False
    return _has(config, "_supports_flash_attn", default=False)


def can_varlen(model: ModelSection, config: Any, device: torch.device) -> bool:
    """Return whether `varlen` computes this architecture's attention exactly."""
    # Chunked attention is encoded only in the mask.
    if getattr(config.get_text_config(), "attention_chunk_size", None) is not None:
        return False
    flags = ("_supports_attention_backend", "_supports_flash_attn", "_supports_sdpa")
    if not all(_has(config, flag, default=False) for flag in flags):
        return False
    if device.type != "cuda":
        return True
    has_dropout = bool(getattr(config.get_text_config(), "attention_dropout", 0))
    return can_flash(model, config) and not has_dropout and {"scale", "window_size"} <= _varlen_parameters()


def register_varlen() -> None:
    """Register the kernel `varlen` with transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(VARLEN, attend_within_documents)
    # cu_seqlens holds the document boundaries, so no mask is needed.
    AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)


def attend_within_documents(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface: query [B, H, T, D], key and value [B, KV, T, D]; returns [B, T, H, D].

    With `cu_seq_lens_q`, int32 [n + 1], B is 1 and no token attends beyond its document; without it, each row is one document.
    `sliding_window` is the number of tokens that a token attends to, including itself.

    Raises:
        ValueError: if a mask or another argument would change the result.
    """
    given = [name for name in _UNSUPPORTED_ARGUMENTS if others.get(name) is not None]
    if attention_mask is not None or given:
        raise ValueError(
            f"the attention kernel {VARLEN} does not support {', '.join(given) or 'a mask'}: set model.attention=eager"
        )
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is None:
        attended = _attend(query, key, value, dropout, scale, is_causal, sliding_window)
        return attended.transpose(1, 2).contiguous(), None
    if query.is_cuda:
        longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        if is_causal:
            window = (window[0], 0)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return _varlen_on_gpu(q, k, v, cu_seq_lens_q, longest, scale, window)[None], None
    # The gradient of a split is one concatenation; the gradient of a slice is a full-row tensor per document.
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = [_attend(q, k, v, dropout, scale, is_causal, sliding_window).transpose(1, 2) for q, k, v in documents]
    return torch.cat(parts, dim=1), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, is_causal: bool, window: int | None
) -> Tensor:
    """Attend within whole rows: [B, H, T, D]."""
    length, mask = query.shape[2], None
    if window is not None and window < length:
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        mask = (distance < window) & ((distance >= 0) if is_causal else (distance > -window))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _varlen_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: tuple[int, int]
) -> Tensor:
    """Attend within documents: query [T, H, D], key and value [T, KV, D]; returns [T, H, value dim]."""
    from torch.nn.attention.varlen import varlen_attn

    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim < head_dim:
        value = pad(value, [0, head_dim - value_dim])
    grouped = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_parameters():
            grouped = {"enable_gqa": True}
        else:
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    attended: Tensor = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window, **grouped
    )
    return attended[..., :value_dim]


@cache
def _varlen_parameters() -> frozenset[str]:
    """Return the parameter names of torch's variable-length attention; empty if torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _can_import(module: str) -> bool:
    try:
        importlib.import_module(module)
    # A build for another torch version fails with an OSError or an undefined symbol.
    except Exception:
        return False
    return True


def _has(config: Any, flag: str, default: bool) -> bool:
    """Return a flag of the model class for this config; `default` if transformers does not have the class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), flag, default))
