"""Sampled positions of all parameters, and what backward passes, partitions and the optimizer have there: flat tensors [N]."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from launcher.checkpoint.initial_weights import own_range

# Sampled positions of a parameter; of the embedding, the head, and matrices in the first, middle and last layer.
_FEW, _MANY = 64, 4096


class ParameterSamples:
    """N sampled positions of parameters, the same on all ranks, parameter by parameter; values there are fp32 [N].

    Build it before `deepspeed.initialize`, whose hooks take the gradients away. Between `begin` and `close`, `gradients` sums
    the gradients of this rank's backward passes, before any reduction, and `weights` are those that the last pass computed with,
    NaN where it had none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        self.parameters = dict(parameters)
        layers = {name: int(number[1]) for name in parameters if (number := re.search(r"\.(\d+)\.", name))}
        last = max(layers.values(), default=0)
        self._positions: dict[str, Tensor] = {}
        self.spans: dict[str, slice] = {}
        """The samples of each parameter."""
        self.num_samples = 0
        for index, (name, parameter) in enumerate(parameters.items()):
            is_watched = len(parameter.ds_shape) > 1 and layers.get(name, 0) in (0, last // 2, last)
            size, generator = _MANY if is_watched else _FEW, torch.Generator().manual_seed(index)
            chosen = torch.randint(parameter.ds_numel, (size,), generator=generator).unique()
            positions = chosen if parameter.ds_numel > size else torch.arange(parameter.ds_numel)
            self._positions[name] = positions.to(device)
            self.spans[name] = slice(self.num_samples, self.num_samples + len(positions))
            self.num_samples += len(positions)
        self.device = device
        self.owner = self.spread(range(len(parameters))).long()
        """The index of each sample's parameter: int64 [N]."""
        self.gradients = self.weights = self.zeros()
        self._is_collecting = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._make_hook(name)) for name, parameter in parameters.items()
        ]

    def zeros(self) -> Tensor:
        return torch.zeros(self.num_samples, dtype=torch.float32, device=self.device)

    def spread(self, values: Sequence[float]) -> Tensor:
        """Return the value of each sample's parameter: fp64 [N]."""
        counts = torch.tensor([span.stop - span.start for span in self.spans.values()])
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(counts).to(self.device)

    def cast(self, values: Tensor) -> Tensor:
        """Return values as the parameters' own type rounds them."""
        parts = [values[self.spans[name]].to(parameter.dtype).float() for name, parameter in self.parameters.items()]
        return torch.cat(parts)

    def begin(self) -> None:
        """Start a sum of gradients."""
        self.gradients, self.weights = self.zeros(), self.zeros().fill_(torch.nan)
        self._is_collecting = True

    def close(self) -> None:
        """Stop collecting for good."""
        self._is_collecting = False
        for hook in self._hooks:
            hook.remove()

    def put_own(self, values: Tensor, name: str, part: Tensor) -> None:
        """Put the samples of this rank's partition of a parameter, `part` (flat), into `values`."""
        start, stop = own_range(self.parameters[name])
        positions = self._positions[name]
        is_own = (positions >= start) & (positions < stop)
        values[self.spans[name]][is_own] = part[(positions[is_own] - start).to(part.device)].to(values)

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        span, positions = self.spans[name], self._positions[name]

        def collect(parameter: Tensor) -> None:
            if self._is_collecting and parameter.grad is not None:
                self.gradients[span] += parameter.grad.reshape(-1)[positions]
                self.weights[span] = parameter.detach().reshape(-1)[positions].float()

        return collect
