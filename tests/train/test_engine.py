"""Compilers and headers for building kernels; a process killed while it builds an extension does not block others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import require_exit
from forked_ranks import RankServer
from plan_fixtures import PlanOf
from torch import nn

from launcher import hardware
from launcher.config.sections.train import DeepSpeedSection, OptimSection
from launcher.hardware import missing_build_tools
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


# What a rank does before its first step. If torch may use helper processes, warm_pool starts them.
COMPILE = """
import json, sys, threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

from launcher.plan.launch_plan import LaunchPlan
from launcher.train.preload import import_stack

import_stack(LaunchPlan.load(Path(sys.argv[1])), tracks=False)
from launcher.train import model

model.find_layers = lambda *arguments: []
model.compile_layers(SimpleNamespace(config=SimpleNamespace(_attn_implementation="none")), torch.device("cpu"))
from torch._inductor.async_compile import AsyncCompile, get_compile_threads

threads = []

def warm_up():
    threads.append(get_compile_threads())
    AsyncCompile.warm_pool()

warm_up()
other = threading.Thread(target=warm_up)
other.start()
other.join()
print(json.dumps({"threads": threads, "processes": len(psutil.Process().children(recursive=True))}))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a single folder containing gcc and clang++, and Python's headers in `include`."""
    for name in ("gcc", "clang++"):
        (tmp_path / name).touch(0o700)
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hardware, "_include_folder", lambda: str(tmp_path / "include"))
    return tmp_path


def test_this_python_has_its_headers_where_they_are_looked_for() -> None:
    """The tests that compile DeepSpeed's extensions need the headers too."""
    assert [problem for problem in missing_build_tools("cpu") if "headers" in problem.message] == []


def test_gpus_need_a_c_compiler_and_cpus_the_one_that_torch_calls(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_build_tools("cuda") == []
    (problem,) = missing_build_tools("cpu")
    assert (problem.message, problem.value, problem.remedy) == ("no C++ compiler is found", "g++", "apt-get install g++")
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert missing_build_tools("cpu") == []
    # Triton runs the compiler in CC, even if it does not exist and gcc does.
    monkeypatch.setenv("CC", "/opt/absent/cc")
    (problem,) = missing_build_tools("cuda")
    assert (problem.value, problem.remedy) == ("CC=/opt/absent/cc", "apt-get install gcc, and unset CC")


def test_headers_may_be_in_a_folder_that_the_compiler_is_told_of(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tools / "include").rename(tools / "elsewhere")
    (problem,) = missing_build_tools("cuda")
    assert problem.message == "Python's headers are not installed (Python.h)"
    assert f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev" in problem.remedy
    monkeypatch.setenv("C_INCLUDE_PATH", f"/usr/include/none:{tools}/elsewhere")
    assert missing_build_tools("cuda") == []


@pytest.mark.compiler
@pytest.mark.rest
def test_a_rank_starts_no_helper_processes(plan_of: PlanOf, tmp_path: Path) -> None:
    """Other threads must not start them either: autograd's threads compile too, and torch's settings are per thread."""
    plan = tmp_path / "plan.json"
    plan.write_text(plan_of("model.dtype=fp32").to_json())
    done = subprocess.run([sys.executable, "-c", COMPILE, str(plan)], capture_output=True, text=True, timeout=300)
    require_exit(done)
    assert json.loads(done.stdout.splitlines()[-1]) == {"threads": [1, 1], "processes": 0}
