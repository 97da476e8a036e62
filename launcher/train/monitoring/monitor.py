"""What is watched beside the steps: this rank's device and pace, told to all; on rank 0 the state of the whole run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from launcher.distributed import RankInfo
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking import goodput
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import append_event
from launcher.tracking.tracker import Composite, RateLimit
from launcher.train.monitoring import rank_stats
from launcher.train.monitoring.anomalies import Health, Pulse
from launcher.train.monitoring.gpu_stats import Devices
from launcher.train.monitoring.rank_stats import SLOTS, Told, Work
from launcher.train.monitoring.rank_timing import OptimizerProbe, Probe


class Monitor:
    """Made when the engine is built; `loaded` when training begins. Collective where it is made.

    `optimizer` is the one inside DeepSpeed's, where it steps on the node's CPUs.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        place: RankInfo,
        device: torch.device,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        tracker: Composite,
        beat: Callable[[str, int], None],
    ) -> None:
        self._plan, self._place, self._tracker, self._beat = plan, place, tracker, beat
        self._run = RunDir(Path(plan.run_dir))
        self._probe, self._own = Probe(model, device), Told()
        self._optimizer_probe = None if optimizer is None else OptimizerProbe(optimizer)
        self._device = device
        self._health, self._hosts = Health(plan.topology.device), _hosts(place)
        self._ranks: list[Told] = []
        self._works: list[Work] = []
        self._is_limited = place.is_main and (plan.limits.max_seconds or plan.limits.max_gpu_seconds) is not None
        self._reader = ThreadPoolExecutor(1, "goodput")
        self._before: Future[Breakdown] | None = None
        self._loaded = time.monotonic()
        self.eval_s = self.save_s = 0.0
        on_fault = partial(record_fault, self._run, place, self._hosts[place.rank], RateLimit())
        self._devices = Devices(device, place.local_rank == 0, on_fault).start()
        self._pulse = Pulse(partial(tracker.event, "alert")).start() if place.is_main else None

    def beat(self, phase: str, step: int) -> None:
        """Tell that there is progress: to the node's agent, and to the watch over steps that do not come."""
        self._beat(phase, step)
        if self._pulse is not None:
            self._pulse.beat(phase, step)

    def loaded(self, step: int) -> None:
        """Training begins, after `step` steps; what the run has done before is read while it does."""
        self._loaded = time.monotonic()
        if self._place.is_main:
            self._tracker.event("info", "the model is loaded", step, **{goodput.PHASE: goodput.LOADED})
            self._before = self._reader.submit(spent_before, self._run, time.time(), partial(self._tracker.event, "alert"))

    def own(self) -> list[float]:
        """SLOTS numbers for each rank, this rank's own of its last step in their place: their sum over the ranks is all."""
        values = [0.0] * (SLOTS * self._place.world_size)
        values[SLOTS * self._place.rank : SLOTS * (self._place.rank + 1)] = self._own.values()
        return values

    def measured(self, times: dict[str, float]) -> None:
        """Keep what this rank is to tell with the next step; call it where the device has finished the step."""
        optim_s = math.nan if self._optimizer_probe is None else self._optimizer_probe.read()
        spent = (times["time/step_s"], times["time/data_s"], self._probe.read(), optim_s)
        self._own = Told(*spent, *_memory(self._device), self._devices.latest)

    def heard(self, values: Sequence[float]) -> None:
        """Take what all ranks have told of the step before."""
        self._ranks = rank_stats.told(values)
        self._works = rank_stats.work(self._ranks)

    def metrics(self, tokens: int) -> dict[str, float]:
        """Of all ranks, and of the run so far, in which `tokens` were trained."""
        spent, told = self._spent(), rank_stats.metrics(self._ranks, self._works)
        return told | ({} if spent is None else spent.metrics() | goodput.cost(self._plan, spent, tokens))

    def alert(self, step: int, loss: float, tokens_per_sec: float) -> None:
        """Tell what is not as it should be after a step."""
        for words in self._health.faults(self._ranks, self._hosts):
            # The rank has recorded it itself.
            self._tracker.event("alert", words, step, recorded=True)
        for words in (*self._health.step(loss, tokens_per_sec), *self._health.stragglers(self._works, self._hosts)):
            self._tracker.event("alert", words, step)

    def limit(self) -> str:
        """Which limit of the run is reached now, in words; empty where it may go on, and on other ranks than the first."""
        spent = self._spent() if self._is_limited else None
        return "" if spent is None else goodput.spent_limit(self._plan, spent)

    def _spent(self) -> Breakdown | None:
        """The time of the run up to now; None for the moment in which it is not known yet, and on other ranks than the first."""
        if self._before is None or not self._before.done():
            return None
        seconds = time.monotonic() - self._loaded
        return self._before.result().later(seconds, self.eval_s, self.save_s, self._place.world_size, self._plan.price)

    def stop(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        self._devices.stop()


def _memory(device: torch.device) -> tuple[float, float, float]:
    """The most bytes of a GPU that were in use and that were reserved, and how often an allocation had to be tried again."""
    if device.type != "cuda":
        return (math.nan,) * 3
    stats = torch.cuda.memory_stats(device)
    return stats["active_bytes.all.peak"], stats["reserved_bytes.all.peak"], stats["num_alloc_retries"]


def spent_before(run: RunDir, now: float, tell: Callable[[str], None]) -> Breakdown:
    """What the run has spent until `now`, in seconds since the epoch; nothing where that cannot be read, which is told."""
    try:
        return goodput.read(run, now)
    except Exception as error:
        # Raised here, it would come out of every step: what a file holds that others have written must not end training.
        tell(f"what the run has done before cannot be read, so it counts from here: {error}")
        return Breakdown()


def record_fault(run: RunDir, place: RankInfo, host: str, limit: RateLimit, words: str) -> None:
    """A GPU's fault, in this rank's log and among the events at once: it may be the last that this rank tells."""
    if not limit.admit(words):
        return
    where = f"{words} (rank {place.rank} on {host})"
    print(where, flush=True)
    # A disk that is full must not end the watch over the device.
    with suppress(OSError):
        append_event(run, place.attempt, "alert", where)


def _hosts(place: RankInfo) -> list[str]:
    """The name of each rank's node."""
    names: list[str] = [""] * place.world_size
    dist.all_gather_object(names, os.uname().nodename)
    return names
