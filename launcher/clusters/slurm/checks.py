"""Checks before a job is submitted: the site can run it, and its folders are on shared storage."""

from __future__ import annotations

import math
import os
import pwd
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.clusters.slurm import site
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.clusters.slurm.site import Gpus, Node, Partition, Site, listed
from launcher.clusters.storage import filesystem_type
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import Problem, SubmitError, did_you_mean
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.plan_checks import CHECKPOINT_GIB_PER_SECOND, SAVE_MARGIN, save_seconds
from launcher.plan.quantities import format_count

# The accounting database may be slow; a submission does not wait for it.
_ACCOUNTING_DEADLINE_S = 5.0
_IN_MEMORY = ("tmpfs", "ramfs")
_KEY_NAMES = {"account": "account", "qos": "QOS"}


@dataclass(frozen=True)
class Association:
    """An account that the user may charge on a cluster, with its QOS; an empty `partition` means all partitions."""

    cluster: str
    account: str
    partition: str
    qos: Sequence[str]


def check(section: SlurmSection, plan: LaunchPlan) -> None:
    """Reject a job that this site cannot run or would never start.

    Raises:
        SubmitError: with all problems, or if Slurm does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "sbatch is not on this machine",
            where="cluster=slurm",
            remedy="submit from a login node of the cluster, or train on this machine with cluster=local",
        )
    own = [*_save_time_problems(section, plan), *_storage_problems(plan)]
    try:
        problems = [*own, *site_problems(section, plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0)]
    except (SlurmError, SubmitError) as error:
        raise SubmitError([*error.problems, *own]) from None
    if problems:
        raise SubmitError(problems)


def site_problems(section: SlurmSection, num_gpus: int) -> list[Problem]:
    """Return why this site cannot run a job with these settings; `num_gpus` per node applies if the settings name none.

    Raises:
        SlurmError: if Slurm does not answer.
        SubmitError: if a partition does not exist.
    """
    with ThreadPoolExecutor(4) as pool:
        site_read, associations = pool.submit(site.read), pool.submit(_associations, section)
        required, excluded = pool.submit(_hosts, section.nodelist), pool.submit(_hosts, section.exclude)
    slurm_site = site_read.result()
    partitions = slurm_site.chosen(section)
    problems = [
        *_account_problems(section, slurm_site, associations.result(), partitions),
        *_hosts_problems(slurm_site, partitions, required.result(), excluded.result()),
    ]
    # Slurm chooses the partition in which the job can start first, so one suitable partition is enough.
    by_partition = [list(_partition_problems(section, num_gpus, partition, excluded.result())) for partition in partitions]
    if all(by_partition):
        problems += [problem for of_partition in by_partition for problem in of_partition]
    return problems


def _hosts(hosts: str | None) -> frozenset[str]:
    """Expand a host list such as node01,node[07-09]; one that Slurm cannot parse is returned unchanged."""
    try:
        return frozenset(slurm("scontrol", "show", "hostnames", hosts).split() or [hosts]) if hosts else frozenset()
    except SlurmError:
        return frozenset([hosts or ""])


def _associations(section: SlurmSection) -> list[Association] | None:
    """Read the accounts that this user may charge; None if the settings name none, or the site has no accounting."""
    if section.account is None and section.qos is None:
        return None
    output_format = ("--noheader", "--parsable2", "format=cluster,account,partition,qos")
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        output = slurm("sacctmgr", "show", "assoc", f"user={user}", *output_format, deadline_s=_ACCOUNTING_DEADLINE_S)
    except (KeyError, SlurmError):
        return None
    rows = (line.split("|") for line in output.splitlines())
    return [Association(cluster, account, partition, qos.split(",")) for cluster, account, partition, qos in rows]


def _save_time_problems(section: SlurmSection, plan: LaunchPlan) -> Iterator[Problem]:
    size_gib, num_nodes = plan.checkpoint_bytes / 2**30, plan.topology.nodes
    save_s = save_seconds(plan)
    if save_s > section.signal_lead_seconds:
        yield Problem(
            f"a checkpoint of {size_gib:.1f} GiB cannot be saved before the time limit: at an assumed "
            f"{CHECKPOINT_GIB_PER_SECOND:g} GiB/s per node, {_count_nodes(num_nodes)} need {save_s} s",
            where="cluster.signal_lead_seconds",
            value=str(section.signal_lead_seconds),
            remedy=f"set it to {math.ceil(SAVE_MARGIN * save_s)}, and cluster.time to much more than that",
        )


def _account_problems(
    section: SlurmSection, slurm_site: Site, associations: list[Association] | None, partitions: Sequence[Partition]
) -> Iterator[Problem]:
    """Check account and QOS if the site enforces them; other sites accept any name."""
    if associations is None or "associations" not in slurm_site.enforced:
        return
    cluster, names = slurm_site.cluster.lower(), ("", *(partition.name for partition in partitions))
    usable = [one for one in associations if one.cluster.lower() == cluster and one.partition in names]
    accounts = sorted({one.account for one in usable})
    account = (section.account or "").lower()
    if account and account not in accounts:
        yield Problem(
            f"you cannot charge the account {section.account}",
            where="cluster.account",
            value=section.account or "",
            remedy=_choose(account, accounts, "yours", "ask the administrators for an account"),
        )
        account = ""
    qos = sorted({name for one in usable if account in ("", one.account) for name in one.qos if name})
    if section.qos and qos and "qos" in slurm_site.enforced and section.qos.lower() not in qos:
        yield Problem(
            f"you cannot use the QOS {section.qos}" + (f" with the account {section.account}" if account else ""),
            where="cluster.qos",
            value=section.qos,
            remedy=_choose(section.qos, qos, "yours", ""),
        )


def _hosts_problems(
    slurm_site: Site, partitions: Sequence[Partition], required: frozenset[str], excluded: frozenset[str]
) -> Iterator[Problem]:
    """Check cluster.nodelist and cluster.exclude."""
    all_nodes = {node.name for partition in slurm_site.partitions for node in partition.nodes}
    reachable = {node.name: node for partition in partitions for node in partition.nodes}
    for key, hosts in (("nodelist", required), ("exclude", excluded)):
        for host in sorted(hosts - all_nodes):
            yield Problem(
                f"there is no node {host}",
                where=f"cluster.{key}",
                value=host,
                remedy=_choose(host, sorted(all_nodes), "the nodes", ""),
            )
    outside = sorted((required & all_nodes) - reachable.keys())
    if outside:
        yield Problem(
            f"these nodes are not in the partition {' or '.join(partition.name for partition in partitions)}",
            where="cluster.nodelist",
            value=",".join(outside),
            remedy=f"choose other nodes, or another cluster.partition; this one has {listed(reachable)}",
        )
    unavailable = [reachable[host] for host in sorted(required & reachable.keys()) if not reachable[host].in_service]
    if unavailable:
        yield Problem(
            "nodes of cluster.nodelist are out of service",
            where="cluster.nodelist",
            value=_states(unavailable),
            remedy="choose other nodes; sinfo -R shows why these are out of service",
        )


def _partition_problems(
    section: SlurmSection, num_gpus: int, partition: Partition, excluded: frozenset[str]
) -> Iterator[Problem]:
    """Check state, time limit, account, QOS and nodes of a partition."""
    where = f"partition {partition.name}"
    if partition.state != "UP":
        yield Problem(
            f"the {where} does not start jobs: it is {partition.state}",
            where="cluster.partition",
            value=partition.name,
            remedy="wait until the administrators open it, or use another partition",
        )
    if partition.max_minutes is not None and section.time_minutes > partition.max_minutes:
        yield Problem(
            f"the time limit of the {where} is {_duration(partition.max_minutes)}",
            where="cluster.time",
            value=section.time,
            remedy=f"set it to {_duration(partition.max_minutes)} or less; a run that needs longer continues in the next job",
        )
    for key, value, allowed, denied in (
        ("account", section.account, partition.accounts, partition.denied_accounts),
        ("qos", section.qos, partition.qos, partition.denied_qos),
    ):
        if value and (value.lower() in denied or (allowed is not None and value.lower() not in allowed)):
            yield Problem(
                f"the {where} does not accept this {_KEY_NAMES[key]}",
                where=f"cluster.{key}",
                value=value,
                remedy=f"choose one of: {listed(allowed)}" if allowed else "use another one, or another cluster.partition",
            )
    yield from _node_problems(section, num_gpus, partition, excluded)


def _node_problems(section: SlurmSection, num_gpus: int, partition: Partition, excluded: frozenset[str]) -> list[Problem]:
    """Check that the partition has enough nodes: at all, with the requested resources, not excluded, and in service."""
    where, nodes, num_needed = f"partition {partition.name}", partition.nodes, section.nodes
    configurations = Counter(str(node) for node in nodes).most_common(5)
    inventory = "; ".join(f"{_count_nodes(count)} with {resources}" for resources, count in configurations) or "no nodes"
    request_less = f"request what {where} has: {inventory}"
    max_nodes = len(nodes) if partition.max_nodes is None else min(len(nodes), partition.max_nodes)
    problems = []
    if num_needed > max_nodes:
        what = f"{where} has {_count_nodes(max_nodes)}"
        if max_nodes < len(nodes):
            what = f"{where} allows at most {_count_nodes(max_nodes)} per job"
        remedy = f"set it to {max_nodes} or less, or use another cluster.partition"
        problems.append(Problem(what, "cluster.nodes", str(num_needed), remedy))
    requests = list(_node_requests(section, num_gpus))
    for key, value, is_met in requests:
        num_fitting = sum(is_met(node) for node in nodes)
        # A partition with too few nodes is reported above.
        if num_fitting < min(num_needed, max_nodes):
            what = f"{where} has {_count_nodes(num_fitting)} with this much; {num_needed} are needed"
            problems.append(Problem(what, key, value, request_less))
    if problems:
        return problems
    fitting = [node for node in nodes if all(is_met(node) for _, _, is_met in requests)]
    allowed = [node for node in fitting if node.name not in excluded]
    available = [node for node in allowed if node.in_service]
    if len(fitting) < num_needed:
        what, remedy = f"{where} has {_count_nodes(len(fitting))} with all requested resources", request_less
    elif len(allowed) < num_needed:
        what = f"without the nodes of cluster.exclude, {where} has {_count_nodes(len(allowed))} for this job"
        remedy = "shorten cluster.exclude"
    elif len(available) < num_needed:
        states = _states([node for node in allowed if not node.in_service])
        what = f"of the {_count_nodes(len(allowed))} of {where} for this job, {len(available) or 'none'} are in service: {states}"
        remedy = "wait until they are back (sinfo -R shows the reasons), use fewer nodes, or use another cluster.partition"
    else:
        return []
    return [Problem(what, "cluster.nodes", str(num_needed), remedy)]


def _node_requests(section: SlurmSection, num_gpus: int) -> Iterator[tuple[str, str, Callable[[Node], bool]]]:
    """Yield each resource that the job requests per node: its key, its value, and a test for whether a node has it."""
    if (cpus := section.cpus_per_task) is not None:
        yield "cluster.cpus_per_task", str(cpus), lambda node: node.cpus >= cpus
    if (memory_mib := site.requested_memory_mib(section)) is not None:
        yield "cluster.mem", str(section.mem), lambda node: node.memory_mib >= memory_mib
    requested = site.requested_gpus(section)
    gpus = requested or Gpus(None, num_gpus)
    if gpus.count:
        key = "ranks_per_node" if requested is None else "gres" if section.gpus_per_node is None else "gpus_per_node"
        value = section.gres if key == "gres" else str(gpus.count)
        yield f"cluster.{key}", value or "", lambda node: site.has_gpus(node, gpus)


def _storage_problems(plan: LaunchPlan) -> Iterator[Problem]:
    """Reject folders in this machine's memory, which no other node can see."""
    folders = [("run directory", "run.root", plan.run_dir)]
    folders += [("data cache", "LAUNCHER_CACHE", folder) for folder in plan.cache_dirs]
    if plan.model.path is not None:
        folders.append(("model", "model.path, LAUNCHER_CACHE or HF_HOME", plan.model.path))
    mounts = Path("/proc/self/mountinfo").read_text()
    for name, keys, folder in folders:
        kind = filesystem_type(Path(folder), mounts)
        if kind in _IN_MEMORY:
            yield Problem(
                f"the {name} is in this machine's memory ({kind}), where no other node can see it",
                where=keys.split(",")[0],
                value=folder,
                remedy=f"move it to storage that all nodes share: set {keys}",
            )


def _choose(name: str, choices: Sequence[str], label: str, otherwise: str) -> str:
    if not choices:
        return otherwise
    return f"{did_you_mean(name, choices)} {label}: {listed(choices)}".strip()


def _count_nodes(count: int) -> str:
    return format_count(count, "node") if count else "no nodes"


def _states(nodes: Sequence[Node]) -> str:
    return listed(f"{node.name} ({node.state})" for node in nodes)


def _duration(minutes: int) -> str:
    days, rest = divmod(minutes, 1440)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"
