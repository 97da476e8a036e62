"""A GPU type is one row in one table: recognition, peak, memory and price follow from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plan_fixtures import config_of, plan_lines, plan_of

from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.plan.gpu_types import GPUS, PRICE_ASSUMPTION, GpuType, Price, recognize
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.train.monitoring.step_metrics import find_peak_tflops

__all__ = ["config_of", "plan_of"]
ROW = GpuType(95.5, bf16=1200, tf32=600, fp32=80, memory_tbs=4.0, usd_per_hour=4.25, names=r"\bx100\b")
DEVICE = DeviceFacts(kind="cuda", name="NVIDIA X100 96GB HBM3", count=8, memory_gib=95.2)


@pytest.fixture
def added_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "X100-96GB", ROW)


@pytest.mark.usefixtures("added_row")
def test_a_gpu_type_that_is_added_gives_a_plan_memory_and_price(plan_of: Callable[..., LaunchPlan]) -> None:
    planned = plan_of("cluster.gpu_type=X100-96GB", "cluster.ranks_per_node=8")
    assert planned.topology.device == "cuda"
    assert planned.memory.device_gib == 95.5
    assert planned.price == Price(4.25, PRICE_ASSUMPTION)
    assert any("$34.00 an hour = 8 GPUs x $4.25" in line for line in plan_lines(planned))


@pytest.mark.usefixtures("added_row")
def test_a_gpu_type_that_is_added_is_recognized_by_its_drivers_name(plan_of: Callable[..., LaunchPlan]) -> None:
    assert recognize(DEVICE.name) == "X100-96GB"
    assert plan_of(device=DEVICE).price == Price(4.25, PRICE_ASSUMPTION)


@pytest.mark.usefixtures("added_row")
def test_a_gpu_type_that_is_added_has_a_peak(config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE.name)
    assert find_peak_tflops(config_of("model.dtype=bf16"), torch.device("cuda", 0)) == 1200


def test_a_gpu_type_that_is_not_in_the_table_is_refused(plan_of: Callable[..., LaunchPlan]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.gpu_type=X100-96GB is not in the table of GPU types"):
        plan_of("cluster.gpu_type=X100-96GB", "cluster.ranks_per_node=8")
