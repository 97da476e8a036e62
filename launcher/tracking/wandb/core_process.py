"""W&B's process, the program wandb-core, which W&B starts in each process that tracks."""

from __future__ import annotations

from contextlib import suppress

import psutil


def leave() -> None:
    """Disconnect from W&B's process, which may have ended, so that the next session starts another.

    If that process ended with an error, W&B ends the calling thread (SystemExit), without a message.
    """
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown(exit_code=1)


def running() -> list[psutil.Process]:
    """Return the running children of this process that are W&B's: the programs named wandb-core."""
    return [child for child in psutil.Process().children() if is_running(child) and child.name().startswith("wandb-core")]


def is_running(process: psutil.Process) -> bool:
    """Return whether the process runs; a zombie, whose exit code W&B has not read yet, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
