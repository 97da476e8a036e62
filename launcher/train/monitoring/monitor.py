"""Monitoring alongside the steps: statistics of each rank, alerts, and on rank 0 goodput, cost and limits of the run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

from launcher import clock
from launcher.distributed import RankInfo, gather_json
from launcher.errors import RunError
from launcher.hardware import name_full_disk
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_tokens_per_sec
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking import goodput
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import append_event
from launcher.tracking.tracker import Composite, RateLimit
from launcher.train.monitoring import step_metrics
from launcher.train.monitoring.anomalies import AnomalyDetector
from launcher.train.monitoring.step_metrics import NUM_VALUES, DeviceMonitor, LayerTimer, RankStats, RankWork

# A synced write takes a millisecond and loads shared storage; metrics.jsonl has every logged step.
_UPDATE_INTERVAL_S = 5.0


class Monitor:
    """Collects statistics of the ranks and sends alerts. Creating it is collective, once the engine is built."""

    def __init__(
        self,
        plan: LaunchPlan,
        rank_info: RankInfo,
        device: torch.device,
        model: nn.Module,
        tracker: Composite,
    ) -> None:
        self._plan, self._rank_info, self._tracker = plan, rank_info, tracker
        self._run, self._send_alert = RunDir(Path(plan.run_dir)), partial(tracker.event, "alert")
        self._layer_timer, self._local_stats = LayerTimer(model, device), RankStats()
        self._device = device
        self._anomalies, self._hosts = AnomalyDetector(plan.topology.device, plan.run_dir), gather_json(os.uname().nodename)
        self._planned_tokens_per_sec = planned_tokens_per_sec(plan) if rank_info.is_main else None
        self._ranks: list[RankStats] = []
        self._works: list[RankWork] = []
        self._is_limited = rank_info.is_main and (plan.limits.max_seconds or plan.limits.max_gpu_seconds) is not None
        self._reader = ThreadPoolExecutor(1, "goodput")
        self._spent_before: Future[Breakdown] | None = None
        self._training_began = time.monotonic()
        self.eval_s = self.save_s = 0.0
        on_fault = partial(record_fault, self._run, rank_info, self._hosts[rank_info.rank], RateLimit())
        self._devices = DeviceMonitor(device, rank_info.local_rank == 0, on_fault).start()

    def start_training(self, step: int) -> None:
        """Start the training clock after `step` steps; read in a thread what the run has spent before."""
        self._training_began = time.monotonic()
        if self._rank_info.is_main:
            self._tracker.event("info", "the model is loaded", step, **{goodput.PHASE: goodput.LOADED})
            self._spent_before = self._reader.submit(spent_before, self._run, clock.now(), self._send_alert)

    def pack_local(self) -> list[float]:
        """Return NUM_VALUES numbers per rank: this rank's statistics at its position, 0 elsewhere, for a sum over ranks.

        Times are those of the last recorded step. Memory is read here, while a GPU still computes: the allocations of this step
        are already known.
        """
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats(self._device)
            active, reserved = stats["active_bytes.all.peak"], stats["reserved_bytes.all.peak"]
            self._local_stats = self._local_stats._replace(
                active=active, reserved=reserved, alloc_retries=stats["num_alloc_retries"]
            )
        values = [0.0] * (NUM_VALUES * self._rank_info.world_size)
        values[NUM_VALUES * self._rank_info.rank : NUM_VALUES * (self._rank_info.rank + 1)] = self._local_stats.values()
        return values

    def record_step(self, times: dict[str, float], load_s: float) -> None:
        """Record this rank's times of a step, which are sent with the next step. Call it when the device has finished.

        `load_s` is the time that the preparation of its batch took.
        """
        seconds = (times["time/step_s"], times["time/data_s"], load_s, self._layer_timer.read())
        self._local_stats = RankStats(*seconds, device=self._devices.latest)

    def update_ranks(self, values: Sequence[float]) -> None:
        """Store the statistics of all ranks: the sum over ranks of `pack_local`."""
        self._ranks = step_metrics.unpack_ranks(values)
        self._works = step_metrics.estimate_work(self._ranks)

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return the metrics over all ranks, and the goodput and cost of the run so far, in which `tokens` were trained."""
        spent, aggregated = self._spent(), step_metrics.aggregate_metrics(self._ranks, self._works)
        if "memory/peak_reserved_gib" in aggregated:
            # What a GPU's allocator should reserve.
            aggregated["memory/planned_gib"] = self._plan.peak.peak_gib - self._plan.peak.runtime_gib
        if self._planned_tokens_per_sec is not None:
            aggregated["perf/planned_tokens_per_sec"] = self._planned_tokens_per_sec
        return aggregated | ({} if spent is None else spent.metrics() | goodput.compute_cost(self._plan, spent, tokens))

    def alert(self, step: int, loss: float, tokens_per_sec: float) -> None:
        """Send an alert for each anomaly of a step."""
        for text in self._anomalies.faults(self._ranks, self._hosts):
            # The rank has already recorded it.
            self._tracker.event("alert", text, step, recorded=True)
        planned = self._anomalies.speed(tokens_per_sec, self._planned_tokens_per_sec)
        stragglers = self._anomalies.stragglers(self._works, self._hosts)
        for text in (*self._anomalies.step(loss, tokens_per_sec, step), *stragglers, *planned):
            self._tracker.event("alert", text, step)

    def reached_limit(self) -> str:
        """Return which limit of the run is reached; empty if none is, or on ranks other than 0."""
        spent = self._spent() if self._is_limited else None
        return "" if spent is None else goodput.spent_limit(self._plan, spent)

    def _spent(self) -> Breakdown | None:
        """Return the time of the run so far; None until it has been read, or on ranks other than 0."""
        if self._spent_before is None or not self._spent_before.done():
            return None
        seconds = time.monotonic() - self._training_began
        before = self._spent_before.result()
        return before.add_training(seconds, self.eval_s, self.save_s, self._rank_info.world_size, self._plan.price)

    def stop(self) -> None:
        """Stop the thread that reads the device."""
        self._devices.stop()


