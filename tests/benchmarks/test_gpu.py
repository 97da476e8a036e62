"""benchmarks/gpu.py on the CPU with tiny sizes, its report on made-up figures, and the wheels that a machine lacks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_kernel
import gpu_report
import pytest
from forked import ForkServer
from gpu_report import COMPILE, FP8, Measured, Side
from gpu_wheels import first_requirements, folder_of, is_satisfied, lacking, read_freeze
from pace import slowness
from packaging.requirements import Requirement
from plan_fixtures import H100, config_of, plan_of

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
def plan(plan_of: Callable[..., LaunchPlan]) -> LaunchPlan:
    return plan_of(*CASE, device=replace_count(1))


def replace_count(count: int):
    return H100.model_copy(update={"count": count})


def measured(plan: LaunchPlan, tokens_per_sec: float, reserved_gib: float) -> Measured:
    """Return figures of a launcher run with 1 GiB for CUDA, and of a bare loop at half its speed."""
    assert plan.peak is not None
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
    assert plan.peak is not None
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


def test_the_row_of_a_measured_gpu_gives_its_speed_in_fp8(plan_of: Callable[..., LaunchPlan]) -> None:
    """FP8 is compared with bf16 with the same kernels, so an underestimated share of the peak is no FP8 gain."""
    real = replace(GPUS["H100-80GB"], gemm_share=0.7, fp8_speed=1.3, fp8_eager_speed=0.6)
    found = Measured("NVIDIA H100 80GB HBM3")
    for name in ("launcher", COMPILE, f"{COMPILE} {FP8}", FP8):
        planned = plan_of(*CASE, *(name.split() if name != "launcher" else ()), device=replace_count(1))
        figures = {"tokens_per_sec": planned_tokens_per_sec(planned, real), "step_s": 1.0}
        found.cases.setdefault("qwen3_1_7b", []).append(Side(name, "varlen", "none", planned, figures))
    assert gpu_report.fitted_row(found) == '"H100-80GB": gemm_share=0.7, fp8_speed=1.3, fp8_eager_speed=0.6'
    text = "\n".join(gpu_report.lines(found))
    assert "products in FP8, compiled: 1.30 times as fast as in bf16, planned 1.10" in text
    assert "products in FP8, not compiled: 0.60 times as fast as in bf16, planned 0.50" in text
    del found.cases["qwen3_1_7b"][1:3]
    assert gpu_report.fitted_row(found) == '"H100-80GB": gemm_share=0.7, fp8_eager_speed=0.6'


def test_fp8_is_left_out_where_it_cannot_be_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = gpu.Proof(tmp_path, 60.0, is_full=False, on_cpu=True, results_file=None)
    monkeypatch.setattr(gpu, "_FP8_FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    for capability, reason in (
        ((8, 9), "FP8 needs a GPU of compute capability 9.0 or more, and this one has 8.9"),
        ((9, 0), "torchao is not installed"),
    ):
        proof.capability = capability
        assert proof.missing_fp8() == reason
    (module := tmp_path / "torchao/float8/float8_linear.py").parent.mkdir(parents=True)
    module.write_text("from torch_of_another_version import ScalingType")
    assert proof.missing_fp8() == ("torchao cannot be imported: ModuleNotFoundError: No module named 'torch_of_another_version'")
    module.write_text("")
    assert proof.missing_fp8() == ""


def test_a_run_on_cpus_has_neither_planned_speed_nor_a_row(plan_of: Callable[..., LaunchPlan]) -> None:
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


def test_the_wheels_are_those_that_the_image_lacks(tmp_path: Path) -> None:
    image = read_freeze(FREEZE)
    assert image == {"torch": "2.9.0a0+git1234", "numpy": "2.2.0", "psutil": "5.9.8", "triton": "file:///wheels/triton-3.5.0.whl"}
    needed = {requirement.name for requirement in lacking(first_requirements({}), image, {"ray", "wandb", "wandb-workspaces"})}
    assert {"deepspeed", "psutil", "pytest", "torchao"} <= needed
    assert needed.isdisjoint({"torch", "numpy", "ray", "wandb", "wandb-workspaces", "trl"})
    assert not is_satisfied(Requirement("psutil>=7"), image["psutil"])
    compared = {requirement.name for requirement in first_requirements({"COMPARE": "1", "PACKAGES": "flash-attn"})}
    assert {"trl", "datasets", "liger-kernel", "flash-attn"} <= compared
    # torchao gets its own folder, because transformers would import it in every process.
    folders = [folder_of(Requirement(name), tmp_path) for name in ("torchao>=0.18", "psutil")]
    assert folders == [tmp_path / "fp8", tmp_path]
    assert folders[0].is_dir()
    with pytest.raises(SystemExit, match=r"the image has torch 2\.8\.0, and torch>=2\.9 is needed"):
        list(lacking(first_requirements({}), {**image, "torch": "2.8.0"}, set()))


@pytest.mark.rest
def test_everything_runs_on_a_cpu_with_tiny_sizes(
    launcher_env: Mapping[str, str], torch_server: Callable[[], ForkServer], tmp_path: Path
) -> None:
    """The command and most of what it starts are forked, see forked_stack.py."""
    results = tmp_path / "RESULTS.md"
    words = (str(REPO / "benchmarks/gpu.py"), "--cpu-rehearsal", "--results", str(results))
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with torch_server().popen("forked_stack", *words, **streams, cwd=REPO, env=launcher_env) as process:
        try:
            output, _ = process.communicate(timeout=min(LATEST_S, DEADLINE_S * slowness()))
        finally:
            process.kill()
    assert process.returncode == 0, output[-6000:]
    text = results.read_text()
    assert "Tests marked gpu: 0 passed, 0 failed, 13 skipped." in text
    for kernel in ("varlen", "sdpa"):
        assert f"| {kernel} | yes | " in text
    assert "| flash_attention_2 | not here: " in text
    sides = {
        line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith(("| launcher", "| bare"))
    }
    assert [*sides] == ["launcher", "bare DeepSpeed loop"]
    for settings in (COMPILE, FP8, f"{COMPILE} {FP8}", "deepspeed.whole_layers=true"):
        assert f": {settings}: left out: not run, because a rehearsal on CPUs cannot show what it is worth on a GPU" in text
    assert all(float(cells[5].replace(",", "")) > 0 for cells in sides.values())
