"""The agent of a node restarts failed ranks and names the rank that failed; the ranks train nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
from pace import slowness
from plan_fixtures import facts_for

from launcher import json_records
from launcher.config.schema import RunConfig
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.jsonl import read_events

pytestmark = pytest.mark.rest

REPO = Path(__file__).resolve().parents[3]

# Each start of the ranks ends differently. A lock tells rank 1 that rank 0 has died, as a lost connection would.
HOOK = """
import contextlib, fcntl, importlib, json, os, signal, sys, time, types

def train(plan, rank_info, stop, beat, on_early_stop, on_exported):
    if "STEPS" in os.environ:
        step = json.loads(os.environ["STEPS"])[rank_info.restart]
        beat("loaded", 40)
        if rank_info.rank == 0:
            time.sleep(60)
        if step is None:
            os.kill(os.getpid(), signal.SIGKILL)
        beat("training", step)
        raise IndexError("as it says")
    if rank_info.restart == 0:
        lock = open(os.environ["LOCK"], "a")
        if rank_info.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while not os.path.getsize(lock.name):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.01)
        except BlockingIOError:
            print("ready", file=lock, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        raise RuntimeError("Connection closed by peer")
    if rank_info.restart == 1:
        if rank_info.rank == 0:
            time.sleep(60)
        os._exit(7)
    json.dump(dict(os.environ), open(f"{os.environ['LOCK']}.{rank_info.rank}", "w"))
    return types.SimpleNamespace(state="completed", reason="completed", step=1, message="trained", checkpoint="")

if {"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv}:
    preload = types.ModuleType("launcher.train.preload")
    # Importing torch once is enough if ranks are forked.
    preload.import_stack = lambda plan, tracks: importlib.import_module("torch")
    distributed, loop = types.ModuleType("launcher.distributed"), types.ModuleType("launcher.train.loop")
    distributed.RankInfo = lambda rank, local_rank, size, attempt, restart: types.SimpleNamespace(
        rank=rank, restart=restart, is_main=rank == 0
    )
    loop.train = train
    samples = types.ModuleType("launcher.evaluate.samples")
    samples.report_answers = None
    largest_batch = types.ModuleType("launcher.train.monitoring.largest_batch")
    largest_batch.explained_out_of_memory = lambda plan, run_dir, has_completed_step: contextlib.nullcontext()
    names = ("distributed", "train.loop", "train.preload", "evaluate.samples", "train.monitoring.largest_batch")
    modules = (distributed, loop, preload, samples, largest_batch)
    sys.modules.update(zip((f"launcher.{name}" for name in names), modules, strict=True))
"""


@pytest.fixture
def run(config_of: Callable[..., RunConfig], tmp_path: Path) -> RunDir:
    """A run on two local ranks whose attempt 1 is about to start."""
    cluster = ("cluster.max_restarts=4", "cluster.ranks_per_node=2")
    config = config_of("tracking=none", "run.name=tried", *cluster)
    return hand_made.run(plan(config, facts_for(config, working_dir=str(tmp_path))), Attempt(None))


def run_agent(run: RunDir, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(HOOK)
    environment = os.environ | {"PYTHONPATH": f"{folder / 'hook'}:{REPO}", **variables}
    command = [sys.executable, "-m", "launcher.worker.agent", str(run.plan), "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100 * slowness())


def alerts(run: RunDir) -> list[str]:
    return [event["text"] for event in read_events(run.events) if event["kind"] == "alert"]


def test_killed_ranks_and_ranks_without_a_record_each_cost_one_restart(run: RunDir, tmp_path: Path) -> None:
    done = run_agent(run, tmp_path, LOCK=str(tmp_path / "lock"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json_records.read_json(run.attempt(1) / "exit.json")["state"] == "completed"
    for rank in (0, 1):
        # What the agent sets for the C library's allocator reaches the ranks, as PyTorch's does on GPUs.
        variables = json_records.read_json(tmp_path / f"lock.{rank}")
        assert variables["LOCAL_RANK"] == str(rank)
        assert {"MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS"} <= variables.keys()
    restarts = [text.partition(": ")[2] for text in alerts(run)]
    assert restarts == ["rank 0: killed by SIGKILL", "rank 1: ended with exit code 7 and left no record of an error"]


def test_an_exception_that_comes_back_at_one_step_after_two_restarts_ends_the_run(run: RunDir, tmp_path: Path) -> None:
    """One more restart is left. The killed rank in between is not evidence about the exception."""
    done = run_agent(run, tmp_path, STEPS="[43, null, 43, 43, 43]")
    assert done.returncode == 1, done.stdout + done.stderr
    exit_record = json_records.read_json(run.attempt(1) / "exit.json")
    reason = "IndexError in step 44 occurred 3 times, twice after a resume from the initial weights: it repeats"
    assert (exit_record["state"], exit_record["message"]) == ("failed", f"rank 1: IndexError: as it says; {reason}")
    assert exit_record["first_failure"]["step"] == 43
    failures = ["rank 1: IndexError: as it says", "rank 1: killed by SIGKILL", "rank 1: IndexError: as it says"]
    restarts = [f"all ranks are restarted (restart {count}): {failure}" for count, failure in enumerate(failures, 1)]
    assert alerts(run) == [*restarts, f"the attempt failed: {exit_record['message']}"]
