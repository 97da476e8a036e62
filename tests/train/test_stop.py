"""Whether a save still fits before the machines go, as two real ranks judge it together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RANK = """
import json, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from launcher.config.cluster import LocalSection
from launcher.config.slurm import SlurmSection
from launcher.train.stop import save_fits

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
slurm, local = SlurmSection(signal_lead_seconds=60), LocalSection()
cases = {
    "short": (slurm, "preempted", 0, 50.0),
    "long": (slurm, "preempted", 0, 70.0),
    "waited": (slurm, "preempted", 20, 50.0),
    "waited and short": (slurm, "preempted", 20, 30.0),
    "one is slow": (slurm, "preempted", 0, 70.0 if rank else 1.0),
    "one has waited": (slurm, "preempted", 0 if rank else 40, 30.0),
    "one was not asked": (slurm, "preempted", None if rank else 40, 30.0),
    "nobody was asked": (slurm, "preempted", None, 50.0),
    "never saved": (slurm, "preempted", 50, None),
    "cancelled": (slurm, "cancelled", 1000, 1000.0),
    "limit": (slurm, "limit", 1000, 1000.0),
    "local": (local, "preempted", 1000, 1000.0),
}
for name, (cluster, reason, ago, save_s) in cases.items():
    asked_at = None if ago is None else time.monotonic() - ago
    print(json.dumps([name, save_fits(cluster, reason, asked_at, save_s, torch.device("cpu"))]))
dist.destroy_process_group()
"""


def test_a_save_is_tried_where_every_rank_has_the_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        first, second = (dict(map(json.loads, rank.communicate(timeout=90)[0].splitlines())) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert first == second
    assert {name for name, fits in first.items() if not fits} == {
        *("long", "waited", "one is slow", "one has waited", "one was not asked"),
    }
    assert len(first) == 12
