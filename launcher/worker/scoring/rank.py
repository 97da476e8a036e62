"""One rank of a score pass: `python -m launcher.worker.scoring.rank TASK_JSON`, or a function call if there is only one rank."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np

from launcher.data.loader import RowBatches
from launcher.data.score_store import ScoreStore
from launcher.models.remote_code import remove_copies
from launcher.security.printable_stream import printable_output
from launcher.worker.ranks.rank_env import die_with_parent, exit_without_shutdown
from launcher.worker.scoring.passes import Progress, RankTask
from launcher.worker.signals import exit_on_termination


def run_rank(task: RankTask, on_progress: Progress = lambda stage, done, total: None) -> None:
    """Score a task's passes together with the other ranks; uses torchrun's environment variables. Collective."""
    # DeepSpeed chooses a device on import, but a plan may use the CPUs of a machine with GPUs.
    os.environ["DS_ACCELERATOR"] = task.plan.topology.device
    from launcher.distributed import RankInfo
    from launcher.train.engine import build_inference_engine, join_process_group, leave_process_group
    from launcher.train.held_out_loss import Scorer, score_rows
    from launcher.train.objectives import OBJECTIVES

    rank_info = RankInfo(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), attempt=0)
    device = join_process_group(task.plan, rank_info)
    engine, model = build_inference_engine(task.plan)
    scorer = Scorer(engine, model, OBJECTIVES["supervised"], rank_info, device)
    for one, key in zip(task.passes, task.keys, strict=True):
        rows = None if one.rows is None else np.asarray(one.rows)
        batches = RowBatches(one.open(), task.plan.batch.micro_batch_size, pad_id=0, rows=rows)
        store = ScoreStore(key, len(batches))
        score_rows(scorer, batches, store, partial(on_progress, one.title))
    leave_process_group()


if __name__ == "__main__":
    exit_on_termination()
    # TERM would not end it: Python runs no handler while the rank waits in a collective.
    die_with_parent()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        run_rank(RankTask.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    remove_copies()
    exit_without_shutdown(0)
