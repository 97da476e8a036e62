"""Staging: host memory that holds a copy of one rank's states while training continues and the copy is written."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from launcher.checkpoint.safetensors_io import as_bytes

OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Elements to write or check in one piece, without the GIL. Between pieces the thread needs the GIL; if it is descheduled while it
# holds the GIL, because all cores are busy, training stalls.
_BLOCK_ELEMENTS = 64 * 2**20


class StagingBuffer:
    """A buffer of `num_elements` in fp32, page-locked if the states lie on a GPU.

    A thread allocates it: locking the pages of tens of GiB takes seconds, and the first steps need not wait for that.
    """

    def __init__(self, num_elements: int, device: torch.device, sharers: int) -> None:
        """Start the allocation; `sharers` processes on this machine allocate the same amount at the same time."""
        self._device = device
        self._is_locked = False
        self._memory: torch.Tensor | None = None
        self._used = 0
        self._ready = threading.Event()
        threading.Thread(target=self._allocate, args=(num_elements, sharers), name="host-copy", daemon=True).start()

    def is_there(self) -> bool:
        """Wait for the allocation; return False if the machine lacks the memory."""
        self._ready.wait()
        return self._memory is not None

    def fill(self, states: Iterator[torch.Tensor]) -> None:
        """Copy all of `states`; on a GPU asynchronously, in the current stream."""
        assert self._memory is not None
        self._used = 0
        for state in states:
            self._memory[self._used : self._used + state.numel()].copy_(state, non_blocking=True)
            self._used += state.numel()

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes of the copy in pieces."""
        assert self._memory is not None
        for block in self._memory[: self._used].split(_BLOCK_ELEMENTS):
            yield as_bytes(block)

    def is_finite(self) -> bool:
        """Return whether no element of the copy is infinite or NaN."""
        assert self._memory is not None
        return all(map(is_finite, self._memory[: self._used].split(_BLOCK_ELEMENTS)))

    def close(self) -> None:
        """Free the memory."""
        self._ready.wait()
        if self._memory is not None and self._is_locked:
            # CUDA would treat later allocations at these addresses as memory that it has locked.
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = None

    def _allocate(self, num_elements: int, sharers: int) -> None:
        try:
            set_current_device(self._device)
            if sharers * 4 * num_elements > available_bytes():
                # The kernel would overcommit, then kill a process when the pages are touched.
                return
            memory = torch.empty(num_elements, dtype=torch.float32)
            # The kernel maps a page on its first write: write now, not during the first save.
            memory.zero_()
            if self._device.type == "cuda":
                # torch's own pinned allocations are powers of two, up to twice what the plan budgets. If the system refuses to
                # lock that much, copies are slower.
                code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0)
                self._is_locked = int(code) == 0
            self._memory = memory
        except RuntimeError:
            self._memory = None
        finally:
            self._ready.set()


def set_current_device(device: torch.device) -> None:
    """Select the thread's GPU: a thread starts on GPU 0 and would allocate memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def available_bytes() -> int:
    """Return the bytes of host memory left to this machine, or to the container or job that the process is in."""
    available = [psutil.virtual_memory().available]
    try:
        # Version 2 of control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html
        group = CGROUPS / OWN_CGROUP.read_text().rpartition("::/")[2].strip()
    except OSError:
        return available[0]
    for folder in (group, *group.parents):
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            available.append(max(0, limit - used + _cached_bytes(folder)))
        except (OSError, ValueError):
            # No limit here.
            continue
    return min(available)


def _cached_bytes(group: Path) -> int:
    """Return the bytes of the page cache that count as used but can be reclaimed."""
    with suppress(OSError):
        if match := re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE):
            return int(match[1])
    return 0


def is_finite(state: torch.Tensor) -> bool:
    """Return whether no element is infinite or NaN."""
    # The sum is one pass without a temporary tensor; it may overflow for large finite values, hence the second check.
    return bool(torch.isfinite(state.sum())) or bool(torch.isfinite(state).all())
