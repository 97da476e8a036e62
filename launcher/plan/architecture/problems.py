"""Reasons why a model cannot be trained, from its config.json and from what a check of its architecture found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.errors import Problem
from launcher.plan.launch_plan import ModelFacts

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
    isolation = model.isolation
    if isolation is not None and isolation.outcome == "not_causal":
        yield causality_problem(model_type, isolation.kernel, isolation.detail)
    if isolation is not None and isolation.outcome == "leaks" and packing:
        yield leak_problem(model_type, isolation.kernel, isolation.detail)
    if isolation is not None and isolation.outcome == "other_logits":
        yield logits_problem(model_type, isolation.detail)
    if isolation is not None and isolation.outcome == "unsupported":
        message = f"transformers {isolation.transformers} has no attention kernel {isolation.kernel} for this architecture"
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


def leak_problem(model_type: str, kernel: str, detail: str) -> Problem:
    """Return the problem of a model in which packed documents affect each other; `detail` states the measured numbers."""
    message = f"packed documents affect each other in this architecture, with the attention kernel {kernel}: {detail}"
    return Problem(message, "model.path", model_type, "set data.packing=false")


def logits_problem(model_type: str, detail: str) -> Problem:
    """Return the problem of a model that computes its logits differently from training."""
    message = f"training computes logits as a linear layer of the last hidden states, and this architecture does not: {detail}"
    return Problem(message, "model.path", model_type, "choose another model")


def causality_problem(model_type: str, kernel: str, detail: str) -> Problem:
    """Return the problem of a model that sees the tokens that it is trained to predict."""
    message = f"this architecture sees later tokens, with the attention kernel {kernel}: {detail}"
    return Problem(message, "model.path", model_type, "choose a decoder-only language model")
