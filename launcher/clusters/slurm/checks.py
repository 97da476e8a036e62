"""What can be known before a job is submitted: that this site can run it, and that what it needs is where nodes see it."""

from __future__ import annotations

import math
import os
import pwd
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.clusters.slurm import site
from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.clusters.slurm.site import Gpus, Node, Partition, Site, listed
from launcher.config.slurm import SlurmSection
from launcher.errors import Problem, SubmitError, did_you_mean
from launcher.plan.launch_plan import LaunchPlan

# What one node is taken to write to shared storage; parallel file systems do more, plain NFS may do less.
CHECKPOINT_GIB_PER_SECOND = 1.0

# The accounting may be slow where the controller is not; a submission does not wait for it.
_ACCOUNTING_DEADLINE_S = 5.0
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Association:
    """What a user may charge on a cluster: an account, in one partition or (empty) in all, with these QOS."""

    cluster: str
    account: str
    partition: str
    qos: Sequence[str]


def check(section: SlurmSection, plan: LaunchPlan) -> None:
    """Refuse what this site cannot run, or would leave in the queue for ever.

    Raises:
        SubmitError: with everything that is wrong, or where Slurm does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "sbatch is not on this machine",
            where="cluster=slurm",
            remedy="submit from a login node of the cluster, or train on this machine with cluster=local",
        )
    with ThreadPoolExecutor(4) as pool:
        reading, known = pool.submit(site.read), pool.submit(_associations, section)
        required, excluded = pool.submit(_hosts, section.nodelist), pool.submit(_hosts, section.exclude)
    problems = [*_lead_problems(section, plan), *_storage_problems(plan)]
    try:
        here = reading.result()
        partitions = here.chosen(section)
    except (SlurmError, SubmitError) as error:
        raise SubmitError([*error.problems, *problems]) from None
    problems += _account_problems(section, here, known.result(), partitions)
    problems += _hosts_problems(here, partitions, required.result(), excluded.result())
    # Of several partitions Slurm takes the one where the job starts first: one that can run it is enough.
    of_each = [list(_partition_problems(section, plan, partition, excluded.result())) for partition in partitions]
    if all(of_each):
        problems += [problem for found in of_each for problem in found]
    if problems:
        raise SubmitError(problems)


def _hosts(hosts: str | None) -> frozenset[str]:
    """The names in a text such as node01,node[07-09]; one that Slurm cannot read stays as it is."""
    try:
        return frozenset(slurm("scontrol", "show", "hostnames", hosts).split() or [hosts]) if hosts else frozenset()
    except SlurmError:
        return frozenset([hosts or ""])


def _associations(section: SlurmSection) -> list[Association] | None:
    """What this user may charge; None where nothing depends on it or the site has no accounting."""
    if section.account is None and section.qos is None:
        return None
    form = ("--noheader", "--parsable2", "format=cluster,account,partition,qos")
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        shown = slurm("sacctmgr", "show", "assoc", f"user={user}", *form, deadline_s=_ACCOUNTING_DEADLINE_S)
    except (KeyError, SlurmError):
        return None
    rows = (line.split("|") for line in shown.splitlines())
    return [Association(cluster, account, partition, qos.split(",")) for cluster, account, partition, qos in rows]


def _lead_problems(section: SlurmSection, plan: LaunchPlan) -> Iterator[Problem]:
    gib, nodes = plan.checkpoint_bytes / 2**30, plan.topology.nodes
    needed = math.ceil(gib / (CHECKPOINT_GIB_PER_SECOND * nodes))
    if needed > section.signal_lead_seconds:
        yield Problem(
            f"a checkpoint of {gib:.1f} GiB does not fit into the time before the job is ended: at "
            f"{CHECKPOINT_GIB_PER_SECOND:g} GiB/s per node, which is assumed, {_nodes(nodes)} take {needed} s",
            where="cluster.signal_lead_seconds",
            value=str(section.signal_lead_seconds),
            remedy=f"set it to {math.ceil(1.5 * needed)}, and cluster.time to much more than that",
        )


def _account_problems(
    section: SlurmSection, here: Site, known: list[Association] | None, partitions: Sequence[Partition]
) -> Iterator[Problem]:
    """Accounts and QOS count only where the site enforces them: elsewhere Slurm takes any word."""
    names = ("", *(partition.name for partition in partitions))
    if known is None or "associations" not in here.enforced:
        return
    mine = [found for found in known if found.cluster.lower() == here.cluster.lower() and found.partition in names]
    accounts = sorted({found.account for found in mine})
    account = (section.account or "").lower()
    if account and account not in accounts:
        yield Problem(
            f"you cannot charge the account {section.account}",
            where="cluster.account",
            value=section.account or "",
            remedy=_choose(account, accounts, "yours", "ask the administrators for an account"),
        )
        account = ""
    qos = sorted({name for found in mine if account in ("", found.account) for name in found.qos if name})
    if section.qos and qos and "qos" in here.enforced and section.qos.lower() not in qos:
        yield Problem(
            f"you cannot use the QOS {section.qos}" + (f" with the account {section.account}" if account else ""),
            where="cluster.qos",
            value=section.qos,
            remedy=_choose(section.qos, qos, "yours", ""),
        )


def _hosts_problems(
    here: Site, partitions: Sequence[Partition], required: frozenset[str], excluded: frozenset[str]
) -> Iterator[Problem]:
    everywhere = {node.name for partition in here.partitions for node in partition.nodes}
    reachable = {node.name: node for partition in partitions for node in partition.nodes}
    for key, hosts in (("nodelist", required), ("exclude", excluded)):
        for host in sorted(hosts - everywhere):
            yield Problem(
                f"there is no node {host}",
                where=f"cluster.{key}",
                value=host,
                remedy=_choose(host, sorted(everywhere), "the nodes", ""),
            )
    outside = sorted((required & everywhere) - reachable.keys())
    if outside:
        yield Problem(
            f"these nodes are not in the partition {' or '.join(partition.name for partition in partitions)}",
            where="cluster.nodelist",
            value=",".join(outside),
            remedy=f"name others, or another cluster.partition; it has {listed(reachable)}",
        )
    lost = [reachable[host] for host in sorted(required & reachable.keys()) if not reachable[host].in_service]
    if lost:
        yield Problem(
            "nodes that must be used are out of service",
            where="cluster.nodelist",
            value=_states(lost),
            remedy="name others; sinfo -R says why these are out",
        )


def _partition_problems(
    section: SlurmSection, plan: LaunchPlan, partition: Partition, excluded: frozenset[str]
) -> Iterator[Problem]:
    """What keeps the job out of this partition."""
    where = f"partition {partition.name}"
    if partition.state != "UP":
        yield Problem(
            f"the {where} takes no jobs or starts none: it is {partition.state}",
            where="cluster.partition",
            value=partition.name,
            remedy="wait until the administrators open it, or use another",
        )
    if partition.max_minutes is not None and section.time_minutes > partition.max_minutes:
        yield Problem(
            f"the {where} allows jobs of at most {_duration(partition.max_minutes)}",
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
                f"the {where} is closed to this {key}",
                where=f"cluster.{key}",
                value=value,
                remedy=f"choose among: {listed(allowed)}" if allowed else "use another one, or another cluster.partition",
            )
    yield from _node_problems(section, plan, partition, excluded)


def _node_problems(section: SlurmSection, plan: LaunchPlan, partition: Partition, excluded: frozenset[str]) -> list[Problem]:
    """Too few nodes at all; too few that are as the job asks; else too few that are not left out and in service."""
    where, nodes, needed = f"partition {partition.name}", partition.nodes, section.nodes
    kinds = Counter(str(node) for node in nodes).most_common(5)
    has = f"ask for what {where} has: " + ("; ".join(f"{_nodes(count)} with {kind}" for kind, count in kinds) or "no nodes")
    at_most = len(nodes) if partition.max_nodes is None else min(len(nodes), partition.max_nodes)
    found = []
    if needed > at_most:
        limit = f"{where} allows a job" if at_most < len(nodes) else f"{where} has"
        remedy = f"set it to {at_most} or less, or use another cluster.partition"
        found.append(Problem(f"{limit} {_nodes(at_most)}", "cluster.nodes", str(needed), remedy))
    asked = list(_asked(section, plan))
    for key, value, test in asked:
        num_fitting = sum(test(node) for node in nodes)
        # That there are too few nodes is told already.
        if num_fitting < min(needed, at_most):
            found.append(Problem(f"{where} has {_nodes(num_fitting)} with as much; {needed} are needed", key, value, has))
    if found:
        return found
    fitting = [node for node in nodes if all(test(node) for _, _, test in asked)]
    left = [node for node in fitting if node.name not in excluded]
    serving = [node for node in left if node.in_service]
    if len(fitting) < needed:
        what, remedy = f"{where} has {_nodes(len(fitting))} with all that is asked of a node", has
    elif len(left) < needed:
        what, remedy = f"without the excluded ones, {where} has {_nodes(len(left))} for this job", "shorten cluster.exclude"
    elif len(serving) < needed:
        out = _states([node for node in left if not node.in_service])
        what = f"of the {_nodes(len(left))} of {where} for this job, {len(serving) or 'none'} can be used now: {out}"
        remedy = "wait until they are back (sinfo -R says why they are out), use fewer nodes, or another cluster.partition"
    else:
        return []
    return [Problem(what, "cluster.nodes", str(needed), remedy)]


def _asked(section: SlurmSection, plan: LaunchPlan) -> Iterator[tuple[str, str, Callable[[Node], bool]]]:
    """What is asked of each node: key, value and test."""
    if (cpus := section.cpus_per_task) is not None:
        yield "cluster.cpus_per_task", str(cpus), lambda node: node.cpus >= cpus
    if (memory := site.memory_asked_mib(section)) is not None:
        yield "cluster.mem", str(section.mem), lambda node: node.memory_mib >= memory
    asked = site.gpus_asked(section)
    gpus = asked or Gpus(None, plan.topology.ranks_per_node if plan.topology.device == "cuda" else 0)
    if gpus.count:
        key = "ranks_per_node" if asked is None else "gres" if section.gpus_per_node is None else "gpus_per_node"
        value = section.gres if key == "gres" else str(gpus.count)
        yield f"cluster.{key}", value or "", lambda node: site.fits(node, gpus)


def _storage_problems(plan: LaunchPlan) -> Iterator[Problem]:
    """What is certain to be on this machine alone: file systems that live in its memory."""
    folders = [("run directory", "run.root", plan.run_dir)]
    if plan.data is not None:
        folders.append(("data cache", "LAUNCHER_CACHE", plan.data.cache_dir))
    if plan.model.path is not None:
        folders.append(("model", "model.path, LAUNCHER_CACHE or HF_HOME", plan.model.path))
    mounts = Path("/proc/self/mountinfo").read_text()
    for what, keys, folder in folders:
        kind = filesystem(Path(folder), mounts)
        if kind in _IN_MEMORY:
            yield Problem(
                f"the {what} is in this machine's memory ({kind}), where no other machine sees it",
                where=keys.split(",")[0],
                value=folder,
                remedy=f"put it on storage that all nodes share: set {keys}",
            )


def filesystem(path: Path, mountinfo: str) -> str:
    """The type of the file system that holds `path`, which need not exist, from the text of /proc/self/mountinfo.

    See proc_pid_mountinfo(5): the mount point is the fifth field, the type follows the field that is a hyphen.
    """
    resolved = path.resolve()
    found = (Path("/"), "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        # Blanks and the like are written in octal.
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        # Of two on one point the later hides the earlier.
        if resolved.is_relative_to(point) and len(point.parts) >= len(found[0].parts):
            found = (point, after.split()[0])
    return found[1]


def _choose(word: str, choices: Sequence[str], whose: str, otherwise: str) -> str:
    if not choices:
        return otherwise
    return f"{did_you_mean(word, choices)} {whose}: {listed(choices)}".strip()


def _nodes(number: int) -> str:
    return f"{number or 'no'} node{'s' * (number != 1)}"


def _states(nodes: Sequence[Node]) -> str:
    return listed(f"{node.name} ({node.state})" for node in nodes)


def _duration(minutes: int) -> str:
    days, rest = divmod(minutes, 1440)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"
