"""The agent of a node: it starts a rank per GPU, watches them, and records how they ended.

`python -m launcher.worker.agent PLAN ATTEMPT` is the agent of a run on this machine alone, which concludes the attempt itself.
A Slurm job starts an agent on each of its nodes (launcher.worker.slurm.agent); `NodeAgent` is what both have in common.

torch's elastic agent does the work: rendezvous, restarts, and which rank failed first. What is added here are
signals that ask the ranks to save before they stop, the watch over ranks that hang, and the record of the failure.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher import atomic_files, run_store
from launcher.clusters import detached_process
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event
from launcher.train.previous_failure import RESTART
from launcher.worker import failure_record, heartbeat
from launcher.worker.checks import network
from launcher.worker.mirror_process import MirrorProcess
from launcher.worker.rank_env import NodePlace
from launcher.worker.rank_process import RankProcesses
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.stopper import Stopper
from launcher.worker.wandb_closing import tell_wandb
from launcher.worker.watchdog import Watchdog

# Ranks that are stopped before a restart may take half a minute to end.
_MEET_DEADLINE_S = 300.0
# Passed on to the ranks as a wish to save and stop: on this machine Ctrl-C and TERM are a person's.
_SIGNALS = {signal.SIGINT: CANCEL, CANCEL: CANCEL, signal.SIGTERM: CANCEL, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}


@dataclass(frozen=True)
class NodeAgent:
    """One node's part of an attempt. `started_at` is in seconds since the epoch."""

    plan: LaunchPlan
    plan_path: str
    run: RunDir
    attempt: int
    stopper: Stopper
    ranks: RankProcesses
    started_at: float

    @classmethod
    def start(cls, plan_path: str, attempt: int, signals: Mapping[signal.Signals, signal.Signals]) -> NodeAgent | None:
        """Read the plan, listen to `signals` and import what ranks need; None, with a message, where the plan cannot be read.

        `signals` maps a signal to the one that the ranks get for it: CANCEL or PREEMPT.
        """
        try:
            plan = LaunchPlan.load(plan_path)
        except OSError as error:
            print(f"{network.node_name()} does not see the run directory: {error}", file=sys.stderr)
            return None
        started_at = time.time()
        ranks = RankProcesses()
        stopper = Stopper(plan.config.cluster.stop_grace_seconds, signals, ranks.send_signal).install()
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.topology.ranks_per_node)))
        if plan.config.cluster.fork_ranks:
            ranks.warm_up(plan_path, os.environ)
        return cls(plan, plan_path, RunDir(Path(plan.run_dir)), attempt, stopper, ranks, started_at)

    def start_mirror(self) -> MirrorProcess | None:
        """Start the process that copies checkpoints to the mirror; one node of a run has it. None where there is no mirror."""
        return MirrorProcess.start(self.plan, self.plan_path, self.run, self.attempt)

    def close(self) -> None:
        """Send no more signals, and end the fork server."""
        self.stopper.disarm()
        self.ranks.close()

    def run_ranks(self, place: NodePlace, store: Any = None) -> dict[str, Any] | None:
        """Start the ranks and wait for them; returns the first failure or None.

        `store` is the TCPStore that the nodes of the job share; None where there is one node.
        """
        from torch.distributed import TCPStore
        from torch.distributed.elastic.rendezvous import RendezvousClosedError

        from launcher.worker import elastic
        from launcher.worker.rendezvous import NodeRendezvous

        plan, run, attempt = self.plan, self.run, self.attempt
        topology, cluster = plan.topology, plan.config.cluster
        if place.interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", place.interface)
            # NCCL takes a bare name for a prefix.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={place.interface}")
        elastic_folder = run.attempt(attempt) / "elastic" / f"node-{place.node:05d}"
        elastic_folder.mkdir(parents=True, exist_ok=True)
        store = store or TCPStore(place.address, 0, None, True, wait_for_workers=False)
        run_id = f"{plan.wandb_id}-{attempt}"
        stalls: list[str] = []
        exits: list[failure_record.RankExit] = []

        def on_failure(ended: list[failure_record.RankExit]) -> None:
            exits[:] = ended

        def on_restart(count: int) -> None:
            here, why = place.hosts[place.node], failure_record.of_restart(exits, run, attempt, stalls)
            # Later failures have other reasons.
            stalls.clear()
            with suppress(OSError):
                words = f"all ranks are started again (restart {count}), as some failed on {here}: {why}"
                append_event(run, attempt, "alert", words, **{RESTART: count})

        def is_final() -> bool:
            return failure_record.read_final(run, attempt) is not None

        rendezvous = NodeRendezvous(store, run_id, place, _MEET_DEADLINE_S, is_final, on_restart)
        board = heartbeat.Board(topology.ranks_per_node)
        os.environ[heartbeat.VARIABLE] = str(board.path)

        def on_stall(text: str) -> None:
            stalls.append(text)
            print(text, flush=True)

        watchdog = Watchdog(board, cluster.stall_seconds, cluster.timeout_minutes * 60, on_stall).start()
        try:
            if elastic.run_ranks(
                partial(self.ranks.start, self.plan_path, attempt),
                rendezvous,
                num_ranks=topology.ranks_per_node,
                max_restarts=cluster.max_restarts,
                address=place.address,
                folder=elastic_folder,
                on_failure=on_failure,
            ):
                return None
            return failure_record.of_ranks(exits, run, attempt, stalls)
        except RendezvousClosedError as error:
            final = failure_record.read_final(run, attempt)
            return (
                failure_record.of_agent(error, run.attempt(attempt))
                if final is None
                else failure_record.of_final(run, attempt, final)
            )
        except Exception as error:
            # Rendezvous, resources and the like: no rank is to blame.
            return failure_record.of_agent(error, run.attempt(attempt))
        finally:
            watchdog.stop()
            board.close()
            if plan.nvme_folder is not None and run_store.newest_attempt(run) == attempt:
                # States of a whole model would fill the disk of a node that the run does not come back to.
                shutil.rmtree(plan.nvme_folder, ignore_errors=True)


