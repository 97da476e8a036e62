"""The GPU price used for an evaluation, whose settings may select another cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hand_made
import pytest

from launcher.cli.evaluations import find_price
from launcher.config.schema import RunConfig
from launcher.plan.gpu_types import Price, typical_price


@pytest.mark.parametrize(
    ("trained", "chosen", "price"),
    [
        ({"kind": "local", "price_per_gpu_hour": 2.0}, {"kind": "local", "price_per_gpu_hour": 3.0}, Price(3.0)),
        ({"kind": "local", "price_per_gpu_hour": 2.0}, {"kind": "slurm"}, None),
        ({"kind": "local"}, {"kind": "slurm", "gpu_type": "H100"}, typical_price("H100")),
        ({"kind": "local"}, {"kind": "slurm"}, None),
        ({"kind": "local"}, {"kind": "local"}, Price(1.5)),
    ],
)
def test_the_price_is_that_of_the_machines_that_answer(trained: dict[str, Any], chosen: dict[str, Any], price: Price) -> None:
    plan = hand_made.plan(Path("/srv/runs/demo"), {**hand_made.SETTINGS, "cluster": trained}, price=Price(1.5))
    config = RunConfig.model_validate({**hand_made.SETTINGS, "cluster": chosen})
    assert find_price(plan, config) == price
