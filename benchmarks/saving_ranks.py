"""The ranks of benchmarks/saving.py: `saving_ranks.py save|load-ours|load-universal PLAN_JSON FOLDER`, under torchrun.

`save` leaves in FOLDER a checkpoint of the launcher's (ours/) and one of DeepSpeed's (deepspeed/), both of the same state. Rank 0
prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint import shards, store
from launcher.checkpoint.saver import Saved, Saver
from launcher.data.cache import Split
from launcher.data.loader import TrainBatches
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.engine import Place, build_engine, join

TAG = "saved"
ROUNDS, STEPS = 3, 4


def main(action: str, plan_path: str, folder: Path) -> None:
    plan = LaunchPlan.load(plan_path)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = Place(rank, int(os.environ["LOCAL_RANK"]), world_size, attempt=1)
    join(plan, place)
    if action == "load-universal":
        plan = plan.model_copy(update={"deepspeed": {**plan.deepspeed, "checkpoint": {"load_universal": True}}})
    trainer = Trainer(plan, place)
    found = {"save": measure_saves, "load-ours": load_ours, "load-universal": load_universal}[action](trainer, folder)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    sys.stdout.flush()
    # Threads of an engine can abort an orderly exit.
    os._exit(0)


class Trainer:
    """An engine and steps to do with it."""

    def __init__(self, plan: LaunchPlan, place: Place) -> None:
        self.engine, self.model = build_engine(plan, place)
        assert plan.data is not None
        self.batches = TrainBatches(Split.open(plan.data), plan.batch, plan.config.run.seed, place.rank, place.world_size, 0)
        self.world_size, self.done = place.world_size, 0

    def step(self, settle: Callable[[], None] = lambda: None) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        # Always the same rows: the steps are compared with each other.
        batch = self.batches.step(0)
        for i, micro in enumerate(batch.micro):
            factor = self.world_size / batch.num_labels
            loss = self.engine(micro.input_ids, micro.position_ids, micro.labels, factor)
            self.engine.backward(loss, scale_wrt_gas=False)
            if i == len(batch.micro) - 1:
                settle()
            self.engine.step()
        dist.barrier()
        self.done += 1
        return time.perf_counter() - began


def measure_saves(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Medians over rounds: each has undisturbed steps, both kinds of saves, and the bare write of as many bytes."""
    root = folder / "ours"
    saver = saver_of(trainer, root)
    for _ in range(2):
        trainer.step()
    saver.save(trainer.done, {})
    trainer.step(saver.settle)
    saver.wait()
    rows: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        rows.setdefault(name, []).append(seconds)

    for _ in range(ROUNDS):
        alone = statistics.median(trainer.step() for _ in range(STEPS))
        during = behind(trainer, saver)
        seconds = timed(lambda: save_deepspeed(trainer, folder / "deepspeed"))
        shutil.rmtree(folder / "raw", ignore_errors=True)
        outcome = waited(trainer, saver)
        num_bytes = outcome.bytes // trainer.world_size
        note("step", alone)
        note("step during the write", statistics.median(during["steps"]))
        note("stall of a save", during["stall_s"])
        note("stall of DeepSpeed's save_checkpoint", seconds)
        note("save in the background", during["seconds"])
        note("save that is waited for", outcome.seconds)
        note("bare write and fsync", timed(lambda size=num_bytes: bare_write(folder / "raw", size)))
        note("stall / DeepSpeed's", during["stall_s"] / seconds)
        note("step during the write / step", statistics.median(during["steps"]) / alone)
        note("bandwidth / bare write's", rows["bare write and fsync"][-1] / outcome.seconds)
    return {"rows": rows, "bytes": outcome.bytes}


def saver_of(trainer: Trainer, root: Path) -> Saver:
    return Saver(
        trainer.engine,
        trainer.model.parameters_by_name(),
        root,
        plan_digest="bench",
        attempt=1,
        prune=lambda committed: [shutil.rmtree(other) for other in root.glob("step-*") if other != committed],
        background=True,
        deadline_s=120,
    )


def behind(trainer: Trainer, saver: Saver) -> dict[str, Any]:
    """A save in the background, and the steps that were done while it was written."""
    os.sync()
    dist.barrier()
    saver.save(trainer.done, {})
    steps = [trainer.step(saver.settle)]
    while trainer.world_size > 1 and not ended(saver):
        steps.append(trainer.step(saver.settle))
    outcome = saver.wait()
    assert isinstance(outcome, Saved)
    return {"steps": steps, "stall_s": largest(outcome.stall_s), "seconds": largest(outcome.seconds)}


def ended(saver: Saver) -> bool:
    """Rank 0 knows; all do the same number of steps."""
    known = torch.tensor(int(saver.poll() is not None))
    dist.all_reduce(known, op=dist.ReduceOp.MAX)
    return bool(known)


def waited(trainer: Trainer, saver: Saver) -> Saved:
    os.sync()
    dist.barrier()
    saver.save(trainer.done, {}, wait=True)
    outcome = saver.wait()
    assert isinstance(outcome, Saved)
    return outcome


def save_deepspeed(trainer: Trainer, folder: Path) -> None:
    trainer.engine.save_checkpoint(str(folder), tag=TAG)


def bare_write(folder: Path, num_bytes: int) -> None:
    """Each rank writes as much as a shard holds, in blocks, from memory that is there."""
    folder.mkdir(exist_ok=True)
    block = memoryview(bytearray(os.urandom(2**20)) * 16)
    path = folder / f"{dist.get_rank()}"
    with open(path, "wb", buffering=0) as file:
        left = num_bytes
        while left:
            left -= file.write(block[: min(left, len(block))])
        os.fsync(file.fileno())


def load_ours(trainer: Trainer, folder: Path) -> dict[str, Any]:
    checkpoint = store.latest(folder / "ours")
    return {"seconds": timed(lambda: shards.load(trainer.engine, trainer.model.parameters_by_name(), checkpoint.path))}


def load_universal(trainer: Trainer, folder: Path) -> dict[str, Any]:
    return {"seconds": timed(lambda: trainer.engine.load_checkpoint(str(folder / "universal"), tag=TAG))}


def timed(action: Callable[[], object]) -> float:
    """Seconds of an action of all ranks, with nothing left to be written at its begin."""
    gc.collect()
    os.sync()
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def largest(seconds: float) -> float:
    """Of all ranks."""
    shared = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
