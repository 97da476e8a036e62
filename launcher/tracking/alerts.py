"""How often a run warns of one thing: what lasts is told again now and then, not at every step."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

REPEAT_S = 1800.0


class RateLimit:
    """Lets one alert of a kind through in REPEAT_S seconds, whichever thread it comes from.

    What stands before the first colon of an alert is its kind: "status.json could not be written: no space left".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._told_at: dict[str, float] = {}

    def due(self, text: str) -> bool:
        """Whether this alert is to be told; it counts as told then."""
        kind, now = text.partition(":")[0], self._clock()
        with self._lock:
            due = now - self._told_at.get(kind, -math.inf) >= REPEAT_S
            if due:
                self._told_at[kind] = now
        return due
