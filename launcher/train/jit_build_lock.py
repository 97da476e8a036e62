"""Locks for builds of DeepSpeed's C++ extensions that a killed process releases.

torch marks a build in progress with a file in the user's cache (torch/utils/file_baton.py). A process that is killed during a
build leaves the file behind, and every later process waits for it forever. Here the file is also locked, and the operating system
releases the lock when the process ends.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import time
from contextlib import suppress
from typing import Any

from torch.utils import cpp_extension


class LockedBaton:
    """Replacement for torch's FileBaton that locks the file instead of testing whether it exists."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        self._path, self._wait_s = lock_file_path, wait_seconds
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Return True if this process may build."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(self._path).st_ino:
                self._descriptor = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            # Another process holds the lock, or has just finished and deleted the file.
            pass
        os.close(descriptor)
        return False

    def wait(self) -> None:
        """Wait until the building process has ended, successfully or not."""
        while not self.try_acquire():
            time.sleep(self._wait_s)
        self.release()

    def release(self) -> None:
        """Release the lock and delete the file that other programs wait for."""
        # A program that uses torch's own baton, and built at the same time, may have deleted it.
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_builds() -> None:
    """Make torch use these locks in this process. Call this before DeepSpeed builds or loads an extension."""
    cpp_extension.FileBaton = LockedBaton


def skip_unused_kernels() -> None:
    """Keep DeepSpeed from compiling kernels that no run uses. Call this before ranks meet through DeepSpeed.

    On CPUs it compiles a kernel for tensor parallelism whenever a process group is created, which takes a minute without a cache.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
