"""The metrics of a step cover all ranks; the speed of their collectives."""

from __future__ import annotations

import math
import time
from pathlib import Path

import hand_made
import numpy as np
import pytest
import torch
from forked_ranks import RankServer
from plan_fixtures import ConfigOf, PlanOf

from launcher.data.loader import IGNORED, StepBatch, TrainBatches
from launcher.data.split import Split
from launcher.plan.flops import train_flops
from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import LaunchPlan
from launcher.train import setup
from launcher.train.monitoring.step_metrics import Meter, StepTimer, find_peak_tflops, perplexity

TIMES = {"time/step_s": 0.5}
# Document lengths by row. A micro-batch of two rows has padding if the row lengths differ.
ROWS = [[8], [1, 2, 1], [5, 3, 4], [2], [6, 6], [3, 1], [7], [2, 2]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def split_of(rows: list[list[int]]) -> Split:
    """Return a split in which all tokens but the first of each document are trained."""
    lengths, docs = [sum(row) for row in rows], [n for row in rows for n in row]
    trained = np.concatenate([np.arange(n) > 0 for n in docs]).astype(np.uint8)
    return Split(
        tokens=np.arange(sum(lengths), dtype=np.uint32),
        trained=trained,
        rows=np.cumsum([0, *lengths]),
        docs=np.cumsum([0, *docs]),
        columns={"source": np.zeros(len(docs), np.uint16), "num_trained": np.array(docs) - 1},
    )


def batch_of(num_tokens: int = 24, sources: tuple[int, ...] = (0, 0, 0), doc_lengths: tuple[int, ...] = (5, 3, 4)) -> StepBatch:
    """Return a batch that contains only counts; 8 of its tokens are trained."""
    documents = {"source": np.array(sources), "num_trained": np.array([4, 2, 2])}
    return StepBatch([], num_tokens, 32, documents, doc_lengths, row_ids=(0, 1))


def measured(plan: LaunchPlan, batch: StepBatch, peak_tflops: float | None = None) -> dict[str, float]:
    meter = Meter(plan, 40, attempt=1, restart=0, peak_tflops=peak_tflops)
    return meter.step(1, batch, 1.0, 1.0, 1.0, TIMES)


def test_timed_parts_add_up_within_a_step_and_reset_with_the_next() -> None:
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


def test_source_fractions_are_shares_of_the_tokens(tmp_path: Path) -> None:
    settings = {
        "model": {"path": "./model"},
        "data": {"sources": [{"name": "chat", "path": "a.jsonl"}, {"name": "code", "path": "b.jsonl"}]},
        "train": {"max_steps": 40},
    }
    meter = Meter(hand_made.plan(tmp_path, settings), 40, attempt=1, restart=0, peak_tflops=None)
    batch = batch_of(num_tokens=8, sources=(0, 1, 0), doc_lengths=(5, 2, 1))
    metrics = meter.step(1, batch, 1.0, 1.0, 1e-5, {"time/step_s": 1.0})
    assert (metrics["data/source/chat/frac"], metrics["data/source/code/frac"]) == (0.75, 0.25)
    assert metrics["data/label_frac"] == 1.0


def test_the_fraction_of_truncated_tokens_is_logged(plan_of: PlanOf) -> None:
    assert measured(plan_of(), batch_of())["data/truncated_frac"] == pytest.approx(500 / 900_500)


def test_step_metrics_cover_all_ranks(plan_of: PlanOf) -> None:
    """On two ranks with unequal rows, each rank's MFU counts the documents of both, without padding."""
    plan, split = plan_of(), split_of(ROWS)
    shape = plan.batch.model_copy(update={"global_batch_size": 8, "micro_batch_size": 2, "accumulation": 2})
    batches = [TrainBatches(split, shape, 0, rank, 2, pad_id=0).step(0) for rank in (0, 1)]
    flops = train_flops(plan.model)
    assert flops is not None
    own, slots = [], 0
    for batch in batches:
        labels = sum(int((micro.labels != IGNORED).sum()) for micro in batch.micro)
        own.append(flops.of([n for micro in batch.micro for row in micro.row_ids for n in ROWS[row]], labels))
        slots += sum(micro.input_ids.numel() for micro in batch.micro)
    assert own[0] != own[1]
    for batch in batches:
        metrics = measured(plan, batch, peak_tflops=0.25)
        assert metrics["perf/tflops_per_gpu"] == pytest.approx(sum(own) / 2 / 0.5 / 1e12)
        assert metrics["perf/mfu"] == pytest.approx(sum(own) / 2 / 0.5 / 0.25e12)
        assert metrics["perf/tokens_per_sec"] == 53 / 0.5, "padding is no token"
        assert metrics["perf/tokens_per_sec_per_gpu"] == 53 / 0.5 / 2
        assert metrics["perf/padding_frac"] == pytest.approx(1 - 53 / slots)
        assert slots > 53
    assert "perf/mfu" not in measured(plan, batches[0])


def test_the_eta_includes_the_time_between_steps(plan_of: PlanOf) -> None:
    """Steps take half a second and start one second apart; the ETA includes evaluations proportionally."""
    now = [100.0]
    meter = Meter(plan_of(), 40, attempt=1, restart=0, peak_tflops=None, clock=lambda: now[0])
    batch = batch_of()

    def after(step: int, seconds: float) -> float:
        now[0] += seconds
        return meter.step(step, batch, 1.0, 1.0, 1.0, TIMES)["trainer/eta_s"]

    assert after(1, 50.0) == pytest.approx(39 * 0.5)
    assert meter.overall_tokens_per_sec == 48
    assert after(2, 1.0) == pytest.approx(38 * 1.0)
    assert meter.overall_tokens_per_sec == 24
    assert after(3, 4.5) == pytest.approx(37 * (0.5 + (0.5 + 4.0) / 2))
    assert meter.step(4, batch, 1.0, 1.0, 1.0, TIMES)["perf/tokens_per_sec"] == 48


def test_metrics_that_cannot_be_computed_are_omitted(plan_of: PlanOf) -> None:
    metrics = measured(plan_of("model.config.model_type=deepseek_v3"), batch_of(), peak_tflops=0.25)
    assert metrics.keys() & {"perf/tflops_per_gpu", "perf/mfu"} == set()
    assert metrics["perf/tokens_per_sec"] == 48


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        ("bf16", "high", GPUS["H100-80GB"].bf16),
        ("fp32", "highest", GPUS["H100-80GB"].fp32),
        ("fp32", "high", GPUS["H100-80GB"].tf32),
    ],
)
def test_the_peak_of_a_gpu_is_its_vendors_figure(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, dtype: str, precision: str, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    # The machine's GPU counts, not the plan's.
    assert find_peak_tflops(config_of(f"model.dtype={dtype}", "cluster.gpu_type=A100-40GB"), CUDA) == expected


def test_an_unknown_gpu_has_no_peak(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 3000")
    assert find_peak_tflops(config_of(), CUDA) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_cpu_has_no_peak(config_of: ConfigOf, dtype: str) -> None:
    """A CPU's peak would have to be measured, and other processes would distort it, giving an MFU above 1."""
    assert find_peak_tflops(config_of(f"model.dtype={dtype}"), CPU) is None


def test_two_ranks_measure_the_same_bandwidth(rank_server: RankServer, tmp_path: Path) -> None:
    (measured, cost_s, computed), other = rank_server.values("train_ranks:measure_link", [[], []], tmp_path)
    assert [measured, computed] == [other[0], other[2]]
    # Sanity bounds: less than 1 TB/s, and less than about ten seconds for 4 MB.
    assert 1e-4 < measured < 1e3
    assert cost_s < 5
    # The warm-up is ignored. The slower median (4 ms, not 2 ms) counts. With two ranks, busbw equals algbw.
    assert computed == pytest.approx(2**20 / 4e-3 / 1e9, rel=1e-6)


@pytest.mark.parametrize(("nodes", "gb_per_s", "warns"), [(2, 4.0, True), (2, 45.0, False), (1, 1.1, False)])
def test_a_network_as_slow_as_ethernet_is_a_warning(plan_of: PlanOf, nodes: int, gb_per_s: float, warns: bool) -> None:
    sizes = ("train.global_batch_size=64", f"cluster.nodes={nodes}", "cluster.ranks_per_node=8")
    plan = plan_of("model=llama3_1_8b", "cluster.gpu_type=H100-80GB", *sizes)
    assert ("NCCL_DEBUG=INFO" in setup.bandwidth_warning(plan, gb_per_s)) == warns
