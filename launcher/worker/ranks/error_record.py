"""The exception that ended a rank, left in shared memory: that needs neither disk space nor a descriptor, and cannot block."""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

# Set by the agent to `ErrorMemory.path`.
VARIABLE = "LAUNCHER_ERROR_MEMORY"
# Characters of a message and of the end of a traceback, and of a cause, which may name a path; JSON needs at most six bytes for
# each, which fit into a slot.
_MAX_CHARS = 5000
_MAX_CAUSE_CHARS = 800
_SLOT_BYTES = 64 * 1024
# Process id and number of bytes that follow.
_HEADER = struct.Struct("=qq")


@dataclass(frozen=True)
class ErrorRecord:
    """`message` is the exception's type and text, `at` the time in seconds since the epoch.

    `cause` is the machine limit that caused the exception, empty if none is known. `step` is the number of completed optimizer
    steps, None before the rank has loaded the model.
    """

    message: str
    traceback: str = ""
    at: float | None = None
    cause: str = ""
    step: int | None = None

    @classmethod
    def of(cls, error: BaseException, cause: str = "", step: int | None = None) -> ErrorRecord:
        """Describe an exception that has just been raised."""
        trace = "".join(traceback.format_exception(error))[-_MAX_CHARS:]
        return cls(f"{type(error).__name__}: {error}"[:_MAX_CHARS], trace, time.time(), cause[:_MAX_CAUSE_CHARS], step)


class ErrorMemory:
    """The agent's side: a slot for each local rank in anonymous memory, which is freed when the agent ends."""

    def __init__(self, num_ranks: int) -> None:
        self._descriptor = os.memfd_create("error-records")
        os.ftruncate(self._descriptor, num_ranks * _SLOT_BYTES)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self, local_rank: int, pid: int) -> ErrorRecord | None:
        """Return the record that the process `pid` left, or None if it left none."""
        slot = os.pread(self._descriptor, _SLOT_BYTES, local_rank * _SLOT_BYTES)
        owner, num_bytes = _HEADER.unpack_from(slot)
        return ErrorRecord(**json.loads(slot[_HEADER.size : _HEADER.size + num_bytes])) if owner == pid else None

    def close(self) -> None:
        os.close(self._descriptor)


class ErrorSlot:
    """A rank's side, mapped when it starts."""

    def __init__(self, memory: mmap.mmap | None, local_rank: int) -> None:
        self._memory, self._offset = memory, local_rank * _SLOT_BYTES

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> ErrorSlot:
        """Map the slot that the agent provides; without one, `write` does nothing."""
        memory, local_rank = None, int(environ.get("LOCAL_RANK", "0"))
        # In a container with its own PID namespace the agent's path does not exist; the record is then lost.
        with suppress(OSError, ValueError), open(environ.get(VARIABLE, ""), "r+b", buffering=0) as file:
            memory = mmap.mmap(file.fileno(), 0)
        return cls(memory, local_rank)

    def write(self, record: ErrorRecord) -> None:
        """Leave a record for the agent; the header, which makes it valid, comes last."""
        if self._memory is None:
            return
        content = json.dumps(asdict(record)).encode()
        begin = self._offset + _HEADER.size
        self._memory[begin : begin + len(content)] = content
        _HEADER.pack_into(self._memory, self._offset, os.getpid(), len(content))
