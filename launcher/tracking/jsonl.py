"""metrics.jsonl and events.jsonl: written a line at a time, read whole or followed while they grow.

A metric that JSON has no number for (NaN, infinity) is written as null, its name and kind stand under
"nonfinite", and the readers turn it back into the float.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.plan.run_dir import RunDir

# The end of an attempt that was given up while it still ran.
SUPERSEDED = "superseded"
# Fields of a line of metrics.jsonl that are no metrics.
NO_METRICS = ("trainer/step", "time", "attempt")
# Lines that are kept while storage takes none: hours of steps, and some ten MiB.
_MOST_PENDING = 10_000
_CHUNK = 1 << 16


class JsonlTracker:
    """Appends one object per logged step to metrics.jsonl and one per message to events.jsonl.

    A metrics line holds "trainer/step", "time" (seconds since the epoch), "attempt" and the metrics; an
    events line holds time, attempt, step, kind, text and fields.

    Every method raises OSError where storage does not take a line; it is kept, and goes first with the next call.

    Raises:
        OSError: where the files cannot be opened.
    """

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._attempt = attempt
        self._metrics = _Appender(run.metrics)
        self._events = _Appender(run.events)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line: dict[str, Any] = {**values, "trainer/step": step, "time": time.time(), "attempt": self._attempt}
        if nonfinite:
            line |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")

    def event(self, kind: str, text: str, step: int | None = None, *, recorded: bool = False, **fields: Any) -> None:
        if not recorded:
            self._events.write(_event_line(self._attempt, kind, text, step, fields))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.event("summary", "summary of the run", **values)

    def finish(self, state: str) -> None:
        try:
            if state != SUPERSEDED:
                self.event("end", f"attempt {self._attempt} ended: {state}", state=state)
                self._metrics.write()
        finally:
            self._metrics.close()
            self._events.close()


class _Appender:
    """Writes whole lines to the end of a file, which is opened anew after a failure; from any thread.

    Raises:
        OSError: where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: deque[bytes] = deque(maxlen=_MOST_PENDING)
        self._lock = threading.Lock()
        self._descriptor: int | None = _open_for_append(path)

    def write(self, *lines: str) -> None:
        """Write what is pending and these lines.

        Raises:
            OSError: where that fails; they are pending then.
        """
        with self._lock:
            self._pending += (line.encode() for line in lines)
            try:
                if self._descriptor is None:
                    self._descriptor = _open_for_append(self._path)
                while self._pending:
                    line = self._pending[0]
                    if os.write(self._descriptor, line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._pending.popleft()
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


class Tail:
    """Follows a file of JSON lines from its beginning, across the time before it exists."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offset = 0

    def poll(self) -> list[dict[str, Any]]:
        """The complete lines that came since the last call, without waiting; empty where there are none."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return decode_lines(complete)


def lines_of(path: str | Path, names: tuple[str, ...] = ("",)) -> Iterator[dict[str, Any]]:
    """The lines as they were written, one at a time; a line that a crash left torn is left out, a missing file has none.

    Each has those metrics whose names begin with one of `names`: all of a long run are gigabytes.
    """
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for raw in file:
            for line in decode_lines(raw):
                # One string for a name, not one in each line.
                yield {sys.intern(name): line[name] for name in line if name in NO_METRICS or name.startswith(names)}


def read_metrics(path: str | Path, names: tuple[str, ...] = ("",)) -> list[dict[str, Any]]:
    """One dict per step that the newest attempt has trained or gone on from, in order of steps.

    It has those metrics whose names begin with one of `names`. Without evaluations among them it is not seen where an attempt
    begins with one.

    Several lines of one attempt for one step (training, evaluation) are one dict, with the time of the first, and so is the
    evaluation of a step that an earlier attempt has trained. A line that a crash left torn is left out; a missing file is an
    empty list.
    """
    return merged(gone_on_from(lines_of(path, names)))


def gone_on_from(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of lines as they were written, those that the newest attempt has written or gone on from.

    What an attempt had trained beyond the step at which the next one began is no part of what the model has become. One that
    begins with an evaluation has gone on from the step that it evaluates.
    """
    kept: list[dict[str, Any]] = []
    newest = 0
    for line in lines:
        if line["attempt"] < newest:
            continue
        if line["attempt"] > newest:
            newest = line["attempt"]
            last = line["trainer/step"] if _is_evaluation(line) else line["trainer/step"] - 1
            while kept and kept[-1]["trainer/step"] > last:
                kept.pop()
        kept.append(line)
    return kept


def merged(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines as they were written, made one per step; of several attempts that trained a step, the last one's."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        step = line["trainer/step"]
        known = steps.get(step)
        if known is not None and (known["attempt"] == line["attempt"] or _is_evaluation(line)):
            line = known | line | {"time": known["time"]}
        steps[step] = line
    return [steps[step] for step in sorted(steps)]


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The messages of all attempts in the order in which they were written; a missing file is an empty list."""
    return Tail(path).poll()


def append_event(run: RunDir, attempt: int, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
    """Write one message from a process beside the one that trains: a whole line at once, so that lines never mix."""
    descriptor = os.open(run.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, _event_line(attempt, kind, text, step, fields).encode())
    finally:
        os.close(descriptor)


def _event_line(attempt: int, kind: str, text: str, step: int | None, fields: Mapping[str, Any]) -> str:
    line = {"time": time.time(), "attempt": attempt, "step": step, "kind": kind, "text": text, "fields": _plain(fields)}
    return json.dumps(line, allow_nan=False) + "\n"


def decode_lines(data: bytes) -> list[dict[str, Any]]:
    lines = []
    for raw in data.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            # What a machine that died in the middle of a write left behind.
            continue
        if not isinstance(line, dict):
            continue
        for name, kind in line.pop("nonfinite", {}).items():
            line[name] = float(kind)
        lines.append(line)
    return lines


def _open_for_append(path: Path) -> int:
    """Open, after cutting off the part of a line that a writer which was killed, or found no space, left at the end."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        whole = _end_of_lines(descriptor, size)
        if whole < size:
            os.ftruncate(descriptor, whole)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _end_of_lines(descriptor: int, size: int) -> int:
    """Where the last complete line ends."""
    end = size
    while end:
        begin = max(0, end - _CHUNK)
        if (found := os.pread(descriptor, end - begin, begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0


def _plain(value: Any) -> Any:
    """The value in JSON's types: what JSON lacks (a path, NaN) becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
