from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
import torch

from launcher.data.loader import IGNORED, MicroBatch, StepBatch
from launcher.plan.architecture import train_flops
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.metrics import Meter, StepTimer, perplexity

PlanOf = Callable[..., LaunchPlan]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TIMES = {"time/step_s": 0.5}
# Documents of 5 and 3 tokens, of which 4 are trained, and a row that is half padding.
MICRO = MicroBatch(
    input_ids=torch.zeros(2, 8, dtype=torch.int64),
    position_ids=torch.zeros(2, 8, dtype=torch.int64),
    labels=torch.tensor([[IGNORED] * 4 + [1] * 4, [IGNORED] * 8]),
    row_ids=(0, 1),
    num_tokens=12,
    doc_lengths=(5, 3, 4),
)


def measured(plan: LaunchPlan, device: torch.device = CPU, peak_tflops: float | None = None) -> dict[str, float]:
    meter = Meter(plan, 40, device, attempt=1, restart=0, peak_tflops=peak_tflops)
    batch = StepBatch(micro=[MICRO, MICRO], num_labels=16, num_tokens=48, source_tokens=(48,), row_ids=(0, 1, 2, 3))
    return meter.step(1, batch, 1.0, 1.0, 1.0, TIMES)


def test_parts_of_a_step_add_up_and_start_afresh() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.begin()
    for _ in range(2):
        with timer.part("fwd_bwd"):
            time.sleep(0.02)
    times = timer.read()
    assert 0.04 <= times["time/fwd_bwd_s"] <= times["time/step_s"]
    timer.begin()
    with timer.part("data", on_host=True):
        time.sleep(0.02)
    times = timer.read()
    assert times.keys() == {"time/data_s", "time/step_s"}
    assert times["time/data_s"] >= 0.02


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isinf(perplexity(1e6))


def test_each_source_has_its_share_of_the_tokens(tmp_path: Path) -> None:
    settings = {
        "model": {"path": "./model"},
        "data": {"sources": [{"name": "chat", "path": "a.jsonl"}, {"name": "code", "path": "b.jsonl"}]},
        "train": {"max_steps": 40},
    }
    meter = Meter(hand_made.plan(tmp_path, settings), 40, CPU, attempt=1, restart=0, peak_tflops=None)
    micro = MicroBatch(*(torch.zeros(1, 8, dtype=torch.int64),) * 3, row_ids=(0,), num_tokens=8, doc_lengths=(8,))
    batch = StepBatch([micro], num_labels=4, num_tokens=8, source_tokens=(6, 2), row_ids=(0,))
    metrics = meter.step(1, batch, 1.0, 1.0, 1e-5, {"time/step_s": 1.0})
    assert (metrics["data/source/chat/frac"], metrics["data/source/code/frac"]) == (0.75, 0.25)
    assert metrics["data/label_frac"] == pytest.approx(0.5)


def test_the_share_of_the_datas_tokens_that_were_cut_is_told(plan_of: PlanOf) -> None:
    assert measured(plan_of())["data/truncated_frac"] == pytest.approx(500 / 900_500)


def test_mfu_counts_the_documents_of_a_row_and_no_padding(plan_of: PlanOf) -> None:
    flops = train_flops(plan_of().model)
    assert flops is not None
    metrics = measured(plan_of(), peak_tflops=0.25)
    tflops = flops.of([5, 3, 4, 5, 3, 4], 8) / 0.5 / 1e12
    assert metrics["perf/tflops_per_gpu"] == pytest.approx(tflops)
    assert metrics["perf/mfu"] == pytest.approx(tflops / 0.25)
    assert "perf/mfu" not in measured(plan_of())


def test_the_time_left_counts_what_comes_between_steps(plan_of: PlanOf) -> None:
    """Steps of half a second, one second from end to end; an evaluation takes its share of all that is left."""
    now = [100.0]
    meter = Meter(plan_of(), 40, CPU, attempt=1, restart=0, peak_tflops=None, clock=lambda: now[0])
    batch = StepBatch(micro=[MICRO], num_labels=8, num_tokens=24, source_tokens=(24,), row_ids=(0, 1))

    def after(step: int, seconds: float) -> float:
        now[0] += seconds
        return meter.step(step, batch, 1.0, 1.0, 1.0, TIMES)["trainer/eta_s"]

    assert after(1, 50.0) == pytest.approx(39 * 0.5)
    assert meter.overall_tokens_per_sec == 48
    assert after(2, 1.0) == pytest.approx(38 * 1.0)
    assert meter.overall_tokens_per_sec == 24
    assert after(3, 4.5) == pytest.approx(37 * (0.5 + (0.5 + 4.0) / 2))
    assert meter.step(4, batch, 1.0, 1.0, 1.0, TIMES)["perf/tokens_per_sec"] == 48


def test_what_is_not_known_is_not_measured(plan_of: PlanOf) -> None:
    metrics = measured(plan_of("model.config.model_type=deepseek_v3"), peak_tflops=0.25)
    assert metrics.keys() & {"perf/tflops_per_gpu", "perf/mfu"} == set()
    assert metrics["perf/tokens_per_sec"] == 96
