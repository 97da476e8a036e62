"""On the PYTHONPATH of a run: what its ranks do with each batch that they are given, by two variables of its environment.

ROWS_SEEN: a folder into which they write the rows of each batch, and some variables of their environment, which is not to be seen
from outside. A file for each attempt and rank, with a line for each batch that was made: its step, the rank's own rows, and those
of the whole batch. Where the agent has not started the ranks again, line k is the k-th step after the one that the attempt began
with.

SECONDS_PER_STEP: each batch takes at least so long to make, which costs no CPU, as training does that a test waits for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LOADER = "launcher.data.loader"
VARIABLES = ("WANDB_API_KEY", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class _Watched:
    """Finds the module that makes the batches, once, and changes it when it is loaded: torch is not imported before its time."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != LOADER:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            module.TrainBatches.step = _watched(module.TrainBatches.step)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _watched(make: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    def made(batches: Any, step: int) -> Any:
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
        batch = make(batches, step)
        if folder := os.environ.get("ROWS_SEEN"):
            _write(folder, step, batch)
        return batch

    return made


def _write(folder: str, step: int, batch: Any) -> None:
    # A rank may be a fork of the process that has loaded this file.
    attempt, rank = int(sys.argv[-1]), int(os.environ["RANK"])
    file = os.path.join(folder, f"{attempt:03d}-{rank}.jsonl")
    if not os.path.exists(file):
        with open(file.removesuffix(".jsonl") + ".environ", "w") as variables:
            json.dump({name: os.environ.get(name) for name in VARIABLES}, variables)
    own = [row for micro in batch.micro for row in micro.row_ids]
    with open(file, "a") as lines:
        lines.write(json.dumps({"step": step + 1, "own": own, "all": list(batch.row_ids)}) + "\n")


_IS_RANK = bool({"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv})
if _IS_RANK and {"ROWS_SEEN", "SECONDS_PER_STEP"} & os.environ.keys():
    sys.meta_path.insert(0, _Watched())  # type: ignore[arg-type]
