"""benchmarks/gpu.py on the CPU with tiny sizes, its report on made-up figures, and the wheels that a machine lacks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_kernel
import gpu_report
import pytest
from forked import ForkServer
from gpu_report import COMPILE, Measured, Side
from gpu_wheels import first_requirements, is_satisfied, lacking, read_freeze
from pace import slowness
from packaging.requirements import Requirement
from plan_fixtures import H100, PlanOf, config_of, plan_of

from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_tokens_per_sec

__all__ = ["config_of", "plan_of"]
REPO = Path(__file__).resolve().parents[2]
DEADLINE_S, LATEST_S = 600, 1700
CASE = ("model=qwen3_1_7b", "cluster.ranks_per_node=1", "data.max_length=4096", "train.global_batch_size=16")
FREEZE = """
# a CUDA image
torch==2.9.0a0+git1234
numpy==2.2.0
psutil==5.9.8
-e git+https://example.com/x.git#egg=x
triton @ file:///wheels/triton-3.5.0.whl
"""


@pytest.fixture
def plan(plan_of: PlanOf) -> LaunchPlan:
    return plan_of(*CASE, device=replace_count(1))


def replace_count(count: int):
    return H100.model_copy(update={"count": count})


def measured(plan: LaunchPlan, tokens_per_sec: float, reserved_gib: float) -> Measured:
    """Return figures of a launcher run with 1 GiB for CUDA, and of a bare loop at half its speed."""
    last = {
        "perf/mfu": 0.47,
        "memory/planned_gib": plan.peak.peak_gib - plan.peak.runtime_gib,
        "memory/peak_reserved_gib": reserved_gib,
        "memory/peak_active_gib": reserved_gib / 1.05,
        "gpu/memory_max_frac": (reserved_gib + 1.0) / plan.memory.device_gib,
    }
    ours = {"tokens_per_sec": tokens_per_sec, "step_s": 1.5, "metrics": [last], "alerts": []}
    theirs = {"tokens_per_sec": tokens_per_sec / 2, "step_s": 3.0, "peak_gib": 70.0}
    found = Measured("NVIDIA H100 80GB HBM3", tests="Tests marked gpu: 6 passed, 0 failed, 0 skipped.")
    found.kernels = {
        "flash_attention_2": {"missing": "flash-attn is not installed"},
        "varlen": {"is_isolated": True, "isolation": "", "error": 2e-3, "forward_ms": 1.0, "backward_ms": 2.5, "tflops": 300.0},
    }
    found.cases["qwen3_1_7b"] = [
        Side("launcher", "varlen", "none", plan, ours),
        Side("bare DeepSpeed loop", "sdpa", "all", plan, theirs),
    ]
    return found


def test_the_report_compares_with_the_plan_and_with_the_other_sides(plan: LaunchPlan) -> None:
    planned = planned_tokens_per_sec(plan)
    assert planned is not None
    memory_gib = plan.peak.peak_gib - plan.peak.runtime_gib
    text = "\n".join(gpu_report.lines(measured(plan, 1.1 * planned, 0.9 * memory_gib)))
    assert "| flash_attention_2 | not here: flash-attn is not installed |" in text
    assert "| varlen | yes | 2.0e-03 | 1.000 | 2.500 | 300.0 |" in text
    assert "| 47.0% |" in text
    assert "| 2.00 |" in text.split("bare DeepSpeed loop")[1]
    assert "(+10.0%, within 20%)" in text
    assert "(-10.0%, NOT within 5%)" in text


def test_the_row_of_a_measured_gpu_gives_its_speed_and_memory(plan: LaunchPlan) -> None:
    """With the printed row in the table, the plan predicts the measured run."""
    planned = planned_tokens_per_sec(plan)
    assert planned is not None
    found = measured(plan, 1.1 * planned, 42.0)
    row = gpu_report.fitted_row(found)
    assert row.startswith('"H100-80GB": runtime_gib=1, fragmentation=1.05, gemm_share=0.')
    share = gpu_report.gemm_share(found.cases["qwen3_1_7b"][0])
    assert planned_tokens_per_sec(plan, replace(GPUS["H100-80GB"], gemm_share=share)) == pytest.approx(1.1 * planned, rel=1e-3)


def test_a_run_on_cpus_has_neither_planned_speed_nor_a_row(plan_of: PlanOf) -> None:
    on_cpus = plan_of()
    found = Measured(
        "a CPU", cases={"tiny": [Side("launcher", "varlen", "none", on_cpus, {"tokens_per_sec": 9.0, "step_s": 1.0})]}
    )
    assert planned_tokens_per_sec(on_cpus) is None
    assert gpu_report.fitted_row(found) == ""
    assert "planned" not in "\n".join(gpu_report.lines(found)).replace("no planned speed", "")


def test_a_kernel_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build for another torch version fails only when it is imported."""
    (tmp_path / "flash_attn_interface.py").write_text('raise ImportError("undefined symbol: _ZN3c10")')
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu_kernel.missing("flash_attention_3") == {"missing": "flash-attn-3 cannot be imported: undefined symbol: _ZN3c10"}
    assert gpu_kernel.missing("varlen") == gpu_kernel.missing("sdpa") == {}


