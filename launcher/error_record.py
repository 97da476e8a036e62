"""The error record of a rank: the exception that ended it.

The format and path are those of torch's `record` decorator. The decorator writes in place, and torch's elastic agent parses the
file without catching errors, so neither is used here (see launcher.worker.ranks.elastic).
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import atomic_files, json_records
from launcher.errors import LauncherError

# The environment variable with the path of a rank's record.
VARIABLE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class ErrorRecord:
    """`message` is the exception's type and text, `at` the time in seconds since the epoch, None if the record has none.

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
        trace = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {error}", trace, time.time(), cause, step)

    def write(self, path: Path) -> None:
        """Write the record to `path` atomically."""
        atomic_files.write_json(path, self._content())

    def dumps(self, max_bytes: int) -> bytes:
        """Return the record as JSON of at most `max_bytes`; long texts are truncated, the traceback at its beginning."""
        record, limit = self, max_bytes
        while len(content := json.dumps(record._content()).encode()) > max_bytes and limit:
            limit //= 2
            record = replace(self, message=self.message[:limit], traceback=self.traceback[-limit:], cause=self.cause[:limit])
        return content

    @classmethod
    def loads(cls, content: bytes) -> ErrorRecord | None:
        """Read the result of `dumps`, or None if it is damaged."""
        try:
            return cls._of_content(json.loads(content))
        except ValueError:
            return None

    def _content(self) -> dict[str, Any]:
        details = {"py_callstack": self.traceback, "timestamp": str(self.at), "cause": self.cause, "step": self.step}
        return {"message": {"message": self.message, "extraInfo": details}}

    @classmethod
    def read(cls, path: Path) -> ErrorRecord | None:
        """Return the record at `path`, or None if there is none or it cannot be read.

        A damaged record counts as none: the exit code still says how the rank ended.
        """
        try:
            return cls._of_content(json_records.read_json(path))
        except LauncherError:
            return None

    @classmethod
    def _of_content(cls, content: Any) -> ErrorRecord | None:
        message = content.get("message") if isinstance(content, dict) else None
        if not isinstance(message, dict) or not isinstance(message.get("message"), str):
            return None
        extra = message.get("extraInfo")
        details: dict[str, Any] = extra if isinstance(extra, dict) else {}
        callstack, cause = (text if isinstance(text := details.get(name), str) else "" for name in ("py_callstack", "cause"))
        step = number if isinstance(number := details.get("step"), int) else None
        return cls(message["message"], callstack, _seconds(details.get("timestamp")), cause, step)


def write_error_record(record: ErrorRecord, environ: Mapping[str, str]) -> None:
    """Write the record to the path in `environ`, if there is one.

    Raises nothing: on a full disk, the rank still ends with its exception, and its log has the traceback.
    """
    path = environ.get(VARIABLE)
    if not path:
        return
    try:
        record.write(Path(path))
    except Exception as problem:
        # The log may be on the same full disk.
        with suppress(OSError):
            print(f"cannot write the error record to {path}: {problem}", file=sys.stderr)
            # If the agent ended the rank now, Python would not get to print it.
            print(record.traceback, file=sys.stderr)


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None
