"""The partitions and nodes of a Slurm site, as slurmctld reports them, and whether the site can run a job."""

from __future__ import annotations

import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from launcher.clusters.slurm import sbatch
from launcher.clusters.slurm.commands import SlurmError, SlurmUnreachable, slurm, slurm_table
from launcher.config.schema import RunConfig
from launcher.config.sections.slurm import SlurmSection, minutes
from launcher.errors import Problem, SubmitError, did_you_mean
from launcher.plan.checkpoints import CHECKPOINT_GIB_PER_SECOND, SAVE_MARGIN, save_seconds
from launcher.plan.gpu_types import lookup
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.quantities import format_count

_NODE_FIELDS = ("NodeList", "PartitionName", "StateLong", "CPUs", "Memory", "Gres")
# Nodes in other states can run jobs. Marks such as * follow the state.
_OUT_OF_SERVICE = re.compile(r"down|drain|fail|error|unknown|future|inval")
# Settings that a message of sbatch may name.
_NAMED_KEYS = {"account": "cluster.account", "partition": "cluster.partition", "qos": "cluster.additional_parameters.qos"}


@dataclass(frozen=True)
class Gpus:
    """GPUs of one type; `type` is None at sites that do not name types."""

    type: str | None
    count: int

    def __str__(self) -> str:
        return ":".join(filter(None, ("gpu", self.type, str(self.count))))


@dataclass(frozen=True)
class Node:
    """A Slurm node; `state` is sinfo's."""

    name: str
    state: str
    cpus: int
    memory_mib: int
    gpus: tuple[Gpus, ...]

    @property
    def in_service(self) -> bool:
        return _OUT_OF_SERVICE.match(self.state) is None

    def num_gpus(self, kind: str | None = None) -> int:
        """Count the GPUs of the type `kind`, or of all types if it is None."""
        return sum(gpus.count for gpus in self.gpus if kind is None or gpus.type == kind)

    def __str__(self) -> str:
        return f"{self.cpus} CPUs, {self.memory_mib} MiB, {' and '.join(map(str, self.gpus)) or 'no GPU'}"


@dataclass(frozen=True)
class Partition:
    """A partition with its nodes; `time_limit` is as Slurm writes it, such as 1-12:00:00 or UNLIMITED."""

    name: str
    default: bool
    time_limit: str
    nodes: tuple[Node, ...]

    @property
    def max_minutes(self) -> float:
        return math.inf if self.time_limit == "UNLIMITED" else minutes(self.time_limit)

    @property
    def kinds_of_nodes(self) -> str:
        kinds = Counter(str(node) if node.in_service else f"{node}, out of service" for node in self.nodes)
        return "; ".join(f"{format_count(count, 'node')} with {kind}" for kind, count in kinds.most_common(5)) or "no nodes"


def chosen_partitions(section: SlurmSection) -> tuple[Partition, ...]:
    """Return the partitions that the job may run in: those of cluster.partition, or the site's default."""
    by_name = {partition.name: partition for partition in read_partitions()}
    names = [name for name in by_name if by_name[name].default] if section.partition is None else section.partition.split(",")
    unknown = next((name for name in names if name not in by_name), None)
    if not names or unknown:
        what = f"there is no partition {unknown}" if unknown else "this site has no default partition"
        remedy = f"{did_you_mean(unknown or '', list(by_name))} choose one of: {', '.join(by_name)}".strip()
        raise SubmitError(what, where="cluster.partition", value=section.partition or "", remedy=remedy)
    return tuple(by_name[name] for name in names)


def read_partitions() -> tuple[Partition, ...]:
    """Read the site's partitions from slurmctld with concurrent commands."""
    # --all includes partitions that are hidden or closed to this user's groups.
    with ThreadPoolExecutor(2) as pool:
        rows = pool.submit(slurm_table, "sinfo", "--all", "--Node", "--noheader", fields=_NODE_FIELDS)
        partitions = slurm("scontrol", "--all", "--oneliner", "show", "partition")
    nodes_of: dict[str, list[Node]] = {}
    for name, partition, state, cpus, memory, gres in rows.result():
        nodes_of.setdefault(partition, []).append(Node(name, state, int(cpus), int(memory), _parse_gpus(gres)))
    records = [dict(word.partition("=")[::2] for word in line.split()) for line in partitions.splitlines() if "=" in line]
    return tuple(
        Partition(
            name=record["PartitionName"],
            default=record.get("Default") == "YES",
            time_limit=record.get("MaxTime", "UNLIMITED"),
            nodes=tuple(nodes_of.get(record["PartitionName"], ())),
        )
        for record in records
    )


def check_job(plan: LaunchPlan) -> None:
    """Reject a job that this site refuses or would never start."""
    section, problems, save_s = SlurmSection.of(plan.config.cluster), [], save_seconds(plan)
    if save_s > section.signal_lead_seconds:
        problem = (
            f"a checkpoint of {plan.checkpoint_bytes / 2**30:.1f} GiB cannot be saved before the time limit: at an assumed "
            f"{CHECKPOINT_GIB_PER_SECOND:g} GiB/s per node, {format_count(plan.topology.nodes, 'node')} need {save_s} s"
        )
        remedy = f"set it to {math.ceil(SAVE_MARGIN * save_s)}, and cluster.time to much more than that"
        problems.append(Problem(problem, "cluster.signal_lead_seconds", str(section.signal_lead_seconds), remedy))
    try:
        num_gpus = plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0
        problems = [*find_site_problems(plan.config, num_gpus), *problems]
    except (SlurmError, SubmitError) as error:
        raise SubmitError([*error.problems, *problems]) from None
    if problems:
        raise SubmitError(problems)


