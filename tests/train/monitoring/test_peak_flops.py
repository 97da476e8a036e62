from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from launcher.config.schema import RunConfig
from launcher.plan.gpus import GPUS
from launcher.train.monitoring.peak_flops import find_peak_tflops, measure_tflops

ConfigOf = Callable[..., RunConfig]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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
    # The GPU of the machine counts, not that of the plan.
    assert find_peak_tflops(config_of(f"model.dtype={dtype}", "cluster.gpu_type=A100-40GB"), CUDA) == expected


def test_an_unknown_gpu_has_no_peak(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 3000")
    assert find_peak_tflops(config_of(), CUDA) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_measuring_a_cpu_is_quick_and_leaves_the_random_state_alone(config_of: ConfigOf, dtype: str) -> None:
    state, config, seconds = torch.get_rng_state(), config_of(f"model.dtype={dtype}"), []
    for _ in range(3):
        began = time.perf_counter()
        measured = find_peak_tflops(config, CPU)
        seconds.append(time.perf_counter() - began)
        assert measured is not None
        # A CPU without vector instructions for bf16 reaches a few GFLOP/s, and less beside other processes.
        assert 1e-6 < measured < 100
    # Other processes may slow the machine down.
    assert min(seconds) < 0.3
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fastest_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(t for pair in [(0.0, 0.05), (0.05, 0.06), (0.06, 0.1), (0.1, 0.2)] for t in pair)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure_tflops(torch.float32) == pytest.approx(2 * 256**3 / 0.01 / 1e12)
