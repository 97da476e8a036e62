"""What a Slurm site has: its partitions, and the nodes in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.config.slurm import SlurmSection, minutes
from launcher.errors import Problem, SubmitError, did_you_mean
from launcher.plan.gpus import lookup
from launcher.plan.launch_plan import DeviceFacts

_SEPARATOR = "\x1f"
_NODE_FIELDS = ("NodeList", "PartitionName", "StateLong", "CPUs", "Memory", "Gres")
# A node in any other state has jobs, waits for some, or is started when one comes. Marks such as * follow the word.
_OUT_OF_SERVICE = re.compile(r"down|drain|fail|error|unknown|future|inval")


@dataclass(frozen=True)
class Gpus:
    """GPUs of one type; the site need not give types names."""

    type: str | None
    count: int

    def __str__(self) -> str:
        return ":".join(filter(None, ("gpu", self.type, str(self.count))))


@dataclass(frozen=True)
class Node:
    """A node as Slurm has it; `state` is sinfo's word."""

    name: str
    state: str
    cpus: int
    memory_mib: int
    gpus: tuple[Gpus, ...]

    @property
    def in_service(self) -> bool:
        return _OUT_OF_SERVICE.match(self.state) is None

    def num_gpus(self, kind: str | None = None) -> int:
        """GPUs of the type `kind`, of all types where it is None."""
        return sum(gpus.count for gpus in self.gpus if kind is None or gpus.type == kind)

    def __str__(self) -> str:
        return f"{self.cpus} CPUs, {self.memory_mib} MiB, {' and '.join(map(str, self.gpus)) or 'no GPU'}"


