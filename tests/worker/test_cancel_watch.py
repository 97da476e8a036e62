"""A cancel request in the run directory becomes signals to the agent, which may read them late on a busy machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.plan.run_dir import RunDir
from launcher.runs import json_records
from launcher.runs.run_records import CancelRequest

AGENT = """
import signal, sys, time
from pathlib import Path
from launcher.plan.run_dir import RunDir
from launcher.worker.cancel_watch import watch_for_cancel
from launcher.worker.signals import CANCEL

signal.pthread_sigmask(signal.SIG_BLOCK, {CANCEL})
watch_for_cancel(RunDir(Path(sys.argv[1])), 1)
time.sleep(2)
received = 0
while signal.sigtimedwait({CANCEL}, 5 if received == 0 else 1.5):
    received += 1
print(received)
"""


@pytest.mark.parametrize("save, signals", [(True, 1), (False, 2)])
def test_a_request_becomes_one_signal_or_two_without_a_save(tmp_path: Path, save: bool, signals: int) -> None:
    run = RunDir(tmp_path)
    run.cancel(1).parent.mkdir(parents=True)
    json_records.write(run.cancel(1), CancelRequest(time.time(), save=save))
    done = subprocess.run([sys.executable, "-c", AGENT, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.stdout == f"{signals}\n", done.stderr
