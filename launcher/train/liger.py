"""Liger's fused kernels for norms, rotary embedding and MLP: used only in the model that trains.

Besides those of the given instance, Liger replaces classes and functions in transformers' modules. A model that is built later,
for example to verify the export, would compute with Triton kernels, which do not run on CPUs.

Package metadata does not tell whether Liger works. A build for another torch or transformers fails on import, and Triton fails in
its first kernel if it finds no compiler. So each rank imports Liger and looks for a compiler before the weights load, and no rank
uses Liger if any fails.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.distributed import gather_json
from launcher.errors import ConfigError, RunError, describe
from launcher.hardware import missing_build_tools
from launcher.plan.sizing.layers import may_lack_liger
from launcher.shell_commands import launcher_command

_MOST_CHARACTERS = 300
# What Liger replaced in this process: module, name, and original value.
_replaced: list[tuple[ModuleType, str, Any]] = []


def find_problem(section: ModelSection, device: torch.device) -> str:
    """Return why the ranks train without Liger; empty if all of them can use it. Collective.

    Raises:
        ConfigError: on all ranks, if model.liger is true and Liger cannot be used on one of them.
    """

    def import_liger() -> None:
        # The package imports this name's module, and transformers' own modules with it, only on request.
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # noqa: F401

        if device.type == "cuda" and (problems := missing_build_tools(device.type)):
            raise RunError(problems)

    return _agree_on_problem(section, device, import_liger)


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
    """Return a message about Liger in a run that may use it; `problem` is why it is not used, empty if it is used."""
    if not problem:
        return "norms, rotary embedding and MLP are computed by Liger"
    if may_lack_liger(config):
        return f"{problem}. The plan's memory is for this case"
    resume = launcher_command("resume", run, "model.liger=false")
    return f"{problem}. The micro-batch was planned for Liger; if it does not fit without Liger, plan another one: {resume}"


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
