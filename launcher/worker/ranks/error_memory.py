"""Error records in shared memory, for ranks that cannot write a file: the disk is full or no descriptor is left."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.error_record import ErrorRecord

# Set by the agent to `ErrorMemory.path`.
VARIABLE = "LAUNCHER_ERROR_MEMORY"
_SLOT_BYTES = 16 * 1024
# Process id and number of bytes that follow.
_HEADER = struct.Struct("=qq")


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
        if owner != pid:
            return None
        return ErrorRecord.loads(slot[_HEADER.size : _HEADER.size + num_bytes])

    def close(self) -> None:
        os.close(self._descriptor)


class ErrorSlot:
    """A rank's side, mapped when it starts: writing needs neither a descriptor nor disk space."""

    def __init__(self, memory: mmap.mmap | None, local_rank: int) -> None:
        self._memory, self._offset = memory, local_rank * _SLOT_BYTES

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> ErrorSlot:
        """Map the slot that the agent provides; without one, `write` does nothing."""
        memory, local_rank = None, int(environ.get("LOCAL_RANK", "0"))
        # In a container with its own PID namespace the agent's path does not exist; the record is then only written to its file.
        with suppress(OSError, ValueError), open(environ.get(VARIABLE, ""), "r+b", buffering=0) as file:
            memory = mmap.mmap(file.fileno(), 0)
        return cls(memory, local_rank)

    def write(self, record: ErrorRecord) -> None:
        """Leave a record for the agent; a long traceback is cut at its beginning."""
        if self._memory is None:
            return
        content = record.dumps(_SLOT_BYTES - _HEADER.size)
        begin = self._offset + _HEADER.size
        self._memory[begin : begin + len(content)] = content
        _HEADER.pack_into(self._memory, self._offset, os.getpid(), len(content))
