"""The error record of a rank: the exception that ended it.

Format and path are those of torch's `record` decorator. That writes in place, and torch's elastic agent parses the file without a
guard, so neither is used here (see launcher.worker.ranks.elastic).
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import atomic_files, json_records
from launcher.errors import LauncherError

# The environment variable with the path of a rank's record.
VARIABLE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class ErrorRecord:
    """`message` is the exception's type and text, `at` the time in seconds since the epoch, None where the record has none."""

    message: str
    traceback: str = ""
    at: float | None = None

    @classmethod
    def of(cls, error: BaseException) -> ErrorRecord:
        """Describe an exception that has just been raised."""
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)), time.time())

    def write(self, path: Path) -> None:
        """Write the record to `path` atomically."""
        details = {"py_callstack": self.traceback, "timestamp": str(self.at)}
        atomic_files.write_json(path, {"message": {"message": self.message, "extraInfo": details}})

    @classmethod
    def read(cls, path: Path) -> ErrorRecord | None:
        """Return the record at `path`; None where there is none or it cannot be read.

        A damaged record counts as none: the exit code still says how the rank ended.
        """
        try:
            content = json_records.read_json(path)
        except LauncherError:
            return None
        message = content.get("message")
        if not isinstance(message, dict) or not isinstance(message.get("message"), str):
            return None
        extra = message.get("extraInfo")
        details: dict[str, Any] = extra if isinstance(extra, dict) else {}
        callstack = details.get("py_callstack")
        return cls(message["message"], callstack if isinstance(callstack, str) else "", _seconds(details.get("timestamp")))


def write_error_record(error: BaseException, environ: Mapping[str, str]) -> None:
    """Write the record of `error` to the path in `environ`, if there is one.

    Raises nothing: on a full disk the rank ends by `error` all the same, and its log has the traceback.
    """
    path = environ.get(VARIABLE)
    if not path:
        return
    try:
        ErrorRecord.of(error).write(Path(path))
    except Exception as problem:
        # The log may be on the same full disk.
        with suppress(OSError):
            print(f"cannot write the error record to {path}: {problem}", file=sys.stderr)
            # A rank that the agent ends now would end before Python prints it.
            traceback.print_exception(error)


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None
