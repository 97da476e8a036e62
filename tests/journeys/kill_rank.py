"""Kill a rank of a run with SIGKILL once the run has reached a step and has a checkpoint: kill_rank.py RUN_DIR RANK STEP"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

DEADLINE_S = 150.0
run, rank, step = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])


def process_id() -> int | None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"launcher rank {rank}: {run / 'plan.json'} "):
                return process.pid
    return None


until = time.monotonic() + DEADLINE_S
while time.monotonic() < until:
    has_step = (run / "metrics.jsonl").is_file() and f'"trainer/step": {step},' in (run / "metrics.jsonl").read_text()
    if has_step and any((run / "checkpoints").glob("step-*")):
        number = process_id()
        if number is None:
            sys.exit(f"rank {rank} of {run} does not run")
        os.kill(number, signal.SIGKILL)
        sys.exit()
    time.sleep(0.05)
sys.exit(f"{run} has not reached step {step}")
