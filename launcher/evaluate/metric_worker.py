"""The process that runs a user's own metric: `python -m launcher.evaluate.metric_worker FILE FUNCTION PARENT`.

It reads one row per line from standard input and writes one reply per line. The function's own output goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import traceback
from typing import Any, BinaryIO

_MAX_REASON_CHARS = 500


def main() -> None:
    file, function, parent = sys.argv[1:4]
    _end_with(int(parent))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    rows = os.fdopen(os.dup(0), "rb")
    # Otherwise, a function that reads standard input would consume the rows.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        compute = _load(file, function)
    except BaseException as error:
        _reply(replies, {"error": _reason(error, file)})
        return
    _reply(replies, {"ready": True})
    for line in rows:
        row = json.loads(line)
        try:
            score = _number(compute(row["answer"], row["reference"]))
        except BaseException as error:
            _reply(replies, {"error": _reason(error, file)})
        else:
            _reply(replies, {"score": score})


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends for any reason; a hanging function would otherwise remain."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _load(file: str, function: str) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("user_metric", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # The file lies in the folder of the evaluation, which needs no bytecode.
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return getattr(module, function)


def _number(value: Any) -> float:
    """Return the function's result as a finite number; numpy numbers are accepted."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"it returned {value!r:.60}, which is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}")
    return number


def _reason(error: BaseException, file: str) -> str:
    """Return the exception, with the line of the user's file that raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS] + line


def _reply(replies: BinaryIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
