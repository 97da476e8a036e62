"""What is asked of lm-evaluation-harness: request.json in the folder `benchmarks` of an evaluation. Without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import json_records
from launcher.config.schema import RunConfig
from launcher.evaluate.task import Weights

BASE = "base"
_NOT_PLAIN = re.compile(r"^\.+|[^\w.-]")


@dataclass(frozen=True)
class BenchmarkRequest:
    """The tasks, and the weights that are scored on them, by side. `tokenizer` is that of the run's model.

    `task_folder` holds tasks of the user's own. `limit` is the number of questions of each task, None for all. `code` is the
    folder of the model's own Python files. `checkpoint` is the digest of the checkpoint's manifest.
    """

    config: dict[str, Any]
    step: int
    tasks: tuple[str, ...]
    task_folder: str | None
    limit: int | None
    weights: dict[str, Weights]
    tokenizer: str
    code: str | None
    context: int
    checkpoint: str

    @property
    def settings(self) -> RunConfig:
        return RunConfig.model_validate(self.config)


@dataclass(frozen=True)
class BenchmarkFolder:
    """The paths of the benchmarks of one evaluation: runs/NAME/evaluations/step-00000100/benchmarks."""

    root: Path

    @property
    def request(self) -> Path:
        return self.root / "request.json"

    @property
    def caches(self) -> Path:
        """What takes the place of caches that others could have written; removed with the end of the evaluation."""
        return self.root / ".caches"

    def read_request(self) -> BenchmarkRequest:
        return json_records.read(BenchmarkRequest, self.request, "start the evaluation again")

    def scores(self, task: str, side: str) -> Path:
        """The scores of a side; the verdict lies beside them. A task may have any name."""
        return self.root / _NOT_PLAIN.sub("_", task) / f"{side}.json"
