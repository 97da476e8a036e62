"""A run's checkpoints: their size, how and how long they are written, and whether they fit on disk. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.config.sections.train import DeepSpeedSection
from launcher.errors import Problem
from launcher.plan.launch_plan import LaunchPlan, Memory, Saving, Topology
from launcher.plan.optimizers import Optimizer
from launcher.plan.quantities import format_count, format_size

# Share of a node's main memory that the run and copies of its states may take. The rest is for the data loader, the libraries,
# and the page cache that checkpoints are written through.
_USABLE_HOST_SHARE = 0.8
# Assumed write speed of one node to shared storage: parallel file systems are faster, plain NFS may be slower. The margin covers
# the step in progress, which ends before the save.
CHECKPOINT_GIB_PER_SECOND = 1.0
SAVE_MARGIN = 1.5
# Number of tokens whose logits a final checkpoint holds, to verify an export (launcher.train.checkpointer).
REFERENCE_TOKENS = 64
# File headers, the state of the loader and of the random generators, the manifest.
_SMALL_FILES_BYTES = 256 * 1024


def checkpoint_bytes(num_params: int, optimizer: Optimizer) -> int:
    """Return the bytes of one checkpoint over all ranks: fp32 weights and optimizer states."""
    return num_params * optimizer.bytes_per_param


def plan_saving(
    num_params: int,
    asynchronous: bool,
    optimizer: Optimizer,
    deepspeed: DeepSpeedSection,
    memory: Memory,
    topology: Topology,
    host_gib: float | None,
) -> Saving:
    """Decide whether checkpoints are written in the background, which needs a copy of each rank's states in main memory.

    `host_gib` is the main memory of a node; None if unknown.
    """
    if not asynchronous:
        return Saving(background=False, host_gib_per_node=0.0)
    copies, note = checkpoint_bytes(num_params, optimizer) / topology.nodes / 2**30, ""
    if "nvme" in (deepspeed.offload_optimizer, deepspeed.offload_params):
        note = "states on NVMe cannot be read while training uses them, so training waits while a checkpoint is written"
    elif host_gib is not None and memory.host_per_node_gib + copies > _USABLE_HOST_SHARE * host_gib:
        note = (
            f"training waits while a checkpoint is written: a copy of the states takes {copies:.1f} GiB of main memory per node, "
            f"which has {host_gib:.0f} GiB, of which the run uses {memory.host_per_node_gib:.1f} GiB"
        )
    return Saving(background=not note, host_gib_per_node=0.0 if note else round(copies, 3), note=note)


def save_seconds(plan: LaunchPlan) -> int:
    """Return the assumed seconds that writing one checkpoint takes."""
    return math.ceil(plan.checkpoint_bytes / 2**30 / (CHECKPOINT_GIB_PER_SECOND * plan.topology.nodes))


def warn_of_short_saves(plan: LaunchPlan) -> Iterator[str]:
    """Yield a warning for each limit of the cluster settings that is shorter than a save may take."""
    cluster = plan.config.cluster
    limits = {"cluster.stop_grace_seconds": cluster.stop_grace_seconds}
    if cluster.save_lead_s is not None:
        limits[cluster.save_lead_setting] = cluster.save_lead_s
    gib, nodes = plan.checkpoint_bytes / 2**30, plan.topology.nodes
    save_s = save_seconds(plan)
    needed_s = math.ceil(SAVE_MARGIN * save_s)
    for key, seconds in limits.items():
        # A checkpoint that takes a second is written within any limit.
        if seconds < needed_s and save_s > 1:
            size = f"{gib:,.0f} GiB at an assumed {CHECKPOINT_GIB_PER_SECOND:g} GiB/s per node need {save_s} s"
            yield (
                f"{key}={seconds:g} is less than a save may take: {size} on {format_count(nodes, 'node')}, and the step in "
                f"progress ends first: set {key}={needed_s}"
            )


def checkpoints_at_once(plan: LaunchPlan) -> int:
    """Return the largest number of checkpoints on disk at a time: those that are kept, and the one being written."""
    checkpoint, max_steps = plan.config.checkpoint, plan.batch.max_steps
    num_kept = checkpoint.keep_last + checkpoint.keep_best
    if max_steps is None:
        return num_kept + 1
    if checkpoint.keep_every:
        num_kept += max_steps // checkpoint.keep_every
    num_saves = -(-max_steps // checkpoint.save_every) if checkpoint.save_every else 1
    return min(num_kept + 1, num_saves)


def needed_bytes(plan: LaunchPlan, count: int = 1) -> int:
    """Return the bytes that `count` checkpoints take on disk, including the last checkpoint of the run.

    Each holds states and small files; the last one also holds the reference logits that verify an export.
    """
    logit_bytes = 4 if plan.config.model.dtype == "fp32" else 2
    return count * (plan.checkpoint_bytes + _SMALL_FILES_BYTES) + REFERENCE_TOKENS * plan.model.vocab_size * logit_bytes


def find_room_problem(plan: LaunchPlan, available: int) -> Problem | None:
    """Return the problem if not even one checkpoint fits; None if one does."""
    needed = needed_bytes(plan)
    if available >= needed:
        return None
    return Problem(
        "the disk of the run directory has no room for a single checkpoint",
        where=f"run.root, {plan.run_dir}",
        value=f"needed {format_size(needed)}, available {format_size(available)}",
        remedy="free space on this disk, or put run.root on a larger one",
    )


def describe_low_room(plan: LaunchPlan, available: int, present: int) -> str | None:
    """Return a note if fewer checkpoints fit than will be kept; None if all fit. `present` of them exist already."""
    count = max(1, checkpoints_at_once(plan) - present)
    needed = needed_bytes(plan, count)
    if available >= needed:
        return None
    more = format_count(count, "more checkpoint" if present else "checkpoint")
    fewer = "lower checkpoint.keep_last, " if plan.config.checkpoint.keep_last > 1 else ""
    return (
        f"the disk of the run directory has {format_size(available)} free and needs {format_size(needed)} for {more}: "
        f"free space, {fewer}or move run.root"
    )
