"""The kernels that a plan assumes its ranks use. Pure: only the ranks know what they can import."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.config.schema import ModelSection, RunConfig
from launcher.plan.launch_plan import ModelFacts
from launcher.plan.sizing.checkpointed_layers import AUTO

LIGER_PACKAGE = "liger-kernel"
# Dense architectures (model_type) that Liger has kernels for. Experts are excluded: Liger's are untested under ZeRO-3.
LIGER_ARCHITECTURES = (
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
)


def attention_kernel(config: RunConfig, model: ModelFacts, device: str) -> str:
    """Return the attention kernel that a plan assumes. varlen also stands for FlashAttention, which keeps the same tensors.

    For `auto`, this is the kernel with which the model was probed, unless that kernel cannot compute this run's attention on
    GPUs.
    """
    chosen = config.model.attention
    if chosen != AUTO:
        return chosen
    probed = "varlen" if model.isolation is None else model.isolation.kernel
    has_dropout = bool(model.config.get("attention_dropout"))
    if probed in (AUTO, "varlen"):
        return "sdpa" if device == "cuda" and (config.model.dtype == "fp32" or has_dropout) else "varlen"
    return probed


def uses_liger(section: ModelSection, model: ModelFacts, device: str, packages: Mapping[str, str]) -> bool:
    """Return whether a plan assumes Liger's kernels; `packages` are the packages installed here, with their versions."""
    if section.liger != "auto":
        return section.liger and device == "cuda"
    return has_liger_kernels(section, model, device) and LIGER_PACKAGE in packages


def has_liger_kernels(section: ModelSection, model: ModelFacts, device: str) -> bool:
    """Return whether Liger can compute this model on this device. It does not know classes in code that comes with a model."""
    is_known = model.config.get("model_type") in LIGER_ARCHITECTURES and not section.trust_remote_code
    return device == "cuda" and is_known


def describe_liger(section: ModelSection, model: ModelFacts, device: str, is_used: bool) -> str:
    """Return which of Liger's kernels a plan assumes and why, as one line about the plan; empty on CPUs."""
    if device != "cuda":
        return ""
    if is_used:
        return "Liger's kernels"
    if section.liger == AUTO and has_liger_kernels(section, model, device):
        return "without Liger, which is not installed here (pip install 'launcher[gpu]')"
    return "" if section.liger == AUTO else "without Liger (model.liger=false)"