def main(plan_path: str, attempt: int) -> int:
    """Run an attempt on this machine and conclude it; returns the exit code."""
    node = NodeAgent.start(plan_path, attempt, _SIGNALS)
    if node is None:
        return 1
    plan, run, stopper = node.plan, node.run, node.stopper
    run_store.write_attempt(run, attempt, replace(run_store.read_attempt(run, attempt), begun_at=node.started_at))
    run_store.update_status(run, state="running", attempt=attempt, job=detached_process.identity(), message="")
    detached_process.give_signs(run)
    mirror = node.start_mirror()
    place = NodePlace(0, (network.node_name(),), "127.0.0.1", None)
    failure = None if stopper.requested else node.run_ranks(place)
    node.close()
    outcome = failure_record.outcome(run, attempt, failure, stopper.requested, stopper.killed)
    exit_file = run.attempt(attempt) / "exit.json"
    ended = {**outcome, "first_failure": failure, "host": os.uname().nodename, "started_at": node.started_at, "ended_at": None}
    atomic_files.write_json(exit_file, ended)
    if outcome["state"] == "failed":
        with suppress(OSError):
            append_event(run, attempt, "alert", f"the attempt failed: {outcome['message']}", outcome["step"])
    # The run is over for those who follow it when the mirror has what is committed.
    stopper.finish(mirror)
    # Until then the attempt has held its machines. Where the disk is full, its last sign of life tells.
    with suppress(OSError):
        atomic_files.write_json(exit_file, ended | {"ended_at": time.time()})
    run_store.update_status(run, state=outcome["state"], message=outcome["message"])
    tell_wandb(plan, plan_path, run, attempt)
    return 0 if outcome["state"] == "completed" else 130 if outcome["state"] in ("cancelled", "preempted") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
