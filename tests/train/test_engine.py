"""A process killed while it builds an extension does not block others."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import RankServer
from torch import nn

from launcher.config.sections.train import DeepSpeedSection, OptimSection
from launcher.train.engine import LockedBaton
from launcher.train.optim import build_optimizer, set_learning_rate

HOLDER = """
import sys, time
from launcher.train.engine import LockedBaton
print(LockedBaton(sys.argv[1]).try_acquire(), flush=True)
time.sleep(60)
"""


def holding(lock: Path) -> subprocess.Popen[str]:
    """Start a process that holds the build lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    first, second = LockedBaton(str(lock)), LockedBaton(str(lock), wait_seconds=0.01)
    assert first.try_acquire()
    assert not second.try_acquire()
    waiting = threading.Thread(target=second.wait)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    first.release()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert not lock.exists()


@pytest.mark.rest
def test_a_process_killed_during_a_build_blocks_no_other(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    process = holding(lock)
    try:
        baton = LockedBaton(str(lock), wait_seconds=0.01)
        assert not baton.try_acquire()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        assert lock.exists()
        baton.wait()
        assert LockedBaton(str(lock)).try_acquire()
    finally:
        process.kill()
        process.wait(timeout=10)


def test_a_stale_lock_file_blocks_no_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    baton = LockedBaton(str(lock))
    assert baton.try_acquire()
    baton.release()
    assert not lock.exists()


def test_a_lock_that_another_program_has_deleted_is_released(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    baton = LockedBaton(str(lock))
    assert baton.try_acquire()
    lock.unlink()
    baton.release()
    assert LockedBaton(str(lock)).try_acquire()


@pytest.mark.rest
def test_torch_uses_these_locks_in_a_rank() -> None:
    script = (
        "from torch.utils import cpp_extension; from launcher.train.engine import LockedBaton, lock_builds; "
        "lock_builds(); assert cpp_extension.FileBaton is LockedBaton; "
        "assert cpp_extension._jit_compile.__globals__['FileBaton'] is LockedBaton"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_ranks_meet_without_compiling_anything(rank_server: RankServer, tmp_path: Path) -> None:
    cache = tmp_path / "extensions"
    cache.mkdir()
    environment = {"TORCH_EXTENSIONS_DIR": str(cache)}
    rank_server.values("train_ranks:build_models", [[[]]] * 2, tmp_path / "ranks", environment=environment)
    assert list(cache.iterdir()) == []


def test_one_dimensional_weights_are_not_decayed() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(layer.parameters(), OptimSection(weight_decay=0.1), DeepSpeedSection())
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert by_decay == {0.1: [2], 0.0: [1, 1, 1]}
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert isinstance(optimizer, torch.optim.AdamW)
