"""Measures whether the packed documents of a row affect each other in a model, and whether tokens see later ones.

One row holds three documents. Changing the first document must not move the logits of the second. Changing all tokens after the
middle of the second document is the control: attention is causal, so this moves the earlier logits by rounding only, for example
in a mixture of experts that groups the tokens differently.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.errors import ConfigError
from launcher.plan.architecture.problems import causality_problem, leak_problem, logits_problem
from launcher.plan.launch_plan import IsolationVerdict, LaunchPlan
from launcher.train.kernels.attention import VARLEN
from launcher.train.model import CausalLMLoss

DOCUMENT_TOKENS = 16
# From this multiple of the control, a move is not rounding.
_FACTOR = 10.0
# Attention counts as not causal if the control exceeds this multiple of the logits' resolution or, in coarse types, this share
# of the change of a document's own logits.
_NOT_CAUSAL, _NOT_CAUSAL_SHARE = 1000.0, 0.01
# Rounding may move logits that are computed in two ways by this share of the largest logit or, in coarse types, by this multiple
# of their resolution.
_SAME_LOGITS, _SAME_LOGITS_ROUNDINGS = 1e-3, 4
# Errors of models that need more than token ids.
_NEEDS_MORE = (TypeError, ValueError, AttributeError, KeyError, NotImplementedError)


class NotMeasurable(Exception):
    """The logits are not finite, or do not depend on the tokens."""


@dataclass(frozen=True)
class Isolation:
    """How far the logits of the first half of the second document move, as absolute maxima.

    `moved` is for changes of the first document, `control` for changes of all tokens after that half. `own` is how far the logits
    of a changed document itself move, `rounding` the resolution of the logits in fp32. `causal_limit` is how far rounding can
    move the control.
    """

    moved: float
    control: float
    own: float
    rounding: float
    causal_limit: float

    @property
    def is_causal(self) -> bool:
        """Return False if a document's logits depend on later tokens."""
        return self.control <= self.causal_limit

    @property
    def is_isolated(self) -> bool:
        """Return True if documents in a row do not affect each other."""
        return self.is_causal and self.moved <= _FACTOR * max(self.control, self.rounding)

    def describe(self) -> str:
        """Return the measured numbers as part of a sentence."""
        if not self.is_causal:
            return f"changing tokens moves the logits before them by {self.control:.2g}"
        return (
            f"changing a document moves the logits of the next one by {self.moved:.2g}, and rounding moves them by "
            f"{max(self.control, self.rounding):.2g}"
        )


