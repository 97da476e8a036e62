"""Current and peak bytes of all live tensors, on CPUs and for fake tensors; used by benchmarks/memory_plan.py.

torch.distributed._tools.mem_tracker counts the same, by kind, but takes four times as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations return while the mode is active, until they are freed."""

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, tuple[int, Any]] = {}
        # Kept alive so that their addresses are not reused.
        self._kept = [tensor.untyped_storage() for tensor in ignored]
        self._ignored = {storage._cdata for storage in self._kept}

    def restart_peak(self) -> int:
        """Return the peak so far, and restart it from the current bytes."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in tree_iter(result):
            if isinstance(one, Tensor):
                self._count(one.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._ignored:
            return
        known = self._sizes.get(address)
        if known is None:
            self._sizes[address] = (size, weakref.ref(storage, lambda _: self._free(address)))
        elif known[0] != size:
            self._sizes[address] = (size, known[1])
        self.live += size - (0 if known is None else known[0])

    def _free(self, address: int) -> None:
        self.live -= self._sizes.pop(address)[0]
