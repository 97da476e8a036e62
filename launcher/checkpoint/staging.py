"""Main memory that holds one rank's states while training goes on."""

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
# What is written or looked at in one piece, which is done without Python's lock. For each piece the thread needs the lock
# for a moment, and while it has it and is not running, because all cores are at work, training stands still.
_BLOCK_ELEMENTS = 64 * 2**20


class StagingBuffer:
    """Room for `num_elements` in fp32, page-locked where the states lie on a GPU.

    It is made by a thread, because locking the pages of tens of GiB takes seconds that the first steps need not wait for.
    """

    def __init__(self, num_elements: int, device: torch.device, sharers: int) -> None:
        """`sharers` processes of this machine ask for as much, all at the same time."""
        self._device = device
        self._is_locked = False
        self._memory: torch.Tensor | None = None
        self._used = 0
        self._ready = threading.Event()
        threading.Thread(target=self._make, args=(num_elements, sharers), name="host-copy", daemon=True).start()

    def is_there(self) -> bool:
        """Wait for the memory; False where the machine does not have it."""
        self._ready.wait()
        return self._memory is not None

    def fill(self, states: Iterator[torch.Tensor]) -> None:
        """Copy all of `states`; on a GPU in the current stream, and not awaited."""
        assert self._memory is not None
        self._used = 0
        for state in states:
            self._memory[self._used : self._used + state.numel()].copy_(state, non_blocking=True)
            self._used += state.numel()

    def blocks(self) -> Iterator[memoryview]:
        """What was copied, in pieces."""
        assert self._memory is not None
        for block in self._memory[: self._used].split(_BLOCK_ELEMENTS):
            yield as_bytes(block)

    def is_finite(self) -> bool:
        """True where no weight or optimizer state that was copied is infinite or NaN."""
        assert self._memory is not None
        return all(map(is_finite, self._memory[: self._used].split(_BLOCK_ELEMENTS)))

    def close(self) -> None:
        """Give the memory back."""
        self._ready.wait()
        if self._memory is not None and self._is_locked:
            # CUDA would take what is put at these addresses later for the memory that it has locked.
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = None

    def _make(self, num_elements: int, sharers: int) -> None:
        try:
            set_current_device(self._device)
            if sharers * 4 * num_elements > available_bytes():
                # The system would promise the memory all the same, and kill a process when it is used.
                return
            memory = torch.empty(num_elements, dtype=torch.float32)
            # The system gives a page when it is first written: now, not during the first save.
            memory.zero_()
            if self._device.type == "cuda":
                # torch's own page-locked memory comes in powers of two, up to twice of what the plan counts with.
                # Where the system does not lock so much, copies are slower.
                code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0)
                self._is_locked = int(code) == 0
            self._memory = memory
        except RuntimeError:
            self._memory = None
        finally:
            self._ready.set()


def set_current_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread: each begins with GPU 0, and would take memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def available_bytes() -> int:
    """Main memory that this machine, or the container or job that the process is in, has left."""
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
    """Of what counts as used: pages of files that were read or written and can be forgotten."""
    with suppress(OSError):
        if found := re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE):
            return int(found[1])
    return 0


def is_finite(state: torch.Tensor) -> bool:
    """True where no element is infinite or NaN."""
    # One pass over the memory, without a tensor in between; large numbers may overflow it.
    return bool(torch.isfinite(state.sum())) or bool(torch.isfinite(state).all())
