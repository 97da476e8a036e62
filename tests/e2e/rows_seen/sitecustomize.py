"""Put on a run's PYTHONPATH to record or slow down its batches, or to set its clock, controlled by environment variables.

ROWS_SEEN: a folder into which each rank writes the rows of its batches, and a few of its environment variables, which cannot be
read from outside. Each attempt and rank has one file, with one line per batch: its step, the rank's own rows, and the rows of the
whole batch. Unless the agent restarted the ranks, line k is the k-th step after the attempt's start.

SECONDS_PER_STEP: the minimum time to make a batch. A sleeping rank uses no CPU, unlike one that trains while the test waits.

CLOCK_AHEAD: a file with the seconds by which the wall clock of the run's processes is ahead, read whenever they ask for the time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

LOADER = "launcher.data.loader"
VARIABLES = ("WANDB_API_KEY", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class _Watched:
    """Patches the module that makes the batches when it is first imported, so that torch is not imported early."""

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
    # Read the rank here, not on import: the process may be a fork of the one that loaded this file.
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

if "CLOCK_AHEAD" in os.environ:
    _wall_clock = time.time
    time.time = lambda: _wall_clock() + float(Path(os.environ["CLOCK_AHEAD"]).read_text() or 0)
