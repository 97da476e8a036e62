"""Ray Train is told of committed checkpoints in a thread: at each report all workers of a group meet, and one that hangs or
comes late must not keep the others from hearing what they are told. What was logged goes with the checkpoint of its step: of a
report without one Ray Train keeps nothing (`CheckpointManager.after_report`, Ray 2.60).
"""

from __future__ import annotations

import json
import queue
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The one file of a checkpoint as Ray knows it.
POINTER = "checkpoint.json"


class Reporter:
    """One for each worker of a group; `rank` is its rank there. All are given the same checkpoints in the same order."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        # Of all checkpoints of the attempt.
        self.num_given = 0
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._report_all, name="reporter", daemon=True)
        self._thread.start()

    def give(self, saved: Sequence[dict[str, Any]]) -> None:
        """The next checkpoints of the attempt."""
        for checkpoint in saved:
            self._waiting.put(checkpoint)
        self.num_given += len(saved)

    def finish(self, most_s: float) -> None:
        """Wait for what is still to be reported, for `most_s` seconds at most."""
        self._waiting.put(None)
        self._thread.join(most_s)

    def _report_all(self) -> None:
        for saved in iter(self._waiting.get, None):
            try:
                self._report(saved)
            except Exception as error:
                # The workers would not meet at the next one either. Ray's knowledge is for its own pages: training goes on.
                said = f"{type(error).__name__}: {error}"
                print(f"Ray Train is told of no more checkpoints of this attempt: {said}", file=sys.stderr, flush=True)
                return

    def _report(self, saved: dict[str, Any]) -> None:
        """Ray's own storage gets the place of the checkpoint, since the shards lie where they are to stay."""
        from ray import train

        if self._rank != 0:
            train.report(saved["metrics"])
            return
        with tempfile.TemporaryDirectory(prefix="launcher-checkpoint-") as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"step": saved["step"], "path": saved["path"]}))
            name = Path(saved["path"]).name
            pointer = train.Checkpoint(folder)
            train.report(saved["metrics"], checkpoint=pointer, checkpoint_dir_name=name, checkpoint_upload_fn=_keep)


def _keep(pointer: Any, name: str) -> Any:
    """Put a pointer where Ray Train keeps its own state; that this fails is no reason to stop training."""
    from ray import train

    storage = train.get_context().get_storage()
    try:
        return storage.persist_current_checkpoint(pointer, name)
    except Exception as error:
        print(f"Ray Train's storage does not take {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return train.Checkpoint(storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem)
