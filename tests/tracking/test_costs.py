"""The cost of training and of requests here and at hosted services."""

from __future__ import annotations

from pathlib import Path

import hand_made
import pytest
from plan_fixtures import plan_lines

from launcher.config.sections.run import CostsSection, HostedPrice
from launcher.tracking.costs import hosted_training, request_cost
from launcher.tracking.verdicts import SideUsage

PRICES = (HostedPrice(name="acme", training=3.0, input=0.3, output=1.2), HostedPrice(name="other", input=1.0))


def test_training_tokens_at_hosted_services() -> None:
    assert hosted_training(PRICES, 80_000) == {"acme": pytest.approx(0.24)}
    plan = hand_made.plan(Path("/srv/demo"), {**hand_made.SETTINGS, "costs": {"hosted": [{"name": "acme", "training": 3.0}]}})
    (line,) = [line for line in plan_lines(plan) if line.startswith("hosted")]
    # 40 steps of 2,000 tokens each.
    assert line.split(maxsplit=1)[1] == "acme $0.24 for 80,000 training tokens"


def test_a_million_requests() -> None:
    """200 requests of 150 prompt and 20 answer tokens took 90 seconds on a GPU that costs $4 an hour."""
    cost = request_cost(SideUsage(200, 30_000, 4_000, gpu_s=90), 4.0, PRICES)
    assert (cost.prompt_tokens, cost.answer_tokens) == (150, 20)
    # At this rate, a million requests take 125 hours.
    assert cost.usd_here == pytest.approx(500)
    assert cost.usd_hosted == {"acme": pytest.approx(150 * 0.3 + 20 * 1.2)}
    assert request_cost(SideUsage(200, 30_000, 4_000), 4.0, ()).usd_here is None


def test_a_service_has_one_row() -> None:
    with pytest.raises(ValueError, match="uses a name twice"):
        CostsSection(hosted=(PRICES[0], PRICES[0]))
