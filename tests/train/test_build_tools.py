"""Compilers and headers for building kernels, and the number of processes that build them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import is_scipy_available

from launcher.plan.launch_plan import LaunchPlan
from launcher.train import build_tools
from launcher.train.build_tools import missing_build_tools

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
import transformers.utils

helpers = {"threads": threads, "processes": len(psutil.Process().children(recursive=True))}
packages = {
    "imported": sorted({"scipy", "sklearn"} & {*sys.modules}),
    "has_scipy": transformers.utils.is_scipy_available(),
}
print(json.dumps({"helpers": helpers, "packages": packages}))
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
    monkeypatch.setattr(build_tools, "_include_folder", lambda: str(tmp_path / "include"))
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
def test_a_rank_imports_what_it_needs_and_starts_no_helper_processes(plan_of: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    """Other threads must not start them either: autograd's threads compile too, and torch's settings are per thread."""
    plan = tmp_path / "plan.json"
    plan.write_text(plan_of("model.dtype=fp32").to_json())
    done = subprocess.run([sys.executable, "-c", COMPILE, str(plan)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["helpers"] == {"threads": [1, 1], "processes": 0}
    # transformers reports scipy as available again to other code.
    assert found["packages"] == {"imported": [], "has_scipy": is_scipy_available()}
