"""The optimizers that `optim.name` can choose, and the tensors that each keeps per parameter. Plain data, no torch.

The memory plan, disk estimates, NVMe buffers, checkpoints and resume all derive from this table. To add an optimizer: write a
builder in launcher/train/optim.py and add a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per fp32 element; master weights and all optimizer states are fp32.
FP32_BYTES = 4


@dataclass(frozen=True)
class Optimizer:
    """Properties of an optimizer that the plan and checkpoints depend on.

    `states` are the keys, in torch's `optimizer.state[parameter]`, of its fp32 tensors with one element per parameter element.
    Checkpoints store them under these names, so the names cannot change later. `builder` is the function that builds the
    optimizer, as module:function; see launcher/train/optim.py for its signature. `classes` are the optimizer classes that it
    returns, as module.Class. `counts_steps` is False if the class keeps no "step" beside its states. `can_offload` is False if
    DeepSpeed has no CPU implementation. `is_known_to_deepspeed` is False if DeepSpeed does not list a class as tested.
    `usual_lr` are the smallest and largest usual peak learning rates for fine-tuning; far larger rates cause a warning.
    """

    states: tuple[str, ...]
    builder: str
    classes: tuple[str, ...]
    counts_steps: bool = True
    can_offload: bool = True
    is_known_to_deepspeed: bool = True
    usual_lr: tuple[float, float] | None = None

    @property
    def bytes_per_param(self) -> int:
        """Bytes per parameter for its fp32 master weight and all states."""
        return FP32_BYTES * (1 + len(self.states))


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        states=("exp_avg", "exp_avg_sq"),
        builder="launcher.train.optim:build_adamw",
        classes=("torch.optim.adamw.AdamW", "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam"),
        usual_lr=(1e-6, 1e-4),
    ),
}


def find_by_class(name: str) -> Optimizer | None:
    """Find the row that lists the optimizer class `name`, given as module.Class; None without one."""
    return next((optimizer for optimizer in OPTIMIZERS.values() if name in optimizer.classes), None)
