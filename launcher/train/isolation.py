"""Probes whether the packed documents of a row affect each other in a model, and whether tokens see later ones.

One row holds three documents. Changing the first document must not move the logits of the second. Changing all tokens after the
middle of the second document is the control: attention is causal, so this moves the earlier logits by rounding only, for example
in a mixture of experts that groups the tokens differently. The logits that training computes, a linear layer of the last hidden
states, must also be those of the model.

`launcher.worker.checks.model_check` probes a small model of the architecture before a run, the ranks their loaded model.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from launcher.errors import ConfigError
from launcher.plan.architecture import architecture_problems
from launcher.plan.launch_plan import IsolationVerdict, LaunchPlan, Outcome
from launcher.train.attention import VARLEN, kernel_of
from launcher.train.model import CausalLMLoss

# Maps token ids and positions [1, T] to logits [1, T, V].
Forward = Callable[[Tensor, Tensor], Tensor]
DOCUMENT_TOKENS = 16
_NUM_TRIALS = 2
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


@torch.no_grad()
def probe(
    forward: Forward, own_logits: Callable[[Tensor, Tensor], Tensor | None], vocab_size: int, device: torch.device
) -> tuple[Outcome, str]:
    """Return the outcome and the measured numbers; `own_logits` computes the model's own logits, None if it cannot."""
    outcome, detail = measure_isolation(forward, vocab_size, device)
    if outcome in ("not_causal", "unknown"):
        return outcome, detail
    positions = torch.arange(DOCUMENT_TOKENS, device=device)[None]
    if (own := own_logits(positions % vocab_size, positions)) is None:
        return outcome, detail
    trained = forward(positions % vocab_size, positions)
    if own.shape != trained.shape:
        return "other_logits", f"they have the shape {tuple(own.shape)} and not {tuple(trained.shape)}"
    moved, largest = float((own.float() - trained.float()).abs().max()), float(own.abs().max())
    if moved > max(_SAME_LOGITS, _SAME_LOGITS_ROUNDINGS * torch.finfo(trained.dtype).eps) * largest:
        return "other_logits", f"they differ by {moved:.2g}, and the largest is {largest:.2g}"
    return outcome, detail


@torch.no_grad()
def measure_isolation(forward: Forward, vocab_size: int, device: torch.device) -> tuple[Outcome, str]:
    """Return isolated, leaks or not_causal with the measured numbers, after five calls of `forward`.

    The outcome is unknown if the logits are not finite, or do not depend on the tokens.
    """
    length, generator = DOCUMENT_TOKENS, torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, 3 * length), generator=generator)
    positions = torch.arange(length).repeat(3)[None].to(device)
    first, watched, later = slice(length), slice(length, length + length // 2), slice(length + length // 2, 3 * length)

    def changed(tokens: slice) -> Tensor:
        row = ids.clone()
        shift = torch.randint(1, vocab_size, (tokens.stop - (tokens.start or 0),), generator=generator)
        row[0, tokens] = (row[0, tokens] + shift) % vocab_size
        return row

    rows = [ids, *(changed(tokens) for _ in range(_NUM_TRIALS) for tokens in (first, later))]
    row, *after = (forward(row.to(device), positions)[0] for row in rows)
    if not all(torch.isfinite(logits).all() for logits in (row, *after)):
        return "unknown", "the logits are not finite"
    before = row.float()

    def moved_by(logits: Tensor, tokens: slice) -> float:
        return float((logits.float() - before)[tokens].abs().max())

    after_first, after_later = after[::2], after[1::2]
    moves, controls = [moved_by(logits, watched) for logits in after_first], [moved_by(logits, watched) for logits in after_later]
    owns = [moved_by(logits, first) for logits in after_first]
    if min(owns) == 0:
        return "unknown", "the logits do not depend on the tokens"
    # A leak moves the logits in every trial. Rounding may, by chance, move them in one trial and not in the control.
    moved, control = min(moves), max(controls)
    if control > min(_NOT_CAUSAL * torch.finfo(row.dtype).eps * float(row.abs().max()), _NOT_CAUSAL_SHARE * min(owns)):
        return "not_causal", f"changing tokens moves the logits before them by {control:.2g}"
    rounding = max(control, torch.finfo(torch.float32).eps * float(before.abs().max()))
    numbers = f"changing a document moves the logits of the next one by {moved:.2g}, and rounding moves them by {rounding:.2g}"
    return "isolated" if moved <= _FACTOR * rounding else "leaks", numbers


def require_isolation(plan: LaunchPlan, engine: Any, model: CausalLMLoss, device: torch.device) -> str | None:
    """Probe the loaded model and return a message, unless the plan has a verdict for its attention kernel. Collective.

    Raises:
        ConfigError: if tokens see later ones, packed documents affect each other, or training computes other logits.
    """
    kernel, packing, version = kernel_of(model.hf.config), plan.config.data.packing, importlib.metadata.version
    known = plan.model.isolation
    # On GPUs, the kernel of this name is not the one that the plan's verdict is about.
    if known is not None and (known.kernel, known.transformers) == (kernel, version("transformers")):
        is_accepted = known.outcome == "isolated" or (known.outcome == "leaks" and not packing)
        if is_accepted and not (kernel == VARLEN and device.type == "cuda"):
            return None
    boundaries = torch.arange(0, 3 * DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS, dtype=torch.int32)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = engine(ids, positions, None, 1.0, boundaries if ids.shape[1] == boundaries[-1] else None)
        return logits

    def own_logits(ids: Tensor, positions: Tensor) -> Tensor | None:
        try:
            logits: Tensor = engine(ids, positions, by_model=True)
        except _NEEDS_MORE:
            # No later hook releases the weights that the pass has gathered.
            engine.empty_partition_cache()
            return None
        return logits

    model.eval()
    try:
        outcome, detail = probe(forward, own_logits, plan.model.vocab_size, device)
    finally:
        model.train()
    if outcome == "unknown":
        condition = "packed documents affect each other" if packing else "the model sees later tokens"
        return f"whether {condition} could not be measured: {detail}"
    verdict = IsolationVerdict(outcome=outcome, kernel=kernel, transformers=version("transformers"), detail=detail)
    if problems := list(architecture_problems(plan.model.model_copy(update={"isolation": verdict}), packing)):
        raise ConfigError(problems)
    measured = "packed documents do not affect each other" if packing else "the model sees no later tokens"
    return f"{measured} with the attention kernel {kernel}"
