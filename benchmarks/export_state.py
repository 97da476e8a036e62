"""One engine's state saved twice, by the launcher and by DeepSpeed itself: the checkpoints that benchmarks/export.py reads.

    torchrun --nproc-per-node 2 benchmarks/export_state.py PLAN_JSON RUN_DIR DEEPSPEED_DIR

One optimizer step is done before, so that both checkpoints hold the moments as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # DeepSpeed patches tensor constructors; a later import of dynamo would fail on them.
import torch.distributed as dist

from launcher.checkpoint.saver import Saver
from launcher.errors import CheckpointError
from launcher.plan.launch_plan import LaunchPlan
from launcher.train.engine import Place, build_engine, join


def main(plan_path: str, run_dir: str, deepspeed_dir: str) -> None:
    plan = LaunchPlan.load(plan_path)
    place = Place(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), attempt=1)
    device = join(plan, place)
    engine, model = build_engine(plan, place)
    ids = torch.arange(64, device=device).unsqueeze(0)
    engine.backward(engine(ids, ids, ids.cpu(), 1.0 / 64))
    engine.step()
    saver = Saver(
        engine,
        model.parameters_by_name(),
        Path(run_dir) / "checkpoints",
        plan_digest=plan.digest(),
        attempt=1,
        prune=lambda _: None,
        background=False,
        deadline_s=60.0,
    )
    saver.save(1, {}, wait=True)
    saved = saver.wait()
    if isinstance(saved, CheckpointError):
        raise saved
    engine.save_checkpoint(deepspeed_dir, tag="step-1")
    dist.barrier()
    sys.stdout.flush()
    # DeepSpeed's threads can abort the interpreter's own shutdown.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
