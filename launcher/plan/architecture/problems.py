"""Reasons why a model cannot be trained, from its config.json and from what a check of its architecture found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.errors import Problem
from launcher.plan.launch_plan import IsolationVerdict, ModelFacts

# Config keys of architectures that transform their logits after the head, which the chunked loss does not do.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def architecture_problems(model: ModelFacts, packing: bool) -> Iterator[Problem]:
    """Yield the reasons why no device can train this model correctly; `packing` is whether rows hold several documents."""
    model_type = model.model_type
    yield from config_problems(model.config, "model.config")
    for name in _LOGIT_TRANSFORMS:
        if (value := model.config.get(name)) not in (None, 1, 1.0):
            message = f"this architecture transforms its logits ({name}={value}), which the chunked loss does not support"
            yield Problem(message, "model.path", model_type, "choose another model")
    if model.isolation is not None:
        yield from _verdict_problems(model_type, model.isolation, packing)


def _verdict_problems(model_type: str, verdict: IsolationVerdict, packing: bool) -> Iterator[Problem]:
    kernel, detail = verdict.kernel, verdict.detail
    if verdict.outcome == "not_causal":
        message = f"this architecture sees later tokens, with the attention kernel {kernel}: {detail}"
        yield Problem(message, "model.path", model_type, "choose a decoder-only language model")
    elif verdict.outcome == "leaks" and packing:
        message = f"packed documents affect each other in this architecture, with the attention kernel {kernel}: {detail}"
        yield Problem(message, "model.path", model_type, "set data.packing=false")
    elif verdict.outcome == "other_logits":
        message = (
            f"training computes logits as a linear layer of the last hidden states, and this architecture does not: {detail}"
        )
        yield Problem(message, "model.path", model_type, "choose another model")
    elif verdict.outcome == "unsupported":
        message = f"transformers {verdict.transformers} has no attention kernel {kernel} for this architecture"
        yield Problem(message, "model.attention", model_type, "set model.attention=auto")


def config_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield the reasons why this config.json is not of a model whose every parameter can be trained to predict the next token."""
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        remedy = "choose a decoder-only language model"
        yield Problem("model.path: this is an encoder-decoder model (is_encoder_decoder)", where, model_type, remedy)
    for part in ("vision_config", "audio_config"):
        if isinstance(config.get(part), dict):
            message = f"model.path: this model also takes images, video or sound ({part}), and only text models can be trained"
            yield Problem(message, where, model_type, "choose a language model, such as a preset (docs/presets.md)")
            break
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else str(quantization)
        message = f"model.path: the weights are quantized ({method}), and quantized weights cannot be trained"
        yield Problem(message, where, model_type, "choose the repository with the original weights in bf16, fp16 or fp32")
