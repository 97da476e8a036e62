from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
from plan_fixtures import DATA, config_of, golden, plan_of

from launcher.cli.main import main
from launcher.plan.gpu_types import Price
from launcher.plan.launch_plan import Topology
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import JsonlTracker

__all__ = ["config_of", "golden", "plan_of", "run"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run at step 10 of 40 in its second attempt, with this process recorded as its driver.

    The first attempt used two GPUs for 51 minutes, at two dollars per GPU hour. Steps 5 and 10 have checkpoints.
    """
    topology = Topology(nodes=1, ranks_per_node=2, world_size=2, device="cuda", backend="nccl")
    price = Price(usd_per_gpu_hour=2.0)
    now = time.time()
    attempts = (Attempt(None, submitted_at=now - 51 * 60, begun_at=now - 51 * 60), Attempt(None, begun_at=now))
    plan = hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS, topology=topology, price=price, data=DATA)
    found = hand_made.run(plan, *attempts)
    for attempt, steps in ((1, range(1, 8)), (2, range(6, 11))):
        log = JsonlTracker(found, attempt)
        log.event("info", "joined", 0, phase="joined", ranks=2)
        log.event("info", "loaded", steps[0] - 1, phase="loaded")
        for step in steps:
            hours = (step if attempt == 1 else step + 7) / 10
            costs = {"cost/gpu_hours": hours, "cost/usd": 2 * hours, "cost/usd_per_million_tokens": 1.5}
            pace = {"perf/tokens_per_sec": 1234.5, "perf/mfu": 0.41, "time/step_s": 2.0, "trainer/eta_s": 3600.0}
            pace |= {"perf/tokens_per_sec_per_gpu": 1234.5 / 2}
            curves = {"trainer/tokens": 1000.0 * step, "train/lr": 1e-5 * step, "train/grad_norm": 2.0 / step}
            log.log(step, {"train/loss": 4.0 - step / 10, "memory/host_rss_gib": 1.5, **curves, **pace, **costs})
        log.event("alert", f"something in attempt {attempt}", step=step)
    hand_made.checkpoint(found, 5)
    hand_made.checkpoint(found, 10, 2.75, attempt=2)
    # A status that is newer than the metrics.
    run_store.update_status(found, state="completed", step=10)
    return found


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the launcher with these arguments; return exit code, standard output and standard error."""
    return lambda *arguments: (main(arguments), *capsys.readouterr())