def test_the_wheels_are_those_that_the_image_lacks() -> None:
    image = read_freeze(FREEZE)
    assert image == {"torch": "2.9.0a0+git1234", "numpy": "2.2.0", "psutil": "5.9.8", "triton": "file:///wheels/triton-3.5.0.whl"}
    needed = {requirement.name for requirement in lacking(first_requirements({}), image, {"ray", "wandb", "wandb-workspaces"})}
    assert {"deepspeed", "psutil", "pytest"} <= needed
    assert needed.isdisjoint({"torch", "numpy", "ray", "wandb", "wandb-workspaces", "trl"})
    assert not is_satisfied(Requirement("psutil>=7"), image["psutil"])
    compared = {requirement.name for requirement in first_requirements({"COMPARE": "1", "PACKAGES": "flash-attn"})}
    assert {"trl", "datasets", "liger-kernel", "flash-attn"} <= compared
    with pytest.raises(SystemExit, match=r"the image has torch 2\.8\.0, and torch>=2\.9 is needed"):
        list(lacking(first_requirements({}), {**image, "torch": "2.8.0"}, set()))


@pytest.mark.compiler
@pytest.mark.rest
def test_everything_runs_on_a_cpu_with_tiny_sizes(
    launcher_env: Mapping[str, str], torch_server: Callable[[], ForkServer], tmp_path: Path
) -> None:
    """The command and most of what it starts are forked, see forked_stack.py."""
    results = tmp_path / "RESULTS.md"
    env = {**launcher_env, "PATH": os.environ["PATH"]}
    words = (str(REPO / "benchmarks/gpu.py"), "--cpu-rehearsal", "--results", str(results))
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with torch_server().popen("forked_stack", *words, **streams, cwd=REPO, env=env) as process:
        try:
            output, _ = process.communicate(timeout=min(LATEST_S, DEADLINE_S * slowness()))
        finally:
            process.kill()
    assert process.returncode == 0, output[-6000:]
    text = results.read_text()
    assert "Tests marked gpu: 0 passed, 0 failed, 11 skipped." in text
    for kernel in ("varlen", "sdpa"):
        assert f"| {kernel} | yes | " in text
    assert "| flash_attention_2 | not here: " in text
    sides = {
        line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith(("| launcher", "| bare"))
    }
    assert [*sides] == ["launcher", "bare DeepSpeed loop"]
    assert f": {COMPILE}: left out: not run, because a rehearsal on CPUs cannot show what it is worth on a GPU" in text
    assert all(float(cells[5].replace(",", "")) > 0 for cells in sides.values())
