"""Ranks over gloo that save a checkpoint, or export at the end of a run; tests/forked_ranks.py runs them."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from launcher.checkpoint import shards
from launcher.checkpoint.saver import Saved, Saver
from launcher.config.sections.model import ModelSection
from launcher.distributed import RankInfo
from launcher.errors import ExportError
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.tracker import Composite
from launcher.train import finish
from launcher.train.engine import import_muon, leave_process_group
from launcher.train.model import build_model


class Printer:
    def event(self, kind: str, text: str, step: int | None = None, **fields: object) -> None:
        print(f"{kind}: {text}", flush=True)


def meet() -> tuple[int, int]:
    """Join the other ranks and return this rank and the world size."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    return rank, world_size


def save_trained(folders: list[str], root: str) -> list[list[str]]:
    """Train each folder's model for a step in bf16, and save it in a folder of the same name under `root`, with reference logits.

    Return for each the names of the buffers that loading the checkpoint restores after they were changed.
    """
    meet()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    import_muon()
    return [_save_trained(Path(folder), Path(root) / Path(folder).name) for folder in folders]


def _save_trained(folder: Path, root: Path) -> list[str]:
    settings = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    config = {**settings, "zero_optimization": {"stage": 3}}
    partitioned = HfDeepSpeedConfig(config)
    facts = model_facts(json.loads((folder / "config.json").read_text()), str(folder), str(folder), None)
    model = build_model(ModelSection(path=str(folder), dtype="bf16"), facts, "cpu", 64)
    del partitioned
    parameters, buffers = model.parameters_by_name(), model.buffers_by_name()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids, positions = (torch.arange(24) * 7 % 48)[None], torch.arange(24)[None]
    engine.backward(engine(ids, positions, ids.roll(-1, dims=1)))
    engine.step()
    model.eval()
    logits = {"input_ids": ids, "position_ids": positions, "logits": engine(ids, positions).detach()}
    saver = Saver(
        engine,
        parameters,
        root,
        plan_digest="digest-of-the-plan",
        attempt=1,
        prune=lambda committed: None,
        background=False,
        deadline_s=60,
        named_buffers=buffers,
    )
    saver.save(1, {}, reference_logits=logits, wait=True)
    saved, values = saver.wait(), {name: buffer.clone() for name, buffer in buffers.items()}
    assert isinstance(saved, Saved), saved
    for buffer in buffers.values():
        buffer.zero_()
    shards.load(engine, parameters, saved.path, named_buffers=buffers)
    engine.destroy()
    return [name for name, buffer in buffers.items() if buffer.any() and torch.equal(buffer, values[name])]


def main(plan_path: str, checkpoint: str, limited: int) -> None:
    """Export `checkpoint`. The rank `limited` cannot write files over 16 KiB, as on a disk that fills up; -1 limits no rank.

    Rank 0 completes the folder and prints each event. On a failure every rank prints it and exits with 3.
    """
    rank, world_size = meet()
    plan = LaunchPlan.load(plan_path)
    task_of = finish._build_export_task
    finish._build_export_task = lambda *parts: replace(task_of(*parts), max_file_bytes=20_000)
    if rank == limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
    try:
        rank_info = RankInfo(rank, rank, world_size, attempt=1)
        finish.write_weights(plan, rank_info, Path(checkpoint), torch.device("cpu"), Composite([]))
        leave_process_group()
        if rank == 0:
            finish.finish(plan, Path(checkpoint), Composite([Printer()]), on_exported=lambda *_: None)
    except ExportError as error:
        print(error, flush=True)
        assert not dist.is_initialized()
        sys.exit(3)
