"""What is scored on lm-evaluation-harness tasks, and where the scores are. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.evaluate.task import Weights

BASE = "base"
_NOT_PLAIN = re.compile(r"^\.+|[^\w.-]")


@dataclass(frozen=True)
class BenchmarkRequest:
    """The tasks, and the weights to score on them, keyed by side. `tokenizer` is the run's.

    `task_folder` holds the user's own tasks. `limit` is the number of questions per task, None for all. `code` is the folder of
    the model's own Python files. `checkpoint` is the digest of the checkpoint's manifest.
    """

    config: RunConfig
    step: int
    tasks: tuple[str, ...]
    task_folder: Path | None
    limit: int | None
    weights: dict[str, Weights]
    tokenizer: str
    code: str | None
    context: int
    checkpoint: str


@dataclass(frozen=True)
class BenchmarkFolder:
    """The paths of an evaluation's benchmarks: runs/NAME/evaluations/step-00000100/benchmarks."""

    root: Path

    def scores(self, task: str, side: str) -> Path:
        """The scores of a side; the verdict is beside them. A task may have any name."""
        return self.root / _NOT_PLAIN.sub("_", task) / f"{side}.json"
