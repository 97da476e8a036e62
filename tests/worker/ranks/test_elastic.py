"""A node's agent over ranks that train nothing: the ends that it survives, and the rank that it names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_fixtures import facts_for

from launcher import json_records, run_store
from launcher.config.schema import RunConfig
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking.jsonl import read_events

REPO = Path(__file__).resolve().parents[3]

# Each start of the ranks ends in another way; a lock tells rank 1 of the death of rank 0, as a connection would.
HOOK = """
import fcntl, json, os, signal, sys, time, types

def slow(function):
    def call(*values, **named):
        time.sleep(0.3)
        return function(*values, **named)
    return call

def train(plan, rank_info, stop, beat, on_early_stop, on_exported):
    if rank_info.restart == 0:
        lock = open(os.environ["LOCK"], "a")
        if rank_info.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while not os.path.getsize(lock.name):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        json.dump, os.fsync = slow(json.dump), slow(os.fsync)
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
        open(os.environ["TORCHELASTIC_ERROR_FILE"], "w").close()
        os._exit(7)
    return types.SimpleNamespace(state="completed", reason="completed", step=1, message="trained", checkpoint="")

if {"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv}:
    preload = types.ModuleType("launcher.train.preload")
    preload.import_stack = lambda plan, tracks: None
    distributed, loop = types.ModuleType("launcher.distributed"), types.ModuleType("launcher.train.loop")
    distributed.RankInfo = lambda rank, local_rank, size, attempt, restart: types.SimpleNamespace(
        rank=rank, restart=restart, is_main=rank == 0
    )
    loop.train = train
    samples = types.ModuleType("launcher.evaluate.samples")
    samples.report_answers = None
    names = ("launcher.distributed", "launcher.train.loop", "launcher.train.preload", "launcher.evaluate.samples")
    sys.modules.update(zip(names, (distributed, loop, preload, samples), strict=True))
"""


@pytest.fixture(params=["true", "false"], ids=["forked", "new processes"])
def run(config_of: Callable[..., RunConfig], tmp_path: Path, request: pytest.FixtureRequest) -> RunDir:
    """A run on two ranks of this machine, whose attempt 1 is about to begin."""
    cluster = ("cluster.max_restarts=2", "cluster.ranks_per_node=2", f"cluster.fork_ranks={request.param}")
    config = config_of("tracking=none", "run.name=tried", *cluster)
    run = run_store.create(plan(config, facts_for(config, working_dir=str(tmp_path))))
    run_store.update_status(run, attempt=run_store.create_attempt(run, Attempt(resume_step=None)))
    return run


def test_killed_ranks_and_damaged_error_records_each_cost_one_restart(run: RunDir, tmp_path: Path) -> None:
    """The agent dismisses rank 1 while it writes its record; then a rank leaves an empty one."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(HOOK)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'hook'}:{REPO}", "LOCK": str(tmp_path / "lock")}
    command = [sys.executable, "-m", "launcher.worker.agent", str(run.plan), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json_records.read_json(run.attempt(1) / "exit.json")["state"] == "completed"
    restarts = [event["text"].partition(": ")[2] for event in read_events(run.events) if event["kind"] == "alert"]
    assert restarts == ["rank 0: killed by SIGKILL", "rank 1: ended with exit code 7 and left no record of an error"]
