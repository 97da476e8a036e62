"""A node of a Slurm job: where it stands, when its time ends, and whether it is fit to train."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any

import launcher
from launcher.config.slurm import SlurmSection
from launcher.errors import Problem, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker.checks import network, node_check
from launcher.worker.rank_env import NodePlace
from launcher.worker.signals import PREEMPT

# Nodes start within seconds of each other; a prologue, a container or a slow file system may take minutes.
_MEET_DEADLINE_S = 300.0
# Between the end of the ranks and the job's own: srun's end, the records, a requeue.
_CONCLUDE_S = 20.0


def place(plan: LaunchPlan, begun: Attempt, node: int) -> NodePlace:
    """This node's address towards the head, and the head's, where the agents meet.

    Raises:
        RunError: where there is no interface that other nodes reach.
    """
    section = SlurmSection.of(plan.config.cluster)
    if begun.address is None or begun.port is None:
        raise RunError("the attempt names no place where its nodes meet", where="attempt.json")
    if node == 0:
        return NodePlace(node, begun.nodes, begun.address, begun.interface)
    endpoint = network.own_endpoint([begun.address], section.interface)
    return NodePlace(node, begun.nodes, endpoint.address, endpoint.interface)


def end_before(begun: Attempt, plan: LaunchPlan, stop: Callable[[Signals], None]) -> None:
    """Ask for the save when only the lead is left of the job's time, whether or not Slurm's signal arrives."""
    if begun.ends_at is None:
        return
    lead_s = SlurmSection.of(plan.config.cluster).signal_lead_seconds
    timer = threading.Timer(begun.ends_at - lead_s - time.time(), stop, (PREEMPT,))
    timer.daemon = True
    timer.start()


def kill_at(begun: Attempt, plan: LaunchPlan) -> float | None:
    """When ranks that cannot stop must be gone, so that the job concludes before Slurm ends it and nothing runs it again."""
    if begun.ends_at is None:
        return None
    return begun.ends_at - min(_CONCLUDE_S, SlurmSection.of(plan.config.cluster).signal_lead_seconds / 4)


def meet(begun: Attempt, here: NodePlace) -> Any:
    """A store at the head node that all nodes share.

    Raises:
        RunError: where the head node is not reached, or its port is taken.
    """
    from torch.distributed import DistNetworkError, TCPStore

    assert begun.address is not None
    assert begun.port is not None
    if not here.is_head and network.await_reachable(begun.address, begun.port, _MEET_DEADLINE_S) is None:
        raise RunError(
            f"{network.node_name()} does not reach the head node at {begun.address}:{begun.port}",
            where=f"{here.address} on {here.interface}",
            remedy="set cluster.interface to the network that joins the nodes",
        )
    deadline = timedelta(seconds=_MEET_DEADLINE_S)
    try:
        return TCPStore(begun.address, begun.port, None, here.is_head, deadline, wait_for_workers=False)
    except DistNetworkError as error:
        raise RunError("the nodes cannot meet", where=f"{begun.address}:{begun.port}", value=str(error).splitlines()[0]) from None


def check(store: Any, plan: LaunchPlan, run: RunDir, attempt: int, begun: Attempt, here: NodePlace) -> list[Problem]:
    """What is wrong with any node of the job, in words, the same list on all of them; empty where all are fit.

    Raises:
        RunError: where the head node is lost meanwhile.
    """
    if not SlurmSection.of(plan.config.cluster).node_checks:
        return []
    report = node_check.check_node(plan, run, attempt)
    imported = Path(launcher.__file__).resolve()
    if not imported.is_relative_to(run.code.resolve()):
        foreign = Problem(
            "runs another launcher than the one that was submitted",
            where=report.host,
            value=str(imported.parent),
            remedy="take the container's or the environment's own PYTHONPATH away",
        )
        report = replace(report, problems=(*report.problems, foreign))
    return node_check.exchange(store, report, begun.nodes, here.node, _MEET_DEADLINE_S)
