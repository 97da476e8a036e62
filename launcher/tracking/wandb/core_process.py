"""W&B's process, the program wandb-core, which W&B starts in each process that tracks."""

from __future__ import annotations

from contextlib import suppress

import psutil


def leave() -> None:
    """Disconnect from W&B's process, which may have ended, so that the next session starts another."""
    import wandb

    # If the process ended with an error, W&B calls sys.exit(), which would end this thread without a message.
    with suppress(Exception, SystemExit):
        wandb.teardown(exit_code=1)


def running() -> list[psutil.Process]:
    """Return the running children of this process that are W&B's: the programs named wandb-core."""
    processes = list[psutil.Process]()
    for child in psutil.Process().children():
        # Other children may end at any time.
        with suppress(psutil.NoSuchProcess):
            if is_running(child) and child.name().startswith("wandb-core"):
                processes.append(child)
    return processes


def is_running(process: psutil.Process) -> bool:
    """Return whether the process runs; a zombie, whose exit code W&B has not read yet, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