@torch.no_grad()
def measure_isolation(
    forward: Callable[[Tensor, Tensor], Tensor], vocab_size: int, device: torch.device, num_trials: int = 2
) -> Isolation:
    """Measure with 1 + 2 x `num_trials` calls of `forward`, which maps ids and positions [1, T] to logits [1, T, V].

    Raises:
        NotMeasurable: if the logits are not finite, or do not depend on the tokens.
    """
    length, generator = DOCUMENT_TOKENS, torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, 3 * length), generator=generator)
    positions = torch.arange(length).repeat(3)[None].to(device)
    first, watched, later = slice(length), slice(length, length + length // 2), slice(length + length // 2, 3 * length)

    def logits(row: Tensor) -> Tensor:
        values = forward(row.to(device), positions)[0]
        if not torch.isfinite(values).all():
            raise NotMeasurable("the logits are not finite")
        return values

    def changed(tokens: slice) -> Tensor:
        row = ids.clone()
        shift = torch.randint(1, vocab_size, (tokens.stop - (tokens.start or 0),), generator=generator)
        row[0, tokens] = (row[0, tokens] + shift) % vocab_size
        return row

    row = logits(ids)
    resolution, before = torch.finfo(row.dtype).eps * float(row.abs().max()), row.float()
    moved, control, own = [], [], []
    for _ in range(num_trials):
        after_first, after_later = logits(changed(first)).float(), logits(changed(later)).float()
        moved.append(float((after_first - before)[watched].abs().max()))
        control.append(float((after_later - before)[watched].abs().max()))
        own.append(float((after_first - before)[first].abs().max()))
    if min(own) == 0:
        raise NotMeasurable("the logits do not depend on the tokens")
    rounding = torch.finfo(torch.float32).eps * float(before.abs().max())
    causal_limit = min(_NOT_CAUSAL * resolution, _NOT_CAUSAL_SHARE * min(own))
    # A leak moves the logits in every trial. Rounding may, by chance, move them in one trial and not in the control.
    return Isolation(min(moved), max(control), min(own), rounding, causal_limit)


def few_tokens(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the ids and positions [1, T] of a document whose logits are compared."""
    positions = torch.arange(DOCUMENT_TOKENS)[None]
    return positions % vocab_size, positions


def describe_logits_difference(by_model: Tensor, trained: Tensor) -> str:
    """Return how a model's logits differ from those that training computes; empty if they differ only by rounding."""
    if by_model.shape != trained.shape:
        return f"they have the shape {tuple(by_model.shape)} and not {tuple(trained.shape)}"
    resolution = torch.finfo(trained.dtype).eps
    moved, largest = float((by_model.float() - trained.float()).abs().max()), float(by_model.abs().max())
    if moved <= max(_SAME_LOGITS, _SAME_LOGITS_ROUNDINGS * resolution) * largest:
        return ""
    return f"they differ by {moved:.2g}, and the largest is {largest:.2g}"


@torch.no_grad()
def _logits_difference(engine: Any, vocab_size: int, device: torch.device) -> str:
    ids, positions = (tensor.to(device) for tensor in few_tokens(vocab_size))
    try:
        by_model = engine(ids, positions, by_model=True)
    except _NEEDS_MORE:
        # No later hook releases the weights that the pass has gathered.
        engine.empty_partition_cache()
        return ""
    return describe_logits_difference(by_model, engine(ids, positions))


def require_isolation(plan: LaunchPlan, engine: Any, model: CausalLMLoss, device: torch.device) -> str | None:
    """Measure the loaded model and return a message, unless the plan has a verdict for its attention kernel. Collective.

    Raises:
        ConfigError: if tokens see later ones, packed documents affect each other, or training computes other logits.
    """
    kernel, packing = model.hf.config._attn_implementation, plan.config.data.packing
    # On GPUs, the kernel of this name is not the one that the plan's verdict is about.
    is_other_kernel = kernel == VARLEN and device.type == "cuda"
    if not is_other_kernel and _is_accepted(plan.model.isolation, kernel, packing):
        return None
    boundaries = torch.arange(0, 3 * DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS, dtype=torch.int32)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = engine(ids, positions, None, 1.0, boundaries)
        return logits

    model.eval()
    try:
        isolation = measure_isolation(forward, plan.model.vocab_size, device)
        difference = _logits_difference(engine, plan.model.vocab_size, device)
    except NotMeasurable as error:
        condition = "packed documents affect each other" if packing else "the model sees later tokens"
        return f"whether {condition} could not be measured: {error}"
    finally:
        model.train()
    model_type = str(model.hf.config.model_type)
    if not isolation.is_causal:
        raise ConfigError(causality_problem(model_type, kernel, isolation.describe()))
    if difference:
        raise ConfigError(logits_problem(model_type, difference))
    if not packing:
        return f"the model sees no later tokens with the attention kernel {kernel}"
    if not isolation.is_isolated:
        raise ConfigError(leak_problem(model_type, kernel, isolation.describe()))
    return f"packed documents do not affect each other with the attention kernel {kernel}"


def _is_accepted(verdict: IsolationVerdict | None, kernel: str, packing: bool) -> bool:
    if verdict is None or (verdict.kernel, verdict.transformers) != (kernel, importlib.metadata.version("transformers")):
        return False
    return verdict.outcome == "isolated" or (verdict.outcome == "leaks" and not packing)
