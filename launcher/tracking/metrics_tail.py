"""A run at a glance, from a metrics.jsonl of any length: a few of its lines are decoded, the others only searched."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.plan.run_dir import RunDir
from launcher.run_records import Status
from launcher.tracking.jsonl import decode_lines

# Single steps vary: what is usual is told by so many of them.
_RECENT = 20
_TRAINED = b'"train/loss"'
# Lines that tell of a wait between steps.
_WAITS = (b'"time/eval_s"', b'"ckpt/stall_s"')


@dataclass(frozen=True)
class Spent:
    """GPU hours of the whole run up to the time `at`, in seconds since the epoch, and US dollars where there is a price."""

    gpu_hours: float
    usd: float | None
    at: float


@dataclass(frozen=True)
class Glance:
    """`recent` are the newest lines of training steps of one attempt, newest first; `losses` go through the whole run."""

    recent: tuple[dict[str, Any], ...]
    losses: tuple[float, ...]
    eval_loss: float | None
    eval_step: int | None
    spent: Spent | None

    @property
    def last(self) -> dict[str, Any]:
        """The newest line of a training step; empty without one."""
        return self.recent[0] if self.recent else {}


def glance(path: str | Path, num_points: int = 40, resumed: Mapping[int, int] | None = None) -> Glance:
    """Look at a run's metrics; `losses` has up to `num_points` values. A missing file is an empty one.

    `resumed` are the steps from which attempts have gone on: what was measured of later ones before is of another model.
    """
    try:
        with _mapped(path) as data:
            recent = tuple(islice(_backwards(data, _TRAINED), _RECENT))
            newest = recent[0]["attempt"] if recent else 0
            begins = {number: step for number, step in (resumed or {}).items() if number <= newest}

            def counts(line: dict[str, Any]) -> bool:
                later = (step for number, step in begins.items() if number > line["attempt"])
                return bool(line["trainer/step"] <= min(later, default=math.inf))

            evaluated = next(filter(counts, _backwards(data, b'"eval/held_out/loss"')), {})
            losses = tuple(line["train/loss"] for line in filter(counts, _sampled(data, num_points)))
            return Glance(
                tuple(line for line in recent if line["attempt"] == recent[0]["attempt"]),
                losses,
                evaluated.get("eval/held_out/loss"),
                evaluated.get("trainer/step"),
                _spent(next(_backwards(data, b'"cost/gpu_hours"'), None)),
            )
    except (FileNotFoundError, ValueError):
        return Glance((), (), None, None, None)


def newest_step(run: RunDir, status: Status) -> int:
    """The newest step that is known of a run in this status: the ranks log more often than they write status.json."""
    with suppress(OSError, ValueError), _mapped(run.metrics) as data:
        last = next(_backwards(data, _TRAINED), None)
        if last is not None and last["attempt"] == status.attempt and last["time"] > status.updated_at:
            return int(last["trainer/step"])
    return status.step


def lines_of_time(path: str | Path, borders: Sequence[float]) -> list[dict[str, Any]]:
    """Of a run's metrics the lines by which `goodput.breakdown` tells the same as by all of them, in their order.

    These are the lines of evaluations and saves, and the last training step before each of `borders` and before the end. Those
    are the times, in seconds since the epoch, at which ranks were started and attempts began and ended. A missing file has none.
    """
    try:
        with _mapped(path) as data:
            ends = [*(_after(data, at) for at in borders), data.rfind(b"\n") + 1]
            places = {data.rfind(_TRAINED, 0, end) for end in ends} | {at for word in _WAITS for at in _places(data, word)}
            begins = sorted({data.rfind(b"\n", 0, place) + 1 for place in places - {-1}})
            return [line for begin in begins for line in decode_lines(_line(data, begin))]
    except (FileNotFoundError, ValueError):
        return []


@contextmanager
def _mapped(path: str | Path) -> Iterator[mmap.mmap]:
    """Raises ValueError for an empty file, which cannot be mapped."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _after(data: mmap.mmap, at: float) -> int:
    """Where the first line begins that was written after a time; lines stand in the order of time."""
    low, high = 0, len(data)
    while low < high:
        middle = max(low, data.rfind(b"\n", 0, (low + high) // 2) + 1)
        if any(line["time"] > at for line in decode_lines(_line(data, middle))):
            high = middle
        else:
            low = data.find(b"\n", middle) + 1 or len(data)
    return low


def _places(data: mmap.mmap, word: bytes) -> Iterator[int]:
    place = data.find(word)
    while place >= 0:
        yield place
        place = data.find(word, place + 1)


def _backwards(data: mmap.mmap, word: bytes) -> Iterator[dict[str, Any]]:
    """The lines that hold `word`, newest first, each decoded when it is asked for; torn ones are left out."""
    end = len(data)
    while (found := data.rfind(word, 0, end)) >= 0:
        end = data.rfind(b"\n", 0, found) + 1
        yield from decode_lines(_line(data, end))


def _line(data: mmap.mmap, start: int) -> bytes:
    end = data.find(b"\n", start)
    return data[start : end if end >= 0 else len(data)]


def _sampled(data: mmap.mmap, num_points: int) -> Iterator[dict[str, Any]]:
    """The lines of training steps that begin after evenly spaced places."""
    before = -1
    for i in range(num_points):
        place = data.find(_TRAINED, len(data) * i // num_points)
        start = data.rfind(b"\n", 0, place) + 1 if place >= 0 else before
        if start > before:
            before = start
            yield from decode_lines(_line(data, start))


def _spent(line: dict[str, Any] | None) -> Spent | None:
    return None if line is None else Spent(line["cost/gpu_hours"], line.get("cost/usd"), line["time"])
