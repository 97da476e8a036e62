"""What Ray Train runs on each node of an attempt: the node's agent, in a process of its own.

The agent starts at once, so that its imports overlap with the meeting of the workers. This process never imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.clusters import detached_process, network
from launcher.clusters.node_command import blocked_signals
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking.jsonl import append_event
from launcher.worker.signals import CANCEL, PREEMPT

_AGENT = "launcher.worker.ray.agent"
_SHARED = "set run.root to a folder on storage that all nodes share"
_PREEMPTION_LOOK_S = 2.0


@dataclass(frozen=True)
class AttemptArguments:
    """What the driver passes to the nodes of an attempt. `driver` is the job in the attempt's record, by which a node recognizes
    the run directory; `variables` are those of the ranks, without secrets.
    """

    plan_path: str
    run_dir: str
    attempt: int
    driver: str
    interface: str | None
    variables: dict[str, str]
    is_private: bool


def resize_request(run: RunDir, attempt: int) -> Path:
    """The driver's request to save and end an attempt, because the next one can have more nodes."""
    return run.attempt(attempt) / "resize"


def agent_log(run: RunDir, attempt: int, number: int) -> Path:
    """The output of a node's agent; agent.log is the driver's."""
    return run.attempt(attempt) / f"agent-{number:05d}.log"


class NodeFailed(Exception):
    """Ends the attempt: no agent could start on node `number` of `nodes` (`is_unfit`), or it ended without a record."""

    def __init__(self, nodes: tuple[str, ...], number: int, reason: str, is_unfit: bool) -> None:
        super().__init__(nodes, number, reason, is_unfit)
        self.nodes, self.number, self.reason, self.is_unfit = nodes, number, reason, is_unfit


def run_agent(config: dict[str, AttemptArguments]) -> list[str]:
    """Run this node's agent to its end; returns the ids of the nodes that Ray is about to take away.

    Raises:
        NodeFailed: if the agent cannot start, or is killed. Ray Train then ends the workers of all nodes.
    """
    from ray import train
    from ray.train import collective

    os.umask(0o077)
    given, number = config["attempt"], train.get_context().get_world_rank()
    nodes = _list_nodes(number, given.is_private)
    run, name = RunDir(Path(given.run_dir)), nodes[number]
    try:
        if run_store.read_attempt(run, given.attempt).job != given.driver:
            raise NodeFailed(nodes, number, f"the run directory differs from the driver's: {run.root}; {_SHARED}", True)
    except (OSError, LauncherError) as error:
        raise NodeFailed(nodes, number, f"the run directory is not visible: {error}; {_SHARED}", True) from None
    environment = {**os.environ, **detached_process.python_variables(run.code, os.environ), network.NODE_NAME_VARIABLE: name}
    # Ray sets this to the number of CPUs that the worker requested.
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-u", "-m", _AGENT, given.plan_path, str(given.attempt)]
    # A signal that arrives before the agent listens stays pending.
    with (
        blocked_signals(CANCEL, PREEMPT, signal.SIGTERM),
        open(run.attempt(given.attempt) / f"agent-{number:05d}.log", "ab") as log,
    ):
        agent = subprocess.Popen(
            command,
            env={**environment, **given.variables},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        meeting = collective.broadcast_from_rank_zero(_choose_meeting(nodes, given.interface) if number == 0 else None)
        assert agent.stdin is not None
        with suppress(BrokenPipeError), agent.stdin as orders:
            orders.write(json.dumps({"number": number, "nodes": nodes, **meeting}))
        preempted: set[str] = set()
        if not given.is_private:
            arguments = (agent, run, given.attempt, nodes, number, preempted)
            threading.Thread(target=_forward_preemption, args=arguments, name="preemption", daemon=True).start()
        if code := agent.wait():
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise NodeFailed(nodes, number, f"the agent of {name} {how}", False)
        return sorted(preempted)
    finally:
        agent.kill()
        agent.wait()


def _list_nodes(number: int, is_private: bool) -> tuple[str, ...]:
    """Return the names of the attempt's nodes, in the order of Ray Train's workers: one worker a node, in the order of bundles.

    Raises:
        RuntimeError: if Ray Train has another order.
    """
    import ray
    from ray.util.placement_group import get_current_placement_group, placement_group_table

    if is_private:
        return (os.uname().nodename,)
    placed = placement_group_table(get_current_placement_group())["bundles_to_node_id"]
    ids = [placed[index] for index in sorted(placed)]
    if ids[number] != ray.get_runtime_context().get_node_id():
        raise RuntimeError(f"Ray Train has not numbered its workers in the order of their bundles: worker {number} of {ids}")
    names = {node["NodeID"]: node.get("NodeName") or node["NodeManagerHostname"] for node in ray.nodes()}
    return tuple(names[node_id] for node_id in ids)


def _choose_meeting(nodes: tuple[str, ...], interface: str | None) -> dict[str, Any]:
    """Choose where the agents of all nodes meet on this node, the first.

    Raises:
        NodeFailed: if that is on the internet.
    """
    import ray

    here = network.LOOPBACK
    if len(nodes) > 1:
        here = network.endpoint_of(ray.util.get_node_ip_address(), interface)
        if interface is None and network.is_public(here.address):
            reason = f"the nodes would connect to each other over a public address: {here.address}; set cluster.interface"
            raise NodeFailed(nodes, 0, reason, True)
    return {"address": here.address, "interface": here.interface, "port": network.free_port(here.address)}


def _forward_preemption(
    agent: subprocess.Popen[str], run: RunDir, attempt: int, nodes: tuple[str, ...], number: int, preempted: set[str]
) -> None:
    """Ask the agent to save when Ray is about to take nodes away. All workers have to call this, until Ray Train ends them."""
    from ray import train

    while True:
        # Another worker may hang; the driver's connection may be gone.
        with suppress(Exception):
            taken = train.get_preemption_info()
            if taken is not None and not preempted:
                preempted.update(taken.preempted_node_ids)
                if number == 0:
                    names = ", ".join(nodes[rank] for rank in taken.preempted_ranks)
                    with suppress(OSError):
                        append_event(run, attempt, "alert", f"Ray is about to lose {names}: the run saves")
                agent.send_signal(PREEMPT)
        time.sleep(_PREEMPTION_LOOK_S)
