from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from launcher.errors import RunError
from launcher.worker.rank import RankEnv


def test_ranks_are_read_from_the_agents_environment() -> None:
    environ = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert RankEnv.from_environ(environ) == RankEnv(rank=3, local_rank=1, world_size=4, restart=2)
    with pytest.raises(RunError, match="WORLD_SIZE"):
        RankEnv.from_environ({"RANK": "0", "LOCAL_RANK": "0"})


def test_a_process_dies_with_its_parent() -> None:
    child = (
        "import os, time; from launcher.worker.rank import die_with_parent;"
        "die_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its parent"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
