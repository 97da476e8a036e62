"""How the layers of a run compute: the kernels that a plan assumes, and the layers that recompute their activations.

Pure: only the ranks know what they can import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.plan.architecture import has_attention_dropout
from launcher.plan.launch_plan import ModelFacts

# The values of model.activation_checkpointing, beside `every N`.
ALL, NONE, AUTO = "all", "none", "auto"
_EVERY = re.compile(r"every ([1-9][0-9]{0,3})")
FLASH_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen")
LIGER_PACKAGE = "liger-kernel"
# Dense architectures (model_type) that Liger has kernels for. Experts are excluded: Liger's are untested under ZeRO-3.
LIGER_ARCHITECTURES = (
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
)


@dataclass(frozen=True)
class Kernels:
    """How a layer computes: bytes per element, attention kernel, tokens per row, whether rows are packed, Liger.

    `compiled` is whether torch.compile makes its kernels.
    """

    width: int
    attention: str
    row_tokens: int
    packed: bool = True
    liger: bool = False
    compiled: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether elementwise operations are fused and keep only their inputs."""
        return self.liger or self.compiled


def attention_kernel(config: RunConfig, model: ModelFacts, device: str) -> str:
    """Return the attention kernel that a plan assumes. varlen also stands for FlashAttention, which keeps the same tensors.

    For `auto`, this is the kernel with which the model was probed, unless that kernel cannot compute this run's attention on
    GPUs.
    """
    chosen = config.model.attention
    if chosen != AUTO:
        return chosen
    probed = "varlen" if model.isolation is None else model.isolation.kernel
    if probed in (AUTO, "varlen"):
        cannot_use_varlen = config.model.dtype == "fp32" or has_attention_dropout(model)
        return "sdpa" if device == "cuda" and cannot_use_varlen else "varlen"
    return probed


def uses_liger(config: RunConfig, model: ModelFacts, device: str, packages: Mapping[str, str]) -> bool:
    """Return whether the ranks of a plan try Liger's kernels; `packages` are those installed here, with their versions."""
    section = config.model
    if section.liger != AUTO:
        return section.liger and device == "cuda"
    return has_liger_kernels(section, model, device) and (LIGER_PACKAGE in packages or may_lack_liger(config))


def may_lack_liger(config: RunConfig) -> bool:
    """Return whether only the ranks can tell if Liger is installed: `auto`, and they run in another Python than this one.

    The plan is then for the case without it. Planned for Liger, a run whose image lacks the package would be out of memory after
    its model has loaded on rented GPUs. The price is at most one step of micro-batch or recomputation, which model.liger=true
    takes back.
    """
    return config.model.liger == AUTO and not config.cluster.uses_own_python


def has_liger_kernels(section: ModelSection, model: ModelFacts, device: str) -> bool:
    """Return whether Liger can compute this model on this device. It does not know classes in code that comes with a model."""
    is_known = model.model_type in LIGER_ARCHITECTURES and not section.trust_remote_code
    return device == "cuda" and is_known


def describe_liger(config: RunConfig, model: ModelFacts, device: str, is_used: bool) -> str:
    """Return which of Liger's kernels a plan assumes and why, as one line about the plan; empty on CPUs."""
    section = config.model
    if device != "cuda":
        return ""
    if is_used and may_lack_liger(config):
        return "Liger's kernels if the ranks have liger-kernel, and planned without them (model.liger=true plans with them)"
    if is_used:
        return "Liger's kernels"
    if section.liger == AUTO and has_liger_kernels(section, model, device):
        return "without Liger, which is not installed here (pip install 'launcher[gpu]')"
    return "" if section.liger == AUTO else "without Liger (model.liger=false)"


def interval(checkpointing: str) -> int:
    """Return N if every Nth layer is recomputed: 1 for `all`, 0 for `none`.

    Raises:
        ValueError: for any other value, including `auto`.
    """
    if checkpointing in (ALL, NONE):
        return int(checkpointing == ALL)
    match = _EVERY.fullmatch(checkpointing)
    if match is None:
        raise ValueError(f"{checkpointing} is not all, none or every N")
    return int(match[1])


def checkpointed_layers(checkpointing: str, num_layers: int) -> tuple[bool, ...]:
    """Return, for each layer, whether it is recomputed: with `every N`, layers 0, N, 2N and so on.

    A recomputed layer needs the memory of a layer's activations a second time. If the last layer is not recomputed, its own
    activations are free by then.
    """
    every = interval(checkpointing)
    return tuple(every > 0 and layer % every == 0 for layer in range(num_layers))
