"""Two agents with loading ranks: one rank waits for another node's reads, and is restarted once no rank reads any more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
from plan_fixtures import facts_for

from launcher.clusters.network import free_port
from launcher.config.schema import RunConfig
from launcher.plan.planner import plan
from launcher.run_records import Attempt
from launcher.tracking.jsonl import read_events

REPO = Path(__file__).resolve().parents[3]
# The limit is 4 s; rank 0 reads for three times as long.
READS_S = 12
AGENT = """
import faulthandler, sys, time
faulthandler.dump_traceback_later(100)
from launcher.distributed import open_store
from launcher.worker import agent
from launcher.worker.ranks import watchdog
from launcher.worker.ranks.rank_env import NodeInfo

plan_path, node, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
watchdog._MIN_LOAD_S = 4.0
here = agent.NodeAgent.start(plan_path, 1, {})
store = open_store("127.0.0.1", port, is_server=node == 0)
failure = here.run_ranks(NodeInfo(node, ("n0", "n1"), "127.0.0.1", None), store)
store.add("ended", 1)
here.close()
while node == 0 and store.add("ended", 0) < 2:
    time.sleep(0.05)
sys.exit(failure is not None)
"""
# In the first start, rank 0 reads and then hangs, as does the other rank, which waits for it.
HOOK = """
import contextlib, os, sys, time, types

def train(plan, rank_info, stop, beat, on_early_stop, on_exported):
    beat("joined", 0)
    weights, until = os.environ["WEIGHTS"], time.monotonic() + float(os.environ["READS_S"])
    # A node whose own rank did not fail does not count the restart.
    started = f"{weights}.{rank_info.rank}"
    if not os.path.exists(started):
        open(started, "w").close()
        while rank_info.rank == 0 and time.monotonic() < until:
            with open(weights, "rb") as file:
                file.read()
            time.sleep(0.1)
        if rank_info.rank == 0:
            print("hangs at", time.time(), file=open(weights + ".hangs", "w"), flush=True)
        time.sleep(200)
    return types.SimpleNamespace(state="completed", reason="completed", step=1, message="trained", checkpoint="")

if {"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv}:
    names = ("distributed", "train.loop", "train.preload", "evaluate.samples", "train.monitoring.largest_batch")
    distributed, loop, preload, samples, largest_batch = modules = [types.ModuleType(name) for name in names]
    preload.import_stack = lambda plan, tracks: None
    distributed.RankInfo = lambda rank, local_rank, size, attempt, restart: types.SimpleNamespace(
        rank=rank, restart=restart, is_main=rank == 0
    )
    loop.train, samples.report_answers = train, None
    largest_batch.explained_out_of_memory = lambda *_: contextlib.nullcontext()
    sys.modules.update(zip((f"launcher.{name}" for name in names), modules, strict=True))
"""


@pytest.mark.rest
def test_a_rank_waits_for_one_of_another_node_as_long_as_that_reads(config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    cluster = ("cluster.nodes=2", "cluster.ranks_per_node=1", "cluster.max_restarts=1")
    config = config_of("tracking=none", "run.name=tried", "cluster.stall_seconds=2", *cluster)
    run = hand_made.run(plan(config, facts_for(config, working_dir=str(tmp_path))), Attempt(None))
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(HOOK)
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(4 << 20))
    variables = {"PYTHONPATH": f"{tmp_path / 'hook'}:{REPO}", "WEIGHTS": str(weights), "READS_S": str(READS_S)}
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", AGENT, str(run.plan)]
    logs = [tmp_path / f"agent-{node}.log" for node in (0, 1)]
    agents = [
        subprocess.Popen(
            [*command, str(node), str(port)], env=os.environ | variables, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for node, log in enumerate(logs)
    ]
    try:
        ends = [agent.wait(150) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
        print(*(log.read_text() for log in logs))
    assert ends == [0, 0]
    (restart,) = [event for event in read_events(run.events) if event["kind"] == "alert"]
    assert "all ranks are restarted (restart 1): rank " in restart["text"]
    assert "reads nothing, and neither does any other rank: no progress for " in restart["text"]
    # While rank 0 read, the waiting rank exceeded the limit without being killed.
    hung_at = float(Path(f"{weights}.hangs").read_text().split()[-1])
    assert restart["time"] > hung_at
