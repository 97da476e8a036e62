"""Linear layers in FP8 in a plan: when they are refused, and how they change memory and speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from plan_fixtures import H100

from launcher.cli.views.memory_view import peak_line, why_lines
from launcher.errors import ConfigError, Problem
from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.plan_checks import warnings
from launcher.plan.planner import planned_tokens_per_sec
from launcher.plan.sizing.activations import Kernels
from launcher.plan.sizing.fp8 import fp8_bytes, fp8_share

PlanOf = Callable[..., LaunchPlan]
FP8, COMPILED = "model.fp8=true", "model.compile=true"
LLAMA_8B = ("model=llama3_1_8b", "train.global_batch_size=64", "data.max_length=4096")
# Fixed so that two plans differ only in their linear layers.
FIXED = ("train.micro_batch_size=2", "model.activation_checkpointing=all", "train.loss_chunk_tokens=1024")


def problem_of(plan_of: PlanOf, *tokens: str, **how: Any) -> Problem:
    with pytest.raises(ConfigError) as error:
        plan_of(*tokens, FP8, **how)
    (problem,) = error.value.problems
    assert problem.where == "model.fp8"
    assert problem.value
    assert "set model.fp8=false" in problem.remedy or "or model.fp8=false" in problem.remedy
    return problem


def gpus(name: str, memory_gib: float = 79.1) -> DeviceFacts:
    return DeviceFacts(kind="cuda", name=name, count=8, memory_gib=memory_gib, host_memory_gib=2000.0)


def test_fp8_is_refused_on_cpus(plan_of: PlanOf) -> None:
    assert problem_of(plan_of).message == "model.fp8=true needs GPUs, and this run computes on CPUs"


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "AMD Instinct MI300X"])
def test_fp8_is_refused_off_hopper_and_blackwell(plan_of: PlanOf, name: str) -> None:
    problem = problem_of(plan_of, "model=qwen3_0_6b", device=gpus(name))
    assert problem.message == "model.fp8=true needs a Hopper or Blackwell GPU"
    assert problem.value == name
    _, _, able = problem.remedy.partition("or use one of ")
    assert set(able.split(", ")) == {name for name in GPUS if name.startswith(("H", "GH", "B", "GB", "RTX-5"))}


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA B200", "NVIDIA GeForce RTX 5090", "a GPU that nobody knows"])
def test_fp8_is_left_to_the_ranks_on_all_other_gpus(plan_of: PlanOf, name: str) -> None:
    assert plan_of("model=qwen3_0_6b", FP8, device=gpus(name)).config.model.fp8


def test_fp8_is_refused_with_another_dtype_and_for_sizes_that_it_does_not_take(plan_of: PlanOf) -> None:
    problem = problem_of(plan_of, "model=qwen3_0_6b", "model.dtype=fp16", device=H100)
    assert problem.message == "model.fp8=true computes everything else in bf16, and model.dtype is fp16"
    assert problem.remedy == "set model.dtype=bf16, or model.fp8=false"
    # The hidden size of this model is 20.
    problem = problem_of(plan_of, "model=tiny", "model.dtype=bf16", device=H100)
    assert problem.message.startswith("FP8 needs matrices whose sizes are multiples of 16")
    assert problem.value == "hidden_size 20"


def test_a_plan_counts_fp8_in_memory_and_speed_and_says_so(plan_of: PlanOf) -> None:
    in_bf16, eager, compiled, both = (
        plan_of(*LLAMA_8B, *FIXED, *more, device=H100) for more in ((), (FP8,), (COMPILED,), (FP8, COMPILED))
    )
    speeds = [planned_tokens_per_sec(planned) or 0.0 for planned in (in_bf16, eager, compiled, both)]
    # torchtitan measured 1.11 for this model.
    assert speeds[3] / speeds[2] == pytest.approx(1.11, abs=0.05)
    assert speeds[1] < 0.8 * speeds[0]
    peaks = [planned.peak for planned in (in_bf16, eager, compiled, both)]
    temporary = [next(s.temporary_gib for s in peak.stages if s.name == "backward") for peak in peaks if peak is not None]
    tokens, rows, columns = 8192, 14336, 4096
    # FP8 copies: three of the gradient, two of the input, one of the weight. Without compilation, casts take eight bytes more.
    casts = {3: 3 * tokens * rows + 2 * tokens * columns + rows * columns, 1: 10 * tokens * rows + rows * columns}
    for index, num_bytes in casts.items():
        assert temporary[index] - temporary[index - 1] == pytest.approx(num_bytes / 2**30, abs=1e-3)
    assert (peak_line(both) or "").endswith(", linear layers in FP8")
    assert "FP8" not in (peak_line(compiled) or "")
    (line,) = (line for line in why_lines(both) if line.startswith("model.fp8"))
    assert f"FP8 {both.peak.peak_gib:.1f} GiB and " in line if both.peak else False
    assert f"bf16 {compiled.peak.peak_gib:.1f} GiB and " in line if compiled.peak else False
    assert not any(line.startswith("model.fp8") for line in why_lines(compiled))
    (warning,) = warnings(eager)
    assert warning.startswith("model.fp8=true without model.compile=true is expected to be slower than bf16")
    assert [*warnings(both), *warnings(in_bf16)] == []


def test_experts_and_sizes_that_fp8_does_not_take_are_not_counted(plan_of: PlanOf) -> None:
    dense = plan_of("model=llama3_1_8b", "train.global_batch_size=64", device=H100).model
    # 32 layers: 2 x 4096 x (4096 + 1024) in attention, 3 x 4096 x 14336 in the MLP.
    num_weights = 32 * (2 * 4096 * 5120 + 3 * 4096 * 14336)
    assert fp8_share(dense, num_weights) == 1.0
    odd = dense.model_copy(update={"intermediate_size": 14340})
    assert fp8_share(odd, num_weights) == pytest.approx(32 * 2 * 4096 * 5120 / num_weights)
    sparse = plan_of("model=qwen3_30b_a3b", "train.global_batch_size=64", "cluster.nodes=8", device=H100).model
    attention = 48 * 2 * 2048 * (32 + 4) * 128
    assert fp8_share(sparse, 10 * attention) == pytest.approx(0.1)
    kernels = Kernels(width=2, attention="varlen", row_tokens=4096)
    assert fp8_bytes(dense, 4096, kernels) == 0
    assert fp8_bytes(dense, 4096, replace(kernels, fp8=True)) > fp8_bytes(dense, 4096, replace(kernels, fp8=True, compiled=True))
