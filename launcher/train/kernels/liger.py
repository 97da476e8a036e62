"""Liger's fused kernels for norms, rotary embedding and MLP: in the model that trains, and in no other.

Liger replaces classes and functions in transformers' modules, beside those of the instance that it is given. A model that is
built later, as for the check of the export, would compute with Triton kernels, which CPUs do not have.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.schema import ModelSection
from launcher.errors import ConfigError

# What Liger has replaced in this process: module, name, and what was there.
_replaced: list[tuple[ModuleType, str, Any]] = []


def use_liger(hf: Any, section: ModelSection, device: torch.device) -> str:
    """Let a model compute with Liger's kernels; returns why it does not, empty where it does. Collective.

    `undo` has to follow before another model is built.

    Raises:
        ConfigError: on all ranks, where model.liger is true and Liger cannot be imported on one of them.
    """
    problem = _import_problem()
    failed = torch.tensor(int(bool(problem)), device=device)
    if dist.is_initialized():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed:
        problem = problem or "it fails on another rank"
        if section.liger is True:
            remedy = "pip install 'launcher[gpu]', or set model.liger=auto"
            raise ConfigError("Liger cannot be imported", where="model.liger", value=problem, remedy=remedy)
        return f"training is without Liger, slower and with more memory than planned: it cannot be imported ({problem})"
    return "" if _apply(hf) else f"Liger has no kernels for this architecture ({hf.config.model_type})"


def undo() -> None:
    """Put back what Liger has replaced outside of the model, which must not compute any more."""
    while _replaced:
        setattr(*_replaced.pop())


def _import_problem() -> str:
    """Return why Liger cannot be imported, empty where it can; metadata do not tell."""
    try:
        importlib.import_module("liger_kernel.transformers")
    # A build for another torch or Triton fails with anything.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _apply(hf: Any) -> bool:
    """Apply Liger, and note what it replaces elsewhere; returns whether any module of the model has changed."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    before = [(module, dict(vars(module))) for module in _shared_modules()]
    forwards = {part: vars(part).get("forward") for part in hf.modules()}
    # The head is the launcher's own, and computes the loss.
    _apply_liger_kernel_to_instance(hf, fused_linear_cross_entropy=False, cross_entropy=False)
    for module, values in before:
        _replaced.extend((module, name, value) for name, value in values.items() if vars(module).get(name) is not value)
    return any(vars(part).get("forward") is not forward for part, forward in forwards.items())


def _shared_modules() -> Iterator[ModuleType]:
    yield torch.nn
    for name, module in [*sys.modules.items()]:
        # transformers' lazy modules, of another type, would import whatever is looked up in them.
        if name.startswith("transformers.models.") and type(module) is ModuleType:
            yield module