@dataclass(frozen=True)
class Partition:
    """A partition with its nodes. A limit is None where there is none, and so are names where all are allowed."""

    name: str
    default: bool
    state: str
    max_minutes: int | None
    max_nodes: int | None
    preempt_mode: str
    grace_seconds: int
    accounts: tuple[str, ...] | None
    denied_accounts: tuple[str, ...]
    qos: tuple[str, ...] | None
    denied_qos: tuple[str, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Site:
    """`enforced` holds what of the accounting a job must have, such as associations and qos."""

    cluster: str
    enforced: frozenset[str]
    partitions: tuple[Partition, ...]

    def chosen(self, section: SlurmSection) -> tuple[Partition, ...]:
        """The partitions that the job may run in: those of cluster.partition, else the default.

        Raises:
            SubmitError: where one does not exist, with those that do.
        """
        by_name = {partition.name: partition for partition in self.partitions}
        names = [name for name in by_name if by_name[name].default] if section.partition is None else section.partition.split(",")
        choices = f"choose among: {listed(by_name)}"
        if not names:
            raise SubmitError(
                "cluster.partition is not set, and this site has no default", where="cluster.partition", remedy=choices
            )
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise SubmitError(
                Problem(
                    f"there is no partition {name}",
                    where="cluster.partition",
                    value=section.partition or "",
                    remedy=f"{did_you_mean(name, list(by_name))} {choices}".strip(),
                )
                for name in unknown
            )
        return tuple(by_name[name] for name in names)


def read() -> Site:
    """Ask slurmctld, all at once.

    Raises:
        SlurmError: where it does not answer.
    """
    columns = ",".join(f"{field}:{_SEPARATOR}" for field in _NODE_FIELDS)
    # --all: partitions that are hidden, or closed to this user's groups, exist as well.
    commands = (
        ("scontrol", "show", "config"),
        ("scontrol", "--all", "--oneliner", "show", "partition"),
        ("sinfo", "--all", "--Node", "--noheader", f"--Format={columns}"),
    )
    with ThreadPoolExecutor(len(commands)) as pool:
        config, partitions, nodes = pool.map(lambda argv: slurm(*argv), commands)
    settings = dict(re.findall(r"^(\w+) *= (.*?) *$", config, re.MULTILINE))
    of_partition = _nodes(nodes)
    records = [dict(word.partition("=")[::2] for word in line.split()) for line in partitions.splitlines() if "=" in line]
    return Site(
        cluster=settings.get("ClusterName", ""),
        enforced=frozenset(settings.get("AccountingStorageEnforce", "").split(",")),
        partitions=tuple(_partition(record, tuple(of_partition.get(record["PartitionName"], ()))) for record in records),
    )


def gpus_of(section: SlurmSection) -> DeviceFacts:
    """The accelerators of one node of the job: those it asks for, else all of the partition's most frequent GPU node.

    Where there are none, or cluster.gpus_per_node is 0, the CPUs of the most frequent node.

    Raises:
        SubmitError: where Slurm does not answer and the settings do not say it, or the partition does not exist.
    """
    asked = gpus_asked(section)
    try:
        partitions = read().chosen(section)
    except SlurmError as error:
        # A plan can be made away from the cluster by who says what its nodes have.
        if asked is None:
            away = "or, to plan away from the cluster, set cluster.gpus_per_node"
            raise SubmitError(
                replace(problem, remedy=f"{problem.remedy or 'see whether Slurm is up'}; {away}") for problem in error.problems
            ) from None
        partitions = ()
    nodes = [node for partition in partitions for node in partition.nodes]
    fitting = [node for node in nodes if fits(node, asked or Gpus(None, 1))]
    node = _most_frequent(fitting or nodes)
    host_gib = round((memory_asked_mib(section) or node.memory_mib) / 1024, 1) if node else None
    gpus = asked or Gpus(None, node.num_gpus() if node else 0)
    if gpus.count == 0:
        return DeviceFacts(kind="cpu", name="CPU", count=node.cpus if node else 1, host_memory_gib=host_gib)
    name = gpus.type or next((of_node.type for of_node in node.gpus if of_node.type), None) if node else gpus.type
    known = lookup(name) if name else None
    memory_gib = known.memory_gib if known else None
    return DeviceFacts(kind="cuda", name=name or "gpu", count=gpus.count, memory_gib=memory_gib, host_memory_gib=host_gib)


def fits(node: Node, gpus: Gpus) -> bool:
    """The node has as many GPUs of that type."""
    return node.num_gpus(gpus.type) >= gpus.count


def gpus_asked(section: SlurmSection) -> Gpus | None:
    """The GPUs that the settings ask of each node; a count of 0 is none, None is left open."""
    if section.gpus_per_node is not None:
        return Gpus(None, section.gpus_per_node)
    return next(iter(_gpus(section.gres or "")), None)


def memory_asked_mib(section: SlurmSection) -> int | None:
    """cluster.mem in MiB, as sbatch reads it; None where it is unset or 0, which is all of a node's."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)B?", section.mem or "0").groups()  # type: ignore[union-attr]
    kib = int(number) * {"K": 1, "": 1 << 10, "M": 1 << 10, "G": 1 << 20, "T": 1 << 30}[unit]
    return -(-kib // 1024) or None


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names with commas between; of many the first few and how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def _most_frequent(nodes: Sequence[Node]) -> Node | None:
    """A node of the configuration that most have, of two the one with more GPUs; nodes in service before others."""
    serving = [node for node in nodes if node.in_service] or nodes
    frequency = Counter(str(node) for node in serving)
    return max(serving, key=lambda node: (frequency[str(node)], node.num_gpus(), node.cpus), default=None)


def _nodes(shown: str) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for line in shown.splitlines():
        name, partition, state, cpus, memory, gres = line.split(_SEPARATOR)[: len(_NODE_FIELDS)]
        found.setdefault(partition, []).append(Node(name, state, int(cpus), int(memory), _gpus(gres)))
    return found


def _gpus(gres: str) -> tuple[Gpus, ...]:
    """The GPUs in a text such as `gpu:h100:8(S:0-1),nvme:1`."""
    found = []
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *parts = entry.split(":")
        if name == "gpu":
            count = int(parts.pop()) if parts and parts[-1].isdigit() else 1
            found.append(Gpus(parts[0] if parts else None, count))
    return tuple(found)


def _partition(record: dict[str, str], nodes: tuple[Node, ...]) -> Partition:
    def limit(key: str, read: Callable[[str], int]) -> int | None:
        value = record.get(key, "UNLIMITED")
        return None if value == "UNLIMITED" else read(value)

    def names(key: str) -> tuple[str, ...] | None:
        value = record.get(key, "ALL")
        return None if value == "ALL" else tuple(value.lower().split(","))

    return Partition(
        name=record["PartitionName"],
        default=record.get("Default") == "YES",
        state=record.get("State", "UP"),
        max_minutes=limit("MaxTime", minutes),
        max_nodes=limit("MaxNodes", int),
        preempt_mode=record.get("PreemptMode", ""),
        grace_seconds=int(record.get("GraceTime", "0")),
        accounts=names("AllowAccounts"),
        denied_accounts=names("DenyAccounts") or (),
        qos=names("AllowQos"),
        denied_qos=names("DenyQos") or (),
        nodes=nodes,
    )
