from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from launcher.config.schema import RunConfig
from launcher.plan.gpu_types import GPUS
from launcher.train.monitoring.peak_flops import find_peak_tflops

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
    # The machine's GPU counts, not the plan's.
    assert find_peak_tflops(config_of(f"model.dtype={dtype}", "cluster.gpu_type=A100-40GB"), CUDA) == expected


def test_an_unknown_gpu_has_no_peak(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 3000")
    assert find_peak_tflops(config_of(), CUDA) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_cpu_has_no_peak(config_of: ConfigOf, dtype: str) -> None:
    """A CPU's peak would have to be measured, and other processes would distort it, giving an MFU above 1."""
    assert find_peak_tflops(config_of(f"model.dtype={dtype}"), CPU) is None
