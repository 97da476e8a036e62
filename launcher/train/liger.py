"""Liger's fused kernels for norms, rotary embedding and MLP: used only in the model that trains.

Besides those of the given instance, Liger replaces classes and functions in transformers' modules. A model that is built later,
for example to verify the export, would compute with Triton kernels, which do not run on CPUs.

Package metadata does not tell whether Liger works. A build for another torch or transformers fails on import, and Triton fails in
its first kernel if it finds no compiler. So each rank tries the kernels before the weights load, and no rank uses Liger if any
fails.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.distributed import gather_json
from launcher.errors import ConfigError, describe
from launcher.hardware import missing_build_tools
from launcher.plan.sizing.layers import may_lack_liger
from launcher.shell_commands import launcher_command

# Sizes of the trial; heads have 16 dimensions.
_WIDTH, _MLP_WIDTH, _TOKENS = 64, 128, 8
_MOST_CHARACTERS = 300
# What Liger replaced in this process: module, name, and original value.
_replaced: list[tuple[ModuleType, str, Any]] = []


def find_problem(section: ModelSection, model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return why the ranks train without Liger; empty if all of them can use it. Collective.

    Raises:
        ConfigError: on all ranks, if model.liger is true and Liger cannot be used on one of them.
    """
    return _agree_on_problem(section, device, lambda: try_kernels(model_type, device, dtype))


def apply(hf: Any, section: ModelSection, device: torch.device) -> str:
    """Make a model compute with Liger's kernels; return why it does not, empty if it does. Collective.

    Call `undo` before building another model.

    Raises:
        ConfigError: on all ranks, if model.liger is true and Liger cannot be applied on one of them.
    """
    before = [(part, dict(vars(part))) for part in hf.modules()]
    is_applied = False
    try:
        problem = _agree_on_problem(section, device, lambda: _replace_kernels(hf))
        is_applied = not problem and any(vars(part).get("forward") is not values.get("forward") for part, values in before)
    finally:
        if not is_applied:
            undo()
            for part, values in before:
                vars(part).clear()
                vars(part).update(values)
    if is_applied:
        return ""
    return problem or f"Liger has no kernels for this architecture ({hf.config.model_type})"


def undo() -> None:
    """Restore what Liger replaced outside the model. The model must not compute afterwards."""
    while _replaced:
        setattr(*_replaced.pop())


def describe_use(problem: str, config: RunConfig, run: Path) -> str:
    """Return a message about Liger in a run that tried it; `problem` is why it is not used, empty if it is used."""
    if not problem:
        return "norms, rotary embedding and MLP are computed by Liger"
    if may_lack_liger(config):
        return f"{problem}. The plan's memory is for this case"
    resume = launcher_command("resume", run, "model.liger=false")
    return f"{problem}. The micro-batch was planned for Liger; if it does not fit without Liger, plan another one: {resume}"


def try_kernels(model_type: str, device: torch.device, dtype: torch.dtype) -> None:
    """Import the parts of Liger that this model type needs; compute a small norm, rotary embedding and MLP, with gradients.

    Raises:
        Exception: whatever Liger, Triton or the GPU's driver raises.
    """
    # The package imports the second module only on request, and transformers' own modules with it.
    from liger_kernel.transformers import (
        LigerGEGLUMLP,
        LigerRMSNorm,
        LigerSwiGLUMLP,
        _apply_liger_kernel_to_instance,  # noqa: F401
        liger_rotary_pos_emb,
    )

    sizes = SimpleNamespace(hidden_size=_WIDTH, intermediate_size=_MLP_WIDTH, hidden_act="silu")
    mlp_class = LigerGEGLUMLP if model_type.startswith("gemma") else LigerSwiGLUMLP
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    # Keep the random state, because the initial weights of a model follow from the seed.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        for part in (LigerRMSNorm(_WIDTH), mlp_class(sizes)):
            hidden = torch.randn(1, _TOKENS, _WIDTH, **options, requires_grad=True)
            _require_finite_gradients((hidden,), (part.to(**options)(hidden),))
        query, key = (torch.randn(1, heads, _TOKENS, 16, **options, requires_grad=True) for heads in (4, 2))
        angles = torch.rand(1, _TOKENS, 16, device=device)
        rotated = liger_rotary_pos_emb(query, key, angles.cos().to(dtype), angles.sin().to(dtype))
        _require_finite_gradients((query, key), rotated)


def _require_finite_gradients(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    gradients = torch.autograd.grad(sum(output.float().square().mean() for output in outputs), inputs)
    # Reading the result waits for the GPU, which reports a failed kernel only then.
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise ArithmeticError("Liger's kernels computed gradients that are not finite")


def _agree_on_problem(section: ModelSection, device: torch.device, action: Callable[[], None]) -> str:
    """Run an action; return the problem, the same on all ranks, if it fails on any. Collective."""
    reason = remedy = ""
    try:
        action()
    # A build for another torch, transformers or Triton may raise any exception.
    except Exception as error:
        reason = describe(error).strip().splitlines()[0][:_MOST_CHARACTERS]
        remedy = "pip install --upgrade 'launcher[gpu]', and see what python -m launcher doctor says about Liger on this machine"
        if importlib.util.find_spec("liger_kernel") is None:
            remedy = "install liger-kernel where the ranks run, in their image if they have one: pip install 'launcher[gpu]'"
        elif problems := missing_build_tools(device.type):
            remedy = "; ".join(f"{problem.message}: {problem.remedy}" for problem in problems)
    if dist.is_initialized():
        failed = torch.tensor(int(bool(reason)), device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        answers = enumerate(gather_json([reason, remedy])) if failed else ()
        reason, remedy = next(((f"rank {rank}: {one}", other) for rank, (one, other) in answers if one), ("", ""))
    if not reason:
        return ""
    if section.liger is True:
        raise ConfigError("Liger cannot be used", where="model.liger", value=reason, remedy=f"{remedy}; or set model.liger=auto")
    return f"training runs without Liger, slower than planned, because it cannot be used ({reason}): {remedy}"


def _replace_kernels(hf: Any) -> None:
    """Apply Liger, and record what it replaces outside the model, even if it fails."""
    # Liger has a public function for each architecture; this one chooses among them by the loaded model.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # transformers' lazy modules, which have another type, would import every name that is looked up in them.
    of_transformers = (
        module
        for name, module in [*sys.modules.items()]
        if name.startswith("transformers.models.") and type(module) is ModuleType
    )
    before = [(module, dict(vars(module))) for module in (torch.nn, *of_transformers)]
    try:
        # The head is the launcher's own and computes the loss.
        _apply_liger_kernel_to_instance(hf, fused_linear_cross_entropy=False, cross_entropy=False)
    finally:
        for module, values in before:
            _replaced.extend((module, name, value) for name, value in values.items() if vars(module).get(name) is not value)
