"""Print the process id of one rank of a run: python rank_pid.py RUN_DIR RANK"""

import sys
from contextlib import suppress
from pathlib import Path

import psutil

plan, rank = str(Path(sys.argv[1]).resolve() / "plan.json"), sys.argv[2]
for process in psutil.process_iter():
    with suppress(psutil.Error):
        command = process.cmdline()
        if "launcher.worker.entry" in command and plan in command and process.environ().get("RANK") == rank:
            print(process.pid)
            sys.exit()
sys.exit(f"rank {rank} of {plan} does not run")
