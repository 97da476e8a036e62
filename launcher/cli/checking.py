"""Checkpoints read from end to end against their digests, with progress where somebody watches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint

# A login node is shared; so many readers are as fast as most storage.
_MOST_THREADS = 8


def verify(checkpoints: Sequence[Checkpoint]) -> dict[Path, CheckpointError | None]:
    """DamagedCheckpoint or UnreadableCheckpoint of each checkpoint, by its path; None where it is whole."""
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with _progress(sum(size(checkpoint) for checkpoint in checkpoints)) as on_read:
        return {c.path: _error_of(c, threads, on_read) for c in checkpoints}


def size(checkpoint: Checkpoint) -> int:
    """Bytes of the files that the manifest names."""
    return sum(entry.size for entry in checkpoint.manifest.files.values())


def _error_of(checkpoint: Checkpoint, threads: int, on_read: Callable[[int], None] | None) -> CheckpointError | None:
    try:
        problems = store.verify(checkpoint.path, threads=threads, on_read=on_read)
    except UnreadableCheckpoint as error:
        return error
    return DamagedCheckpoint(problems) if problems else None


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda count: progress.advance(task, count)
