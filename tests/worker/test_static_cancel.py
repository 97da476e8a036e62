"""`cancel --no-save` on `cluster=static` is two signals to each machine's agent, which may read them late on a busy machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from launcher import json_records
from launcher.plan.run_dir import RunDir
from launcher.run_records import CancelRequest

AGENT = """
import signal, sys, threading, time
from pathlib import Path
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker.signals import CANCEL
from launcher.worker.static.peers import Peers

signal.pthread_sigmask(signal.SIG_BLOCK, {CANCEL})
peers = Peers(RunDir(Path(sys.argv[1])), 1, Attempt(None), 0, print)
threading.Thread(target=peers._look_for_cancel, daemon=True).start()
time.sleep(1)
sys.exit(not all(signal.sigtimedwait({CANCEL}, 5) for _ in range(2)))
"""


def test_an_agent_that_reads_its_signals_late_receives_both(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.cancel(1).parent.mkdir(parents=True)
    json_records.write(run.cancel(1), CancelRequest(time.time(), save=False))
    assert subprocess.run([sys.executable, "-c", AGENT, str(tmp_path)], timeout=60).returncode == 0
