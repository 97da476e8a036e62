"""W&B's own step, which only grows, of what was measured by a run that may go back to a checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.tracking.jsonl import merged


@dataclass(frozen=True)
class Stretch:
    """Attempts that go on from each other: W&B's step is `offset` more than trainer/step. `lines` are one per step."""

    offset: int
    lines: list[dict[str, Any]]


def stretches(lines: Sequence[dict[str, Any]], returns: Mapping[int, int]) -> list[Stretch]:
    """The lines of metrics.jsonl, as they were written, where W&B has them; the last stretch is that of the newest attempt.

    `returns` gives the step of the checkpoint to which a person has gone back, by the attempt that began there. After a crash
    an attempt trains the same steps with the same result, so it goes on in the stretch of the one before.
    """
    found: list[Stretch] = []
    own: list[dict[str, Any]] = []
    offset, top = 0, 0
    by_attempt: dict[int, list[dict[str, Any]]] = {number: [] for number in returns}
    for line in lines:
        by_attempt.setdefault(line["attempt"], []).append(line)
    for number in sorted(by_attempt):
        back = returns.get(number)
        if back is not None and back + offset < top:
            found.append(Stretch(offset, merged(own)))
            own, offset = [], top - back
        own += by_attempt[number]
        top = max(top, *(line["trainer/step"] + offset for line in by_attempt[number]), 0)
    return [*found, Stretch(offset, merged(own))]
