"""Count the bytes that elementwise operations read and write, to check launcher/plan/sizing/step_time.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bare_memory
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Compute-bound operations, and those that move nothing or only a few elements.
_ARITHMETIC = ("mm", "attn", "attention")
_VIEWS = ("_unsafe_view", "empty", "detach", "lift_fresh")
_FEW_ELEMENTS = ("gather", "scatter_add_", "embedding")


class MovedBytes(TorchDispatchMode):
    """Sums the input and output bytes of all operations except matrix products, attention and views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, name = str(function).split(".")[:2]
        is_view = getattr(function, "is_view", False) or name.startswith(_VIEWS) or namespace == "prim"
        if not is_view and name not in _FEW_ELEMENTS and not any(word in name for word in _ARITHMETIC):
            tensors = [one for one in tree_iter((args, kwargs, result)) if isinstance(one, Tensor)]
            self.total += sum(_bytes(tensor) for tensor in tensors)
        return result


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that an operation reads or writes; expanded dimensions share the same memory."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return tensor.element_size() * torch.Size(sizes).numel()


def measure(
    config: dict[str, Any], tokens: int, dtype: str = "bf16", checkpointing: str = "none", attention: str = "varlen"
) -> int:
    """Return the bytes that a forward and backward pass moves, with the logits in one chunk."""
    return bare_memory.run_pass(config, tokens, checkpointing, dtype, tokens, lambda _: MovedBytes(), attention).total
