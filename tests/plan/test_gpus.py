from __future__ import annotations

import pytest

from launcher.plan.gpus import GPUS, lookup


@pytest.mark.parametrize(
    ("driver_name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIE-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_a_drivers_name_is_recognised(driver_name: str, entry: str) -> None:
    assert lookup(driver_name) is GPUS[entry]


def test_every_entry_is_found_by_its_own_name() -> None:
    assert all(lookup(name) is gpu for name, gpu in GPUS.items())
    assert lookup("Abacus 3000") is None
