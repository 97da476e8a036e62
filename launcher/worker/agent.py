"""One node: `python -m launcher.worker.agent PLAN ATTEMPT` starts a rank per GPU and reports how they end.

torch's elastic agent does the work: rendezvous, restarts, and which rank failed first. What is added here are
signals that ask the ranks to save before they stop, the checks of the node, the watch over ranks that hang, and the
record of the node. On this machine alone the agent concludes the attempt itself; a Slurm job does so when all of its
nodes have ended (launcher.worker.slurm.job).
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
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
from launcher.worker.mirror_process import AFTER_FAILURE_S, MirrorProcess
from launcher.worker.rank_env import NodePlace
from launcher.worker.rank_process import RankProcesses, StartRank
from launcher.worker.signals import CANCEL, PREEMPT
from launcher.worker.wandb_closing import tell_wandb
from launcher.worker.watchdog import Watchdog

_RESEND_S = 0.5
# Ranks that are stopped before a restart may take half a minute to end.
_MEET_DEADLINE_S = 300.0


def main(plan_path: str, attempt: int) -> int:
    """Run this node's part of one attempt and leave its record; returns the exit code."""
    try:
        plan = LaunchPlan.load(plan_path)
    except OSError as error:
        print(f"{network.node_name()} does not see the run directory: {error}", file=sys.stderr)
        return 1
    run = RunDir(Path(plan.run_dir))
    started = time.time()
    on_slurm = plan.config.cluster.kind == "slurm"
    ranks = RankProcesses()
    signals = _SLURM_SIGNALS if on_slurm else _LOCAL_SIGNALS
    stopper = _Stopper(plan.config.cluster.stop_grace_seconds, signals, ranks.send_signal).install()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.topology.ranks_per_node)))
    if plan.config.cluster.fork_ranks:
        ranks.warm_up(plan_path, os.environ)
    if on_slurm:
        return _slurm_node(plan, plan_path, run, attempt, stopper, ranks, started)
    run_store.write_attempt(run, attempt, replace(run_store.read_attempt(run, attempt), begun_at=started))
    run_store.update_status(run, state="running", attempt=attempt, job=detached_process.identity(), message="")
    detached_process.give_signs(run)
    mirror = MirrorProcess.start(plan, plan_path, run, attempt)
    place = NodePlace(0, (network.node_name(),), "127.0.0.1", None)
    failure = None if stopper.requested else _run_ranks(plan, run, attempt, partial(ranks.start, plan_path, attempt), place, None)
    stopper.disarm()
    ranks.close()
    outcome = failure_record.outcome(run, attempt, failure, stopper.requested, stopper.killed)
    exit_file = run.attempt(attempt) / "exit.json"
    ended = {**outcome, "first_failure": failure, "host": os.uname().nodename, "started_at": started, "ended_at": None}
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


def _slurm_node(
    plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int, stopper: _Stopper, ranks: RankProcesses, started: float
) -> int:
    from launcher.worker.slurm import node as slurm_node

    begun = run_store.read_attempt(run, attempt)
    node = int(os.environ["SLURM_NODEID"])
    stopper.kill_at = slurm_node.kill_at(begun, plan)
    if run.cancel(attempt).is_file():
        # Asked for while there was no process yet to hear it.
        stopper.request(CANCEL)
    mirror = None
    ended: dict[str, Any] = {"node": node, "host": os.uname().nodename, "started_at": started, "first_failure": None}
    try:
        place = slurm_node.place(plan, begun, node)
        slurm_node.end_before(begun, plan, stopper.request)
        store = slurm_node.meet(begun, place)
        problems = slurm_node.check(store, plan, run, attempt, begun, place)
        if problems:
            ended["problems"] = problems
        elif not stopper.requested:
            if place.is_head:
                mirror = MirrorProcess.start(plan, plan_path, run, attempt)
            start = partial(ranks.start, plan_path, attempt)
            ended["first_failure"] = _run_ranks(plan, run, attempt, start, place, store)
    except Exception as error:
        ended["first_failure"] = failure_record.of_agent(error, run.attempt(attempt))
    stopper.disarm()
    ranks.close()
    ended |= {"stopped": stopper.requested, "killed": stopper.killed, "ended_at": time.time()}
    atomic_files.write_json(failure_record.node_file(run, attempt, node), ended)
    stopper.finish(mirror, math.inf if ended["first_failure"] is None else AFTER_FAILURE_S)
    return 0 if ended["first_failure"] is None and "problems" not in ended else 1


