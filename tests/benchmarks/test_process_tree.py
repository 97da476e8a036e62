"""Measuring a command together with all processes that it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import process_tree

# The command exits at once and leaves a grandchild whose parent has already exited.
ORPHAN = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        held = bytearray(b"x") * (100 * 2**20)
        while time.process_time() < 0.5:
            pass
        os.write(1, b"done")
    os._exit(0)
os.wait()
time.sleep(0.6)
"""


def measure(tmp_path: Path, code: str) -> tuple[int, dict[str, float]]:
    figures = tmp_path / "figures.json"
    command = [sys.executable, process_tree.__file__, str(figures), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(figures.read_text())


def test_processes_whose_parent_has_ended_are_counted(tmp_path: Path) -> None:
    code, figures = measure(tmp_path, ORPHAN)
    assert code == 0
    assert figures["cpu_s"] > 0.5
    assert figures["peak_mib"] > 100
    assert figures["largest_mib"] > 100
    assert figures["seconds"] > 0.6


def test_the_exit_code_is_that_of_the_command(tmp_path: Path) -> None:
    assert measure(tmp_path, "raise SystemExit(3)")[0] == 3
    assert measure(tmp_path, "import os; os.kill(os.getpid(), 9)")[0] == 137
