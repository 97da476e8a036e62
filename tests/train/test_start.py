"""Two real ranks agree on the checkpoint that they begin from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import run_store
from launcher.checkpoint import durable, store
from launcher.errors import CheckpointError
from launcher.plan.run_dir import RunDir
from launcher.run_store import Attempt
from launcher.train.engine import Place
from launcher.train.start import agree_on_start

# Argument 3 is a list: for each case the run directory that this rank sees, and its agent's count of restarts.
RANK = """
import json, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from launcher.errors import CheckpointError
from launcher.plan.run_dir import RunDir
from launcher.train.engine import Place
from launcher.train.start import agree_on_start

rank, meeting, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
for root, restart in cases:
    try:
        start = agree_on_start(RunDir(Path(root)), Place(rank, rank, 2, 2, restart), torch.device("cpu"))
        at = start.checkpoint
        print(json.dumps([at and at.step, at and str(at.path), start.restarts]))
    except CheckpointError as error:
        print(json.dumps(error.problems[0].what))
dist.destroy_process_group()
"""


def run_with(root: Path, named: int | None, own: Sequence[int] = (), before: Sequence[int] = ()) -> RunDir:
    """A run in its second attempt, which names a checkpoint; `own` are of that attempt, `before` of the first."""
    run = RunDir(root)
    run.attempt(2).mkdir(parents=True)
    run_store.write_attempt(run, 2, Attempt(resume_step=named))
    for attempt, steps in ((1, before), (2, own)):
        for step in steps:
            saving = store.begin(run.checkpoints, step=step, attempt=attempt, needed_bytes=1)
            files = {name: durable.write_file(saving / name, [b"weights"]) for name in (store.shard_name(0), store.STATE)}
            store.commit(saving, store.Manifest(step=step, world_size=2, plan_digest="d", attempt=attempt, files=files))
    return run


def on_two_ranks(folder: Path, first: list[tuple[RunDir, int]], second: list[tuple[RunDir, int]]) -> list[list[Any]]:
    """What each rank says of each case."""
    seen = [json.dumps([(str(run.root), restart) for run, restart in cases]) for cases in (first, second)]
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder / "meeting"), cases], stdout=subprocess.PIPE, text=True)
        for rank, cases in enumerate(seen)
    ]
    try:
        return [[json.loads(line) for line in rank.communicate(timeout=90)[0].splitlines()] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_the_first_ranks_choice_holds_for_all(tmp_path: Path) -> None:
    named = run_with(tmp_path / "named", 10, before=[10, 20])
    own = run_with(tmp_path / "own", 10, own=[30, 40], before=[10, 20, 50])
    ahead = run_with(tmp_path / "ahead", 10, own=[30, 40, 60], before=[10])
    nothing = run_with(tmp_path / "nothing", None)
    foreign = run_with(tmp_path / "foreign", None, before=[20])
    first = [(named, 0), (own, 0), (own, 1), (nothing, 2), (foreign, 0), (own, 0)]
    second = [(named, 0), (own, 3), (ahead, 0), (ahead, 0), (foreign, 0), (named, 0)]
    said, others = on_two_ranks(tmp_path, first, second)

    def at(run: RunDir, step: int) -> list[Any]:
        return [step, str(run.checkpoints / store.step_name(step))]

    # The checkpoint that the attempt names; what came after it in an attempt before counts for nothing.
    assert said[0] == others[0] == [*at(named, 10), 0]
    # What the attempt itself has saved, before its agents restarted the ranks; the highest count of restarts.
    assert said[1] == others[1] == [*at(own, 40), 3]
    # Where another rank sees more, or anything at all.
    assert (said[2], others[2]) == ([*at(own, 40), 1], [*at(ahead, 40), 1])
    assert said[3] == others[3] == [None, None, 2]
    assert said[4] == others[4] == [None, None, 0]
    # Where another rank does not see it, that one refuses: never a silent start from elsewhere.
    assert said[5] == [*at(own, 40), 0]
    assert isinstance(others[5], str)
    assert "40" in others[5]


def test_a_checkpoint_that_is_named_must_be_there(tmp_path: Path) -> None:
    run = run_with(tmp_path, 30, before=[10, 20])
    with pytest.raises(CheckpointError, match="30"):
        agree_on_start(run, Place(0, 0, 1, 2, 0), torch.device("cpu"))