def _run_ranks(
    plan: LaunchPlan, run: RunDir, attempt: int, start: StartRank, place: NodePlace, store: Any
) -> dict[str, Any] | None:
    """Start the ranks and wait for them; returns the first failure or None. `store` is what the nodes share, if they are many."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousClosedError

    from launcher.worker import elastic
    from launcher.worker.rendezvous import NodeRendezvous

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
            start,
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


# Passed on to the ranks as a wish to save and stop. On this machine Ctrl-C and TERM are a person's; TERM under Slurm is not.
_LOCAL_SIGNALS = {signal.SIGINT: CANCEL, CANCEL: CANCEL, signal.SIGTERM: CANCEL, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_SLURM_SIGNALS = {CANCEL: CANCEL, signal.SIGTERM: PREEMPT, PREEMPT: PREEMPT}


class _Stopper:
    """First signal: ask the ranks to save and stop. A person's second, or the grace running out: kill them.

    At `kill_at`, in seconds since the epoch, ranks that have been asked and have not stopped are killed in any case.

    The wish is repeated until it is taken back, because ranks may still be starting when it comes; a rank that has
    heard it ignores the repetition.
    """

    def __init__(
        self, grace_s: float, signals: Mapping[signal.Signals, signal.Signals], signal_ranks: Callable[[int], None]
    ) -> None:
        self._grace_s = grace_s
        self._signals = signals
        self._signal_ranks = signal_ranks
        self._wish: int | None = None
        self._ended = threading.Event()
        self._cancelled = False
        self._asked_at: float | None = None
        self._times_cancelled = 0
        self.kill_at: float | None = None
        self.requested = False
        self.killed = False

    def install(self) -> _Stopper:
        """Listen in a thread: handlers would wait while the main thread is inside a rendezvous.

        Blocked in the main thread, the signals are blocked in the ranks from their first instruction on: what comes while
        they import waits until they listen.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, set(self._signals))
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def disarm(self) -> None:
        self._ended.set()

    def finish(self, mirror: MirrorProcess | None, most_s: float = math.inf) -> None:
        """Give the mirror what is left of the time to stop in, or `most_s`; a person who asks again has waited enough.

        Where nobody has asked for the end, the last checkpoint takes the time that it needs.
        """
        if mirror is None:
            return
        now, times = time.time(), self._times_cancelled
        stop_by = math.inf if self._asked_at is None else self._asked_at + self._grace_s
        until = min(stop_by, self.kill_at or math.inf, now + most_s)

        def unwanted() -> bool:
            asked_late = self._asked_at is not None and time.time() > self._asked_at + self._grace_s
            return asked_late or self._times_cancelled > times

        mirror.finish(now if self.killed else until, unwanted)

    def request(self, wish: signal.Signals) -> None:
        """Ask the ranks to save and stop, unless they are asked already."""
        if not self.requested:
            self._wish, self.requested, self._asked_at = wish, True, time.time()
            threading.Thread(target=self._repeat, name="stopper", daemon=True).start()

    def _listen(self) -> None:
        while True:
            wish = self._signals[signal.Signals(signal.sigwaitinfo(set(self._signals)).si_signo)]
            if self._cancelled and wish == CANCEL:
                self._wish, self.killed = signal.SIGKILL, True
            self._cancelled = self._cancelled or wish == CANCEL
            self._times_cancelled += wish == CANCEL
            self.request(wish)

    def _repeat(self) -> None:
        deadline = time.monotonic() + self._grace_s
        while not self._ended.is_set():
            if time.monotonic() > deadline or (self.kill_at is not None and time.time() > self.kill_at):
                self._wish, self.killed = signal.SIGKILL, True
            if self._wish is not None:
                self._signal_ranks(self._wish)
            self._ended.wait(_RESEND_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
