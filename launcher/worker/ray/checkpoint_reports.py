"""Committed checkpoints: the coordinator finds them, and the workers report them to Ray Train with the logged metrics."""

from __future__ import annotations

import json
import queue
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.checkpoint import store
from launcher.errors import CheckpointError
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import Tail
from launcher.worker.ray.messages import CommittedCheckpoint

# The only file in a checkpoint as Ray sees it.
POINTER = "checkpoint.json"


class CommittedCheckpoints:
    """Finds the checkpoints of a run: each call lists one folder, whatever its size, and opens each checkpoint once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._metrics = Tail(run.metrics)
        self._logged: dict[int, dict[str, Any]] = {}
        self._seen: set[str] = set()

    def find(self, attempt: int) -> list[CommittedCheckpoint]:
        """Return the checkpoints that `attempt` committed since the last call."""
        committed = []
        for path in sorted(self._run.checkpoints.glob("step-*")):
            if path.name in self._seen:
                continue
            try:
                checkpoint = store.open_checkpoint(path)
            except CheckpointError:
                continue
            self._seen.add(path.name)
            if checkpoint.manifest.attempt == attempt:
                committed.append(CommittedCheckpoint(checkpoint.step, str(path), self._metrics_of(checkpoint.step)))
        return committed

    def _metrics_of(self, step: int) -> dict[str, float]:
        """Return the metrics that were logged at a step; reads metrics.jsonl from where the last call stopped."""
        for line in self._metrics.poll():
            number = line["trainer/step"]
            self._logged[number] = {**self._logged.get(number, {}), **line}
        logged = self._logged.get(step, {})
        self._logged = {number: line for number, line in self._logged.items() if number > step}
        return {name: value for name, value in logged.items() if isinstance(value, int | float)}


class Reporter:
    """Reports checkpoints to Ray Train from a thread of the worker; `rank` is the worker's rank in its group.

    All workers of a group meet at each report, and a hung or late worker must not block the others' heartbeats. All workers
    report the same checkpoints in the same order. Metrics are reported with their step's checkpoint: Ray Train keeps nothing of a
    report without a checkpoint (`CheckpointManager.after_report`, Ray 2.60).
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        # Counts all checkpoints of the attempt.
        self.num_given = 0
        self._queue: queue.SimpleQueue[CommittedCheckpoint | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._report_all, name="reporter", daemon=True)
        self._thread.start()

    def give(self, saved: Sequence[CommittedCheckpoint]) -> None:
        """Queue the next checkpoints of the attempt."""
        for checkpoint in saved:
            self._queue.put(checkpoint)
        self.num_given += len(saved)

    def finish(self, deadline_s: float) -> None:
        """Wait at most `deadline_s` seconds for queued reports."""
        self._queue.put(None)
        self._thread.join(deadline_s)

    def _report_all(self) -> None:
        for checkpoint in iter(self._queue.get, None):
            try:
                self._report(checkpoint)
            except Exception as error:
                # The workers would not meet at the next report either. Training continues: only Ray's own pages need the reports.
                reason = f"{type(error).__name__}: {error}"
                print(f"no more checkpoints of this attempt are reported to Ray Train: {reason}", file=sys.stderr, flush=True)
                return

    def _report(self, checkpoint: CommittedCheckpoint) -> None:
        """Report a pointer to the checkpoint; its shards stay where they are."""
        from ray import train

        metrics = dict(checkpoint.metrics)
        if self._rank != 0:
            train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="launcher-checkpoint-") as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"step": checkpoint.step, "path": checkpoint.path}))
            name = Path(checkpoint.path).name
            pointer = train.Checkpoint(folder)
            train.report(metrics, checkpoint=pointer, checkpoint_dir_name=name, checkpoint_upload_fn=_store_pointer)


def _store_pointer(pointer: Any, name: str) -> Any:
    """Store a pointer in Ray Train's storage; a failure must not stop training."""
    from ray import train

    storage = train.get_context().get_storage()
    try:
        return storage.persist_current_checkpoint(pointer, name)
    except Exception as error:
        print(f"Ray Train's storage refused {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return train.Checkpoint(storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem)
