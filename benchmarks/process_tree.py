"""Run a command and measure it together with all processes that it starts.

    python benchmarks/process_tree.py FIGURES.json COMMAND ...

Writes one JSON object: `seconds` (wall-clock, to the command's own end), `cpu_s` (user and system time of all processes),
`peak_mib` (the largest sum of their proportional set sizes, sampled) and `largest_mib` (the largest resident set of any one
process, exact). Exits with the command's code. Processes that remain LEFTOVER_S later are killed, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 0.1
LEFTOVER_S = 20.0
_PR_SET_CHILD_SUBREAPER = 36


def main(figures: str, *command: str) -> int:
    # Orphaned processes become children of this one, so that their CPU time is counted too.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    peak, ended = [0.0], threading.Event()
    began = time.perf_counter()
    process = subprocess.Popen(command)
    sampler = threading.Thread(target=_sample, args=(peak, ended))
    sampler.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    ended.set()
    sampler.join()
    if not _reap_leftovers():
        leftovers = _descendants()
        print(f"processes of the command are still running {LEFTOVER_S:.0f} s after its end: {leftovers}", file=sys.stderr)
        for leftover in leftovers:
            leftover.kill()
        return 1
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    measured = {
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": peak[0],
        "largest_mib": usage.ru_maxrss / 1024,
    }
    Path(figures).write_text(json.dumps(measured))
    return code if code >= 0 else 128 - code


def _sample(peak: list[float], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_EVERY_S):
        peak[0] = max(peak[0], sum(proportional_set_mib(process.pid) for process in _descendants()))


def proportional_set_mib(pid: int) -> float:
    """Return a process's memory in MiB, counting pages shared by n processes as 1 / n; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _reap_leftovers() -> bool:
    """Wait for processes that briefly outlive the command, such as a fork server. Return False if they do not end."""
    deadline = time.monotonic() + LEFTOVER_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            time.sleep(0.01)
    return False


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
