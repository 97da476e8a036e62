"""Timers for this rank's own speed. Step times do not show it: under ZeRO-3 all ranks finish a step together.

They time the forward pass of one linear layer, between DeepSpeed's fetch of its weights and their release, and an optimizer that
runs on the node's CPUs. Neither contains a collective, so only a slow rank is slow in them. If the weights of a decoder layer are
fetched as a whole, they time that layer, because the compiler does not support hooks inside it.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn


class LayerTimer:
    """Times one layer of `model` in training mode, including recomputation. Create it after DeepSpeed's engine."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start: Any = None
        self._spans: list[tuple[Any, Any, int]] = []
        layer = representative_layer(model)
        if layer is not None:
            # This hook runs after DeepSpeed's hook that gathers the weights, and before the one that releases them.
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end, prepend=True)

    def read(self) -> float:
        """Return seconds per token since the last call, NaN if there are none; call it when the device has finished."""
        spans, self._spans = self._spans, []
        tokens = sum(count for *_, count in spans)
        if not tokens:
            return math.nan
        seconds = sum(start.elapsed_time(end) / 1000 if self._cuda else end - start for start, end, _ in spans)
        return seconds / tokens

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._start = self._mark() if module.training else None

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if self._start is not None:
            output = output[0] if isinstance(output, tuple) else output
            # Count tokens in the output: a layer that is called by keyword has no inputs here.
            self._spans.append((self._start, self._mark(), output.numel() // output.shape[-1]))
            self._start = None

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class OptimizerTimer:
    """Times an optimizer whose states are in main memory. On a GPU, steps end after they return, so this cannot time them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._start, self._seconds = 0.0, math.nan
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def read(self) -> float:
        """Return the seconds spent in steps since the last call; NaN if there were none."""
        seconds, self._seconds = self._seconds, math.nan
        return seconds

    def _begin(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        # DeepSpeed calls it once per parameter group.
        spent = time.perf_counter() - self._start
        self._seconds = spent if math.isnan(self._seconds) else self._seconds + spent


def representative_layer(model: nn.Module) -> nn.Module | None:
    """Return the largest linear layer of the middle block, or the block itself if ZeRO-3 gathers it as a whole.

    Returns None if the model has no list of blocks with a linear layer.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        return None
    blocks = max(stacks, key=len)
    block = blocks[len(blocks) // 2]
    if getattr(block, "_z3_leaf", False):
        return block
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return max(linears, key=lambda linear: linear.in_features * linear.out_features, default=None)
