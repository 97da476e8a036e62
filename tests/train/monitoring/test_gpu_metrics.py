"""GPU metrics from NVML to W&B's file, with fakes of NVML and of CUDA's memory statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import hand_made
import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_nvml import Nvml
from plan_fixtures import H100
from torch import nn
from wandb_files import history

from launcher.data.loader import TrainBatches
from launcher.data.split import Split
from launcher.distributed import RankInfo
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_tokens_per_sec
from launcher.run_records import Attempt
from launcher.tracking.tracker import start_trackers
from launcher.train.monitoring.monitor import Monitor
from launcher.train.monitoring.step_metrics import Meter

GPU = torch.device("cuda", 0)
GIB = 2**30
TIMES = {"time/step_s": 0.5, "time/data_s": 0.1}
MEMORY = {"active_bytes.all.peak": 30 * GIB, "reserved_bytes.all.peak": 40 * GIB, "num_alloc_retries": 2}
EXPECTED = {
    "gpu/util_mean": 0.9,
    "gpu/util_min": 0.9,
    "gpu/temp_max": 71,
    "gpu/power_mean": 650,
    "gpu/memory_max_frac": 0.75,
    "gpu/xids": 1,
    "memory/peak_active_gib": 30,
    "memory/peak_reserved_gib": 40,
    "memory/alloc_retries": 2,
}
COST = {"cost/gpu_hours", "cost/usd", "cost/usd_per_million_tokens"}


def rows_of_eight(num_rows: int) -> Split:
    """Return rows of one document each, with all tokens trained."""
    ends = np.arange(0, 8 * num_rows + 1, 8)
    tokens, trained = np.arange(8 * num_rows, dtype=np.uint32), np.ones(8 * num_rows, dtype=np.uint8)
    of_rows = np.full(num_rows, 7)
    return Split(tokens, trained, ends, ends, of_rows, np.zeros(num_rows, dtype=np.uint16), np.full((num_rows, 1), 8))


def test_what_gpus_measure_and_cost_is_in_wandb(
    plan_of: Callable[..., LaunchPlan], nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: MEMORY)
    nvml.faults = [79]
    plan = plan_of("tracking=wandb", "tracking.mode=offline", "cluster.price_per_gpu_hour=3", device=H100)
    plan = plan.model_copy(update={"run_dir": str(tmp_path / "run")})
    run = hand_made.run(plan, Attempt(None))
    tracker = start_trackers(plan, run.root, 1, on_stop=lambda: None)
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1, timeout=timedelta(seconds=30))
    monitor = Monitor(plan, RankInfo(0, 0, 1, 1), GPU, nn.Module(), None, tracker, lambda phase, step: None)
    meter = Meter(plan, 40, attempt=1, restart=0, peak_tflops=989.0)
    batches = TrainBatches(rows_of_eight(plan.batch.global_batch_size), plan.batch, 0, 0, plan.topology.world_size, pad_id=0)
    monitor.start_training(0)
    metrics_of_step: dict[str, float] = {}
    end, step = time.monotonic() + 60, 0
    # Background threads read the device and the run's costs.
    while not (metrics_of_step.keys() >= {*EXPECTED, *COST} and metrics_of_step["gpu/xids"]):
        assert time.monotonic() < end, metrics_of_step
        time.sleep(0.05)
        monitor.record_step(TIMES, load_s=0.1)
        monitor.update_ranks(monitor.pack_local())
        step += 1
        metrics = meter.step(step, batches.step(0), 2.0, 1.0, 1e-5, TIMES)
        metrics_of_step = metrics | monitor.metrics(meter.tokens)
        tracker.log(step, metrics_of_step)
    monitor.stop()
    dist.destroy_process_group()
    tracker.finish("completed")
    row = history(run.root)[-1]
    assert metrics_of_step.keys() <= row.keys()
    assert {name: row[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert plan.peak is not None
    assert row["memory/planned_gib"] == pytest.approx(plan.peak.peak_gib - plan.peak.runtime_gib)
    assert row["perf/planned_tokens_per_sec"] == pytest.approx(planned_tokens_per_sec(plan))
    assert row["cost/usd"] == pytest.approx(3 * row["cost/gpu_hours"])
    assert row["cost/usd_per_million_tokens"] == pytest.approx(row["cost/usd"] / row["trainer/tokens"] * 1e6)
    assert 0 < row["perf/mfu"] < 1
