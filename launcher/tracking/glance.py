"""A run at a glance, from a metrics.jsonl of any length: a few of its lines are decoded, the others only searched."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.tracking.jsonl import decode_lines


@dataclass(frozen=True)
class Spent:
    """GPU hours of the whole run up to the time `at`, in seconds since the epoch, and US dollars where there is a price."""

    gpu_hours: float
    usd: float | None
    at: float


@dataclass(frozen=True)
class Glance:
    """`last` is the newest line of a training step, empty without one; `losses` go through the whole run, oldest first."""

    last: dict[str, Any]
    losses: tuple[float, ...]
    eval_loss: float | None
    spent: Spent | None


def glance(path: str | Path, num_points: int = 40) -> Glance:
    """Look at a run's metrics; `losses` has up to `num_points` values. A missing file is an empty one."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            last = next(_backwards(data, b'"train/loss"'), {})
            evaluated = next(_backwards(data, b'"eval/held_out/loss"'), {})
            losses = tuple(_losses(data, num_points))
            return Glance(
                last, losses, evaluated.get("eval/held_out/loss"), _spent(next(_backwards(data, b'"cost/gpu_hours"'), None))
            )
    except (FileNotFoundError, ValueError):
        # An empty file cannot be mapped.
        return Glance({}, (), None, None)


def _backwards(data: mmap.mmap, word: bytes) -> Iterator[dict[str, Any]]:
    """The lines that hold `word`, newest first, each decoded when it is asked for; torn ones are left out."""
    end = len(data)
    while (found := data.rfind(word, 0, end)) >= 0:
        end = data.rfind(b"\n", 0, found) + 1
        yield from decode_lines(_line(data, end))


def _line(data: mmap.mmap, start: int) -> bytes:
    end = data.find(b"\n", start)
    return data[start : end if end >= 0 else len(data)]


def _losses(data: mmap.mmap, num_points: int) -> Iterator[float]:
    """Losses of the lines that begin after evenly spaced places."""
    before = -1
    for i in range(num_points):
        place = data.find(b'"train/loss"', len(data) * i // num_points)
        start = data.rfind(b"\n", 0, place) + 1 if place >= 0 else before
        if start > before:
            before = start
            yield from (line["train/loss"] for line in decode_lines(_line(data, start)))


def _spent(line: dict[str, Any] | None) -> Spent | None:
    return None if line is None else Spent(line["cost/gpu_hours"], line.get("cost/usd"), line["time"])
