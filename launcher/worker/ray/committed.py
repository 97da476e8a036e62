"""The checkpoints that an attempt commits, with what was logged at their steps, for Ray Train to be told of."""

from __future__ import annotations

from typing import Any

from launcher.checkpoint import store
from launcher.errors import CheckpointError
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import Tail


class Committed:
    """Found by looking; one listing of a folder a look, however many files lie in it, and each checkpoint is opened once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._metrics = Tail(run.metrics)
        self._logged: dict[int, dict[str, Any]] = {}
        self._seen: set[str] = set()

    def look(self, attempt: int) -> list[dict[str, Any]]:
        """Those of `attempt` that are there since the last look."""
        found = []
        for path in sorted(self._run.checkpoints.glob("step-*")):
            if path.name in self._seen:
                continue
            try:
                checkpoint = store.open_checkpoint(path)
            except CheckpointError:
                continue
            self._seen.add(path.name)
            if checkpoint.manifest.attempt == attempt:
                found.append({"step": checkpoint.step, "path": str(path), "metrics": self._numbers_of(checkpoint.step)})
        return found

    def _numbers_of(self, step: int) -> dict[str, float]:
        """What was logged at a step, as far as it is a number; the file is read on from where it was read before."""
        for line in self._metrics.poll():
            number = line["trainer/step"]
            self._logged[number] = {**self._logged.get(number, {}), **line}
        found = self._logged.get(step, {})
        self._logged = {number: line for number, line in self._logged.items() if number > step}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}