def find_site_problems(config: RunConfig, num_gpus: int) -> list[Problem]:
    """Return why this site cannot run a job with these settings; `num_gpus` per node applies if the settings name none."""
    section = SlurmSection.of(config.cluster)
    partitions = chosen_partitions(section)
    # Slurm accepts jobs above a partition's limit by default, and never starts them.
    if all(section.time_minutes > one.max_minutes for one in partitions):
        limits = ", ".join(f"{one.time_limit} in {one.name}" for one in partitions)
        remedy = "set it to that or less; a run that needs longer continues in the next job"
        return [Problem(f"the time limit is {limits}", "cluster.time", section.time, remedy)]
    try:
        with sbatch.clean_environment():
            request = sbatch.request_words(config, "launcher-test", num_gpus, section.time_minutes)
            slurm("sbatch", "--test-only", *request, "--wrap", "true")
    except SlurmUnreachable:
        raise
    except SlurmError as error:
        message = error.problems[0].value
        where = next((key for word, key in _NAMED_KEYS.items() if word in message.lower()), "cluster")
        remedy = "; ".join(f"partition {one.name} has {one.kinds_of_nodes}" for one in partitions)
        return [Problem("Slurm refuses the job", where, message, remedy)]
    return []


def gpus_of(section: SlurmSection) -> DeviceFacts:
    """Return the accelerators of one node of the job: the requested ones, or all of the partition's most common GPU node.

    Without GPUs, or with cluster.gpus_per_node=0, return the CPUs of the most common node.
    """
    requested = requested_gpus(section)
    try:
        partitions = chosen_partitions(section)
    except SlurmError as error:
        # With cluster.gpus_per_node, a plan can be made without access to the cluster.
        if requested is None:
            offline = "or set cluster.gpus_per_node to plan without the cluster"
            raise SubmitError(
                replace(problem, remedy=f"{problem.remedy or 'check whether Slurm is running'}, {offline}")
                for problem in error.problems
            ) from None
        partitions = ()
    nodes = [node for partition in partitions for node in partition.nodes]
    wanted = requested or Gpus(None, 1)
    fitting = [node for node in nodes if node.num_gpus(wanted.type) >= wanted.count]
    fitting = fitting or nodes
    candidates = [node for node in fitting if node.in_service] or fitting
    # The most common configuration, and among equals, more GPUs.
    frequency = Counter(str(node) for node in candidates)
    node = max(candidates, key=lambda node: (frequency[str(node)], node.num_gpus(), node.cpus), default=None)
    host_gib = round((requested_memory_mib(section) or node.memory_mib) / 1024, 1) if node else None
    gpus = requested or Gpus(None, node.num_gpus() if node else 0)
    if gpus.count == 0:
        return DeviceFacts(kind="cpu", name="CPU", count=node.cpus if node else 1, host_memory_gib=host_gib)
    name = gpus.type or next((entry.type for entry in node.gpus if entry.type), None) if node else gpus.type
    gpu_type = lookup(name) if name else None
    memory_gib = gpu_type.memory_gib if gpu_type else None
    return DeviceFacts(kind="cuda", name=name or "gpu", count=gpus.count, memory_gib=memory_gib, host_memory_gib=host_gib)


def num_gpus_per_node(config: RunConfig) -> int:
    """Return how many GPUs per node a run with these settings uses; 0 for a run on CPUs."""
    section = SlurmSection.of(config.cluster)
    device = gpus_of(section)
    return (section.ranks_per_node or device.count) if device.kind == "cuda" else 0


def requested_gpus(section: SlurmSection) -> Gpus | None:
    """Return the GPUs per node that the settings request (a count of 0 for none), or None if they do not specify any."""
    if section.gpus_per_node is not None:
        return Gpus(None, section.gpus_per_node)
    return next(iter(_parse_gpus(section.additional_parameters.get("gres", ""))), None)


def requested_memory_mib(section: SlurmSection) -> int | None:
    """Return the option mem in MiB, as sbatch reads it; None if it is unset or 0, which requests all memory of a node."""
    size = re.fullmatch(r"(\d+)([KMGT]?)B?", section.additional_parameters.get("mem", "0"))
    if size is None:
        return None
    number, unit = size.groups()
    kib = int(number) * {"K": 1, "": 1 << 10, "M": 1 << 10, "G": 1 << 20, "T": 1 << 30}[unit]
    return -(-kib // 1024) or None


def _parse_gpus(gres: str) -> tuple[Gpus, ...]:
    """Parse the GPUs of a generic resource list such as `gpu:h100:8(S:0-1),nvme:1`."""
    gpus = []
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *parts = entry.split(":")
        if name == "gpu":
            count = int(parts.pop()) if parts and parts[-1].isdigit() else 1
            gpus.append(Gpus(parts[0] if parts else None, count))
    return tuple(gpus)
