"""Builds of DeepSpeed's C++ extensions that a killed process does not block for ever.

torch marks a build that is going on with a file (torch/utils/file_baton.py). One that is killed meanwhile leaves the file
behind, in the user's cache, and every later process waits for it without end. Here the file is locked as well: the system
takes the lock back from whoever dies.
"""

from __future__ import annotations

import fcntl
import os
import time

from torch.utils import cpp_extension


class LockedBaton:
    """torch's FileBaton, with a lock on the file in place of its existence."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        self._path, self._wait_s = lock_file_path, wait_seconds
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """True where this process may build."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(self._path).st_ino:
                self._descriptor = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            # Held by another, or removed by one that has just ended.
            pass
        os.close(descriptor)
        return False

    def wait(self) -> None:
        """Return when the process that builds has ended, whether it has succeeded or not."""
        while not self.try_acquire():
            time.sleep(self._wait_s)
        self.release()

    def release(self) -> None:
        """Let the others go on. The file goes too, because other programs wait for that."""
        os.unlink(self._path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_builds() -> None:
    """Make torch use such locks in this process; call it before DeepSpeed builds or loads anything."""
    cpp_extension.FileBaton = LockedBaton