def spent_before(run: RunDir, now: float, send_alert: Callable[[str], None]) -> Breakdown:
    """Return what the run has spent until `now` (seconds since the epoch); if that cannot be read, nothing, and send an alert."""
    try:
        return goodput.read(run, now)
    except Exception as error:
        # The files may contain anything, and must not end training.
        send_alert(f"the earlier cost of the run cannot be read, so goodput and cost count from here: {error}")
        return Breakdown()


def record_fault(run: RunDir, rank_info: RankInfo, host: str, limit: RateLimit, fault: str) -> None:
    """Write a GPU fault to this rank's log and to events.jsonl at once, because the rank may end next."""
    if not limit.admit(fault):
        return
    text = f"{fault} (rank {rank_info.rank} on {host})"
    # A full disk must not end the monitoring of the device.
    with suppress(OSError):
        print(text, flush=True)
    with suppress(OSError):
        append_event(run, rank_info.attempt, "alert", text)


class StatusFile:
    """Writes state and step of a run during training, only on rank 0 (`is_main`). A failed write is an alert, not an error.

    Other writers (agent, driver, the cancel command) write before the ranks start, after they end, or for the next attempt.
    Their fields are kept, and a superseded attempt writes nothing.
    """

    def __init__(self, run: RunDir, attempt: int, send_alert: Callable[[str], None], is_main: bool) -> None:
        self._run, self._attempt, self._send_alert, self._is_main = run, attempt, send_alert, is_main
        # A single thread, so the last update is the one that stays.
        self._writer = ThreadPoolExecutor(1, "status")
        self._pending: Future[None] | None = None
        self._due = 0.0

    def write_state(self, state: str, step: int) -> None:
        """Write a state, and return when it is on disk."""
        if self._is_main:
            self._writer.submit(self._write, state, step).result()
            self._due = time.monotonic() + _UPDATE_INTERVAL_S

    def update_step(self, step: int) -> None:
        """Write the step every few seconds, in a thread because storage may be slow."""
        now = time.monotonic()
        if self._is_main and now >= self._due and (self._pending is None or self._pending.done()):
            self._due = now + _UPDATE_INTERVAL_S
            self._pending = self._writer.submit(self._write, "running", step)

    def _write(self, state: str, step: int) -> None:
        try:
            run_store.fence(self._run, self._attempt)
            # Write the attempt too: an earlier attempt may have overwritten it while it was writing.
            run_store.update_status(self._run, attempt=self._attempt, state=state, step=step, message="")
        except (OSError, RunError) as error:
            self._send_alert(name_full_disk(f"status.json could not be written: {error}", error))
