"""Use rank 0's trackers one command at a time: `python rank_in_small.py PLAN RUN_DIR ATTEMPT`.

Each command is a JSON line, [METHOD, ARGUMENTS, FIELDS]; the answer has the seconds that the call took. "stop" returns whether
W&B requested a stop, "core" the process ID of W&B's process.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.tracker import start_trackers
from launcher.tracking.wandb import tracker


def main(plan_file: str, run_dir: str, attempt: int) -> None:
    plan, stop = LaunchPlan.load(plan_file), threading.Event()
    trackers: Any = None
    for line in sys.stdin:
        method, arguments, fields = json.loads(line)
        began = time.monotonic()
        answer: Any = None
        if method == "limits":
            for name, value in fields.items():
                setattr(tracker, name, value)
        elif method == "start":
            trackers = start_trackers(plan, run_dir, attempt, stop.set)
        elif method == "stop":
            answer = stop.is_set()
        elif method == "core":
            cores = tracker.running_cores()
            answer = cores[0].pid if cores else None
        else:
            getattr(trackers, method)(*arguments, **fields)
        print("answer:", json.dumps({"seconds": time.monotonic() - began, "answer": answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
