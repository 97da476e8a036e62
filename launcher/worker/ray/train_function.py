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
from launcher.errors import SubmitError, describe_exit
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event
from launcher.worker.signals import CANCEL, PREEMPT

_AGENT = "launcher.worker.ray.agent"
_SHARED = "set run.root to a folder on storage that all nodes share"
_LOOK_S = 2.0


@dataclass(frozen=True)
class AttemptArguments:
    """What the driver passes to the nodes of an attempt. `variables` are those of the ranks, without secrets."""

    plan_path: str
    attempt: int
    interface: str | None
    variables: dict[str, str]


def resize_request(run: RunDir, attempt: int) -> Path:
    """The driver's request to save and end an attempt, because the next one can have more nodes."""
    return run.attempt(attempt) / "resize"


def agent_log(run: RunDir, attempt: int, number: int) -> Path:
    """The output of a node's agent; agent.log is the driver's."""
    return run.attempt(attempt) / f"agent-{number:05d}.log"


class NodeFailed(Exception):
    """Ends the attempt: on node `number` of `nodes` the agent ended without a record."""

    def __init__(self, nodes: tuple[str, ...], number: int, reason: str) -> None:
        super().__init__(nodes, number, reason)
        self.nodes, self.number, self.reason = nodes, number, reason


class NodeUnfit(NodeFailed):
    """Ends the attempt: no agent can start on the node."""


def run_agent(config: dict[str, AttemptArguments]) -> list[str]:
    """Run this node's agent to its end; returns the ids of the nodes that Ray is about to take away."""
    from ray import train
    from ray.train import collective

    os.umask(0o077)
    given, number = config["attempt"], train.get_context().get_world_rank()
    run, nodes = RunDir.of_plan(Path(given.plan_path)), _list_nodes(number)
    environment = {
        **os.environ,
        **detached_process.python_variables(run.code, os.environ),
        network.NODE_NAME_VARIABLE: nodes[number],
    }
    # Ray sets this to the number of CPUs that the worker requested.
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-u", "-m", _AGENT, given.plan_path, str(given.attempt)]
    try:
        # A signal that arrives before the agent listens stays pending.
        with blocked_signals(CANCEL, PREEMPT, signal.SIGTERM), open(agent_log(run, given.attempt, number), "ab") as log:
            agent = subprocess.Popen(
                command,
                env={**environment, **given.variables},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
    except OSError as error:
        raise NodeUnfit(nodes, number, f"the run directory is not visible: {error}; {_SHARED}") from None
    try:
        meeting = collective.broadcast_from_rank_zero(_choose_meeting(nodes, given.interface) if number == 0 else None)
        assert agent.stdin is not None
        with suppress(BrokenPipeError), agent.stdin as orders:
            orders.write(json.dumps({"number": number, "nodes": nodes, **meeting}))
        taken: set[str] = set()
        arguments = (agent, run, given.attempt, nodes, number, taken)
        threading.Thread(target=_forward_requests, args=arguments, name="requests", daemon=True).start()
        if code := agent.wait():
            raise NodeFailed(nodes, number, f"the agent of {nodes[number]} {describe_exit(code)}")
        return sorted(taken)
    finally:
        agent.kill()
        agent.wait()


def _list_nodes(number: int) -> tuple[str, ...]:
    """Return the names of the attempt's nodes, in the order of Ray Train's workers: one a node, in the order of bundles."""
    import ray
    from ray.util.placement_group import get_current_placement_group, placement_group_table

    placed = placement_group_table(get_current_placement_group())["bundles_to_node_id"]
    ids = [placed[index] for index in sorted(placed)]
    if ids[number] != ray.get_runtime_context().get_node_id():
        raise RuntimeError(f"Ray Train has not numbered its workers in the order of their bundles: worker {number} of {ids}")
    names = {node["NodeID"]: node.get("NodeName") or node["NodeManagerHostname"] for node in ray.nodes()}
    return tuple(names[node_id] for node_id in ids)


def _choose_meeting(nodes: tuple[str, ...], interface: str | None) -> dict[str, Any]:
    """Choose where the agents of all nodes meet on this node, the first."""
    import ray

    here = network.LOOPBACK
    if len(nodes) > 1:
        try:
            here = network.require_private(network.endpoint_of(ray.util.get_node_ip_address(), interface), interface)
        except SubmitError as error:
            raise NodeUnfit(nodes, 0, f"{error.problems[0].message}; set cluster.interface") from None
    return here.choose_meeting()


def _forward_requests(
    agent: subprocess.Popen[str], run: RunDir, attempt: int, nodes: tuple[str, ...], number: int, taken: set[str]
) -> None:
    """Ask the agent to save when Ray is about to take nodes away, or when the driver requests another number of nodes.

    All workers have to call this, until Ray Train ends them.
    """
    from ray import train

    is_asked = False
    while True:
        # Another worker may hang; the driver's connection or storage may be gone.
        with suppress(Exception):
            info = train.get_preemption_info()
            if info is not None and not taken:
                taken.update(info.preempted_node_ids)
                if number == 0:
                    names = ", ".join(nodes[rank] for rank in info.preempted_ranks)
                    append_event(run, attempt, "alert", f"Ray is about to lose {names}: the run saves")
            if not is_asked and (taken or resize_request(run, attempt).is_file()):
                agent.send_signal(PREEMPT)
                is_asked = True
        time.sleep(_LOOK_S)
