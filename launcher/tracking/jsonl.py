"""metrics.jsonl and events.jsonl: written line by line, read as a whole or followed while they grow.

JSON has no NaN or infinity: such a metric is written as null, with its value as text under "nonfinite". Readers restore it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import clock
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files

# A line of metrics.jsonl or events.jsonl.
Line = dict[str, Any]
# The final state of an attempt that was replaced while it was still running.
SUPERSEDED = "superseded"
# Fields of a line of metrics.jsonl that are not metrics.
NON_METRIC_FIELDS = ("trainer/step", "time", "attempt")
# Lines kept in memory while storage fails: hours of steps, about ten MiB.
_MOST_PENDING = 10_000
_CHUNK = 1 << 16


class JsonlTracker:
    """Appends one object per logged step to metrics.jsonl and one per event to events.jsonl.

    A metrics line has "trainer/step", "time" (seconds since the epoch), "attempt" and the metrics; an events line has time,
    attempt, step, kind, text and fields.

    Every method raises OSError if a line cannot be written. The line is kept, and the next call writes it first.

    Raises:
        OSError: if the files cannot be opened.
    """

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._attempt = attempt
        self._metrics = _Appender(run.metrics)
        self._events = _Appender(run.events)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line: Line = {**values, "trainer/step": step, "time": clock.now(), "attempt": self._attempt}
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
    """Appends whole lines to a file from any thread; reopens it after a failure."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: deque[bytes] = deque(maxlen=_MOST_PENDING)
        self._lock = threading.Lock()
        self._descriptor: int | None = _open_for_append(path)

    def write(self, *lines: str) -> None:
        """Write the pending lines and these."""
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
            except OSError as error:
                error.filename = str(self._path)
                self.close()
                raise

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


class Tail:
    """Follows a file of JSON lines from its beginning; the file need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offset = 0

    def poll(self) -> list[Line]:
        """Return the complete lines written since the last call, without waiting."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return decode_lines(complete)


def iter_lines(path: str | Path, names: tuple[str, ...] = ("",)) -> Iterator[Line]:
    """Yield the lines as written, one at a time. Torn lines are left out; a missing file has none.

    Each has only the metrics whose names begin with one of `names`: all metrics of a long run are gigabytes.
    """
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for raw in file:
            for line in decode_lines(raw):
                # One string per name, not one per line.
                yield {sys.intern(name): line[name] for name in line if name in NON_METRIC_FIELDS or name.startswith(names)}


def read_metrics(path: str | Path, names: tuple[str, ...] = ("",)) -> list[Line]:
    """Return one dict per step of the newest attempt and the attempts that it continues, in step order.

    Lines of one step are merged, with the first line's time. `names` are prefixes of the metrics to read; attempts that begin
    with an evaluation are recognized only with `eval/`.
    """
    return merge_steps(continued_lines(iter_lines(path, names)))


def continued_lines(lines: Iterable[Line]) -> list[Line]:
    """Return the lines of the newest attempt and of the attempts that it continues.

    Steps that an attempt trained beyond the next attempt's start are discarded. An attempt that begins with an evaluation
    continues from the evaluated step.
    """
    continued: list[Line] = []
    newest = 0
    for line in lines:
        if line["attempt"] < newest:
            continue
        if line["attempt"] > newest:
            newest = line["attempt"]
            last = line["trainer/step"] if _is_evaluation(line) else line["trainer/step"] - 1
            while continued and continued[-1]["trainer/step"] > last:
                continued.pop()
        continued.append(line)
    return continued


def merge_steps(lines: Iterable[Line]) -> list[Line]:
    """Merge the lines of each step; if several attempts trained a step, the last one counts."""
    steps: dict[int, Line] = {}
    for line in lines:
        step = line["trainer/step"]
        known = steps.get(step)
        if known is not None and (known["attempt"] == line["attempt"] or _is_evaluation(line)):
            line = known | line | {"time": known["time"]}
        steps[step] = line
    return [steps[step] for step in sorted(steps)]


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def read_events(path: str | Path, field: str = "") -> list[Line]:
    """Return the events of all attempts, as written, or only those with a field of this name; a missing file has none."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    name = f'"{field}"'.encode() if field else b""
    return [line for raw in lines if name in raw for line in decode_lines(raw) if "kind" in line]


def append_event(run: RunDir, attempt: int, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
    """Append an event from a process other than the training process; see `atomic_files.append_lines`."""
    atomic_files.append_lines(run.events, _event_line(attempt, kind, text, step, fields).encode())


def _event_line(attempt: int, kind: str, text: str, step: int | None, fields: Mapping[str, Any]) -> str:
    line = {"time": clock.now(), "attempt": attempt, "step": step, "kind": kind, "text": text, "fields": _to_json_types(fields)}
    return json.dumps(line, allow_nan=False) + "\n"


def decode_lines(data: bytes) -> list[Line]:
    """Decode JSON lines; skip torn lines, whose rest may be another JSON value."""
    lines = []
    for raw in data.splitlines():
        try:
            line = json.loads(raw)
            for name, kind in line.pop("nonfinite", {}).items():
                line[name] = float(kind)
        except (ValueError, AttributeError, TypeError):
            continue
        lines.append(line)
    return lines


def _open_for_append(path: Path) -> int:
    """Open a file, and cut off an incomplete line at its end: its writer was killed, or the disk was full.

    Lines of earlier attempts are made durable: a power loss can only affect this attempt's lines.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        # Where the last complete line ends.
        begin, newline = size, -1
        while begin and newline < 0:
            end, begin = begin, max(0, begin - _CHUNK)
            newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if begin + newline + 1 < size:
            os.ftruncate(descriptor, begin + newline + 1)
        os.fsync(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _to_json_types(value: Any) -> Any:
    """Return the value in JSON's types; other values (a path, NaN) become text."""
    if isinstance(value, Mapping):
        return {str(key): _to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
