"""Ranks that train with a fault in them, over gloo; tests/forked_ranks.py runs them. Faults act after the cache is built."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero
from topology_ranks import load_plan, train_to_end

from launcher.data import loader
from launcher.data.loader import StepBatch, TrainBatches
from launcher.errors import LauncherError
from launcher.train import attention, loop, optim
from launcher.train.loss import LossHead
from launcher.train.model import CausalLMLoss
from launcher.train.objectives import SupervisedNll

RANK = int(os.environ.get("RANK", 0))
FAULTS: dict[str, Callable[[], None]] = {}


def fault(install: Callable[[], None]) -> Callable[[], None]:
    FAULTS[install.__name__] = install
    return install


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by `around`, whose first argument is the function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, replacement)


def change_partitions(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Change the reduced gradients, given a parameter and this rank's partition."""

    def partition(original: Any, zero: Any, parameters: list[Any], partitions: list[torch.Tensor]) -> Any:
        changed = [change(parameter, part) for parameter, part in zip(parameters, partitions, strict=True)]
        return original(zero, parameters, changed)

    wrap(Zero, "partition_grads", partition)


@fault
def reduction_doubled() -> None:
    change_partitions(lambda _, part: part * 2)


@fault
def matrices_divided_by_nodes() -> None:
    """As quantized gradients of DeepSpeed 0.19.8: divided by the nodes only, two of two ranks each."""
    change_partitions(lambda parameter, part: part * 2 if len(parameter.ds_shape) > 1 else part)


@fault
def not_reduced() -> None:
    def own(parameter: Any, part: torch.Tensor) -> torch.Tensor:
        size = parameter.partition_numel()
        padded = torch.nn.functional.pad(parameter.grad.reshape(-1), [0, size * dist.get_world_size() - parameter.ds_numel])
        return padded[RANK * size : RANK * size + part.numel()].to(part)

    change_partitions(own)


@fault
def reduced_twice() -> None:
    change_partitions(lambda _, part: part / dist.get_world_size())


@fault
def tensor_left_out() -> None:
    left_out: list[Any] = []

    def leave_out(parameter: Any, part: torch.Tensor) -> torch.Tensor:
        left_out.extend([] if left_out or len(parameter.ds_shape) == 1 else [parameter])
        return part * 0 if any(parameter is one for one in left_out) else part

    change_partitions(leave_out)


@fault
def mean_of_ranks() -> None:
    def count_own(_: SupervisedNll, batch: StepBatch) -> float:
        return sum(int((micro.labels >= 0).sum()) for micro in batch.micro) * dist.get_world_size()

    SupervisedNll.count_atoms = count_own  # type: ignore[method-assign]


@fault
def documents_leak() -> None:
    def attend(original: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **(kwargs | {"cu_seq_lens_q": None}))

    wrap(attention, "attend_within_documents", attend)


@fault
def labels_shifted() -> None:
    def forward(original: Any, head: Any, hidden: Any, labels: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(head, hidden, None if labels is None else labels.roll(1), *args, **kwargs)

    wrap(LossHead, "forward", forward)


@fault
def mask_inverted() -> None:
    def make(original: Any, split: Any, rows: np.ndarray, pad_id: int) -> Any:
        micro = original(split, rows, pad_id)
        following = micro.input_ids.roll(-1, 1)
        is_inside = micro.position_ids.roll(-1, 1) > 0
        micro.labels.copy_(torch.where((micro.labels < 0) & is_inside, following, -100))
        return micro

    wrap(loader, "micro_batch", make)


@fault
def last_chunk_dropped() -> None:
    def forward(original: Any, head: Any, hidden: Any, labels: Any = None, *args: Any, **kwargs: Any) -> Any:
        if labels is None:
            return original(head, hidden, labels, *args, **kwargs)
        kept = (len(labels) - 1) // head.chunk_tokens * head.chunk_tokens if torch.is_grad_enabled() else len(labels)
        return original(head, hidden[:kept], labels[:kept], *args, **kwargs)

    wrap(LossHead, "forward", forward)


@fault
def clipped_to_double() -> None:
    wrap(Zero, "unscale_and_clip_grads", lambda original, zero, group, norm: original(zero, group, norm / 2))


@fault
def decayed_twice() -> None:
    def build(original: Any, groups: Any, *args: Any) -> Any:
        return original([group | {"weight_decay": 2 * group["weight_decay"]} for group in groups], *args)

    wrap(optim, "build_adamw", build)


@fault
def bias_not_corrected() -> None:
    @torch.no_grad()
    def step(optimizer: torch.optim.AdamW, closure: None = None) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                zeros = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
                state = optimizer.state.setdefault(flat, {"step": torch.tensor(0.0), **zeros})
                state["step"] += 1
                state["exp_avg"].lerp_(flat.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(flat.grad.square(), 1 - group["betas"][1])
                flat.mul_(1 - group["lr"] * group["weight_decay"])
                flat.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])

    torch.optim.AdamW.step = step  # type: ignore[method-assign, assignment]


@fault
def rate_of_another_step() -> None:
    wrap(loop, "compute_learning_rate", lambda original, section, step, steps: original(section, step + 1, steps))


@fault
def rate_changed_in_the_step() -> None:
    def step(original: Any, optimizer: torch.optim.AdamW, closure: None = None) -> None:
        optim.set_learning_rate(optimizer, optimizer.param_groups[0]["lr"] / 2)
        original(optimizer)

    wrap(torch.optim.AdamW, "step", step)


@fault
def same_rows() -> None:
    wrap(
        TrainBatches, "__init__", lambda original, batches, *args, **kwargs: original(batches, *args[:3], 0, *args[4:], **kwargs)
    )


@fault
def weights_stale() -> None:
    def forward(original: Any, model: CausalLMLoss, *args: Any, **kwargs: Any) -> Any:
        if RANK == 1:
            norm = next(p for p in model.parameters() if len(p.ds_shape) == 1 and p.ds_persist)
            norm.data.fill_(1.25)
        return original(model, *args, **kwargs)

    wrap(CausalLMLoss, "forward", forward)


@fault
def positions_wrong() -> None:
    def make(original: Any, split: Any, rows: np.ndarray, pad_id: int) -> Any:
        micro = original(split, rows, pad_id)
        micro.position_ids.copy_(torch.arange(micro.position_ids.shape[1]).expand_as(micro.position_ids))
        return micro

    wrap(loader, "micro_batch", make)


def train(path: str, name: str | None, attempt: int = 1) -> dict[str, Any]:
    """Train with the fault of this name; return the problems, as [message, where], and the steps that were completed."""
    if name is not None:
        FAULTS[name]()
    try:
        train_to_end(load_plan(path, 1), attempt)
    except LauncherError as error:
        return {"kind": type(error).__name__, "problems": [[one.message, one.where] for one in error.problems]}
    return {"kind": "", "problems": []}
