"""Checks an allocation's nodes before the model loads, and reports all problems at once.

Every node checks itself and publishes a report. Every node reads all reports, so that all reach the same verdict and can name
a node that does not answer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import psutil

import launcher
from launcher.clusters.network import node_name
from launcher.errors import Problem, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event
from launcher.train.kernels.build_tools import missing_build_tools
from launcher.worker.checks import gpu_check

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SHARED_MEMORY_BYTES = 64 << 20
# Containers get 64 MiB by default, which is too little for NCCL to connect a node's GPUs.
SHARED_MEMORY_OF_GPUS_BYTES = 1 << 30
# Adapters for InfiniBand, RoCE and EFA: in the kernel, which a container sees too, and the devices, which it may lack.
ADAPTERS, ADAPTER_DEVICES = Path("/sys/class/infiniband"), Path("/dev/infiniband")
OWN_STATUS = Path("/proc/self/status")
_CAP_IPC_LOCK = 14
OWN_CGROUPS = Path("/proc/self/cgroup")
# The cgroup v2 hierarchy names no controllers; https://man7.org/linux/man-pages/man7/cgroups.7.html
CGROUP_MEMORY = {
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}
_PACKAGES = (
    *("torch", "deepspeed", "transformers", "accelerate", "tokenizers", "numpy", "safetensors", "liger-kernel"),
    *("huggingface-hub", "ray", "flash-attn", "flash-attn-3", "flash-attn-4"),
)
_CHECKPOINT_MARGIN = 1.2
# Problems with this prefix concern the disk that all nodes share, whichever node reports them.
NO_ROOM = "the disk of the run directory has no room"
_GIB = 2**30
# A published report can be read in one round trip; a timeout of zero would wait forever.
_SHORTEST_WAIT_S = 0.1


@dataclass(frozen=True)
class NodeReport:
    """A node's report. `code` is a digest of the run's code, `gpus` the driver's names, `memory_gib` the available memory."""

    host: str
    code: str
    packages: dict[str, str]
    python: str
    gpus: tuple[str, ...]
    memory_gib: float
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NodeReport:
        problems = tuple(Problem(**problem) for problem in value["problems"])
        return cls(**{**value, "gpus": tuple(value["gpus"]), "problems": problems})


class Store(Protocol):
    """The subset of torch.distributed.Store that is used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


def check_node(plan: LaunchPlan, run: RunDir, attempt: int, num_ranks: int | None = None) -> NodeReport:
    """Check this node for `num_ranks` ranks; None means the plan's ranks per node.

    Each problem's `where` is only the node's name.
    """
    memory_gib, num_ranks = available_memory_bytes() / _GIB, num_ranks or plan.topology.ranks_per_node
    code, problems = code_digest(run.code)
    problems += _check_run_directory(run, attempt)
    problems += _check_inputs(plan)
    problems += _check_space(plan, run, memory_gib, num_ranks)
    problems += _check_kernels(plan)
    gpus: tuple[str, ...] = ()
    if plan.topology.device == "cuda":
        gpus, of_gpus = gpu_check.check_gpus(num_ranks, plan.config.cluster)
        problems += of_gpus
        _report_weaknesses(plan, run, attempt)
    host = node_name()
    return NodeReport(
        host=host,
        code=code,
        packages=_packages(),
        python=platform.python_version(),
        gpus=gpus,
        memory_gib=round(memory_gib, 1),
        problems=tuple(replace(problem, where=host) for problem in problems),
    )


def _report_weaknesses(plan: LaunchPlan, run: RunDir, attempt: int) -> None:
    """Send an alert about what makes this node slow, but not unfit: all ranks wait for the slowest GPU and network."""
    of_network = adapter_problems() if plan.topology.nodes > 1 else []
    _send_alerts([*gpu_check.find_slow_gpus(), *of_network], run, attempt)


def report_gpu_findings(plan: LaunchPlan, run: RunDir, attempt: int) -> None:
    """Send an alert about everything that the check finds about this machine's GPUs and its shared memory; refuse nothing.

    For runs on this machine alone: they have no other node, and a person may share a GPU with a process of their own, or stand in
    another type for an unknown GPU. The check runs beside the imports of the ranks, so no rank waits for the driver.
    """
    num_ranks = plan.topology.ranks_per_node
    # The last check waits for processes that are ending; meanwhile ranks may start and slow their GPUs.
    _send_alerts([*shared_memory_problems("cuda", num_ranks), *gpu_check.find_slow_gpus()], run, attempt)
    _send_alerts(gpu_check.check_gpus(num_ranks, plan.config.cluster)[1], run, attempt)


def _send_alerts(problems: Sequence[Problem], run: RunDir, attempt: int) -> None:
    for problem in problems:
        value = f" ({problem.value})" if problem.value else ""
        # Other checks report a run directory that cannot be written.
        with contextlib.suppress(OSError):
            append_event(run, attempt, "alert", f"{node_name()}: {problem.message}{value}: {problem.remedy}")


def list_adapters() -> list[str]:
    """Return the names of this node's adapters for InfiniBand, RoCE or EFA."""
    try:
        return sorted(adapter.name for adapter in ADAPTERS.iterdir())
    except OSError:
        return []


def adapter_problems() -> list[Problem]:
    """Return what keeps NCCL from using this node's adapters; empty if it has none."""
    adapters, problems = list_adapters(), list[Problem]()
    if not adapters:
        return []
    if not any(ADAPTER_DEVICES.glob("uverbs*")):
        message = "the network adapters cannot be opened here, so NCCL uses TCP"
        remedy = "pass them to the container: docker run takes --device=/dev/infiniband, Kubernetes a resource such as rdma/ib"
        problems.append(Problem(message, value=", ".join(adapters), remedy=remedy))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and not _may_lock_memory():
        message = "locked memory is limited, so NCCL may fail to use the network adapters"
        remedy = "set `* - memlock unlimited` in /etc/security/limits.conf, for Slurm also LimitMEMLOCK=infinity in "
        remedy += "slurmd.service, for Kubernetes in containerd.service; docker run takes --ulimit memlock=-1"
        problems.append(Problem(message, value=f"ulimit -l is {locked // 1024} KiB", remedy=remedy))
    return problems


def _may_lock_memory() -> bool:
    """Return whether the limit on locked memory does not apply to this process, which has the capability CAP_IPC_LOCK."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = OWN_STATUS.read_text().splitlines()
        effective = next(line.partition(":")[2] for line in lines if line.startswith("CapEff:"))
        return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)
    return False


def differences(own: NodeReport, head: NodeReport) -> list[Problem]:
    """Return what makes `own` unfit to train with the head node: different code, packages, Python or GPUs."""
    problems = []

    def compare(subject: str, here: str, there: str, remedy: str) -> None:
        if here != there:
            value = f"{own.host}: {here or 'none'}; {head.host}: {there or 'none'}"
            problems.append(Problem(f"{subject} differs from the head node's", where=own.host, value=value, remedy=remedy))

    compare("the code of the run", own.code, head.code, "put run.root on storage that all nodes share")
    same = "start all nodes from one environment or container on shared storage"
    for name in sorted(own.packages.keys() | head.packages.keys()):
        compare(f"the version of {name}", own.packages.get(name, ""), head.packages.get(name, ""), same)
    compare("the version of Python", own.python, head.python, same)
    here, there = (", ".join(sorted(set(report.gpus))) for report in (own, head))
    compare("the GPU model", here, there, "train on nodes of one kind")
    return problems


def exchange(
    store: Store, report: NodeReport, hosts: Sequence[str], node: int, deadline_s: float, prefix: str = "node-check"
) -> list[Problem]:
    """Publish this node's report, read all others, and return the problems of all nodes in the order of `hosts`.

    `node` is this node's index in `hosts`; `prefix` keeps the keys of rounds apart. Node 0, with which the others are compared,
    returns last, so it may host the store.

    Raises:
        RunError: if the connection to the store is lost.
    """
    deadline = time.monotonic() + deadline_s
    try:
        store.set(f"{prefix}/{node}", json.dumps(report.to_json()))
        reported = [index for index in range(len(hosts)) if _await_key(store, f"{prefix}/{index}", deadline)]
        reports = {index: NodeReport.from_json(json.loads(store.get(f"{prefix}/{index}"))) for index in reported}
        store.set(f"{prefix}/{node}/done", "")
        if node == 0:
            for index in reported:
                _await_key(store, f"{prefix}/{index}/done", deadline)
    except RuntimeError as error:
        raise RunError(
            "the connection to the head node broke while the nodes were checked",
            where=report.host,
            value=str(error).splitlines()[0],
            remedy=f"check whether {hosts[0]} still runs; the network between the nodes may be unstable",
        ) from None
    problems: list[Problem] = []
    for index, host in enumerate(hosts):
        if index not in reports:
            remedy = f"exclude the node with cluster.exclude={host}, or look at its log"
            problems.append(Problem(f"the node did not report within {deadline_s:g} s", where=host, remedy=remedy))
            continue
        problems += reports[index].problems
        if 0 in reports:
            problems += differences(reports[index], reports[0])
    return problems


def _await_key(store: Store, key: str, deadline: float) -> bool:
    from torch.distributed import DistStoreError

    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), _SHORTEST_WAIT_S)))
    except DistStoreError:
        return False
    return True


def code_digest(folder: Path) -> tuple[str, list[Problem]]:
    """Return a digest of the names and contents of all Python files under a folder, and a problem if one is unreadable."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(folder.rglob("*.py")):
            for part in (str(file.relative_to(folder)).encode(), file.read_bytes()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
    except OSError as error:
        problem = Problem(f"the code of the run cannot be read: {error.strerror}", value=str(error.filename))
        return "", [problem]
    return digest.hexdigest(), []


def _packages() -> dict[str, str]:
    versions = {"launcher": launcher.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _check_run_directory(run: RunDir, attempt: int) -> list[Problem]:
    """Check that this node sees the attempt's folder and can write into it."""
    remedy = "set run.root to a folder on storage that all nodes share"
    folder = run.attempt(attempt)
    if not os.access(run.root, os.R_OK | os.X_OK):
        return [Problem("the run directory is not visible", value=str(run.root), remedy=remedy)]
    if not (folder / "attempt.json").is_file():
        message = "the run directory differs from that of the other nodes: it lacks the attempt"
        return [Problem(message, value=str(folder), remedy=remedy)]
    probe, content = folder / f".probe-{node_name()}-{os.getpid()}", os.urandom(64)
    try:
        with open(probe, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        intact = probe.read_bytes() == content
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message = f"{NO_ROOM if full else 'the run directory cannot be written'}: {error.strerror}"
        return [Problem(message, value=str(folder), remedy="check its permissions, its quota and that it is mounted for writing")]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return (
        []
        if intact
        else [Problem("the run directory returned different content from what was written", value=str(folder), remedy=remedy)]
    )


def _shared_model_remedy(folder: str | None) -> str:
    # A folder in the Hub's cache is named after the repository.
    if any(part.startswith("models--") for part in Path(folder or "").parts):
        return "set HF_HOME to a folder on shared storage on every node, including the one where you type the command"
    return "put it on storage that all nodes share, with LAUNCHER_CACHE there if it is a part of the launcher's cache"


def _check_inputs(plan: LaunchPlan) -> list[Problem]:
    inputs = (
        *(("a data cache", folder, "meta.json", "set LAUNCHER_CACHE to shared storage") for folder in plan.cache_dirs),
        ("the model", plan.model.path, "config.json", _shared_model_remedy(plan.model.path)),
        ("the tokenizer", plan.model.tokenizer_path, ".", _shared_model_remedy(plan.model.tokenizer_path)),
    )
    return [
        Problem(f"{subject} is not visible", value=folder, remedy=remedy)
        for subject, folder, file, remedy in inputs
        if folder and not os.access(Path(folder, file), os.R_OK)
    ]


def _check_space(plan: LaunchPlan, run: RunDir, memory_gib: float, num_ranks: int) -> list[Problem]:
    """Check the space for a checkpoint on disk, offloaded states in main memory, and NCCL and gloo in /dev/shm."""
    problems = []
    needed, free = int(_CHECKPOINT_MARGIN * plan.checkpoint_bytes), _free_bytes(run.root)
    if free is not None and free < needed:
        message = f"{NO_ROOM} for a checkpoint"
        value = f"{run.root}: {free / _GIB:.1f} GiB free, {needed / _GIB:.1f} GiB needed"
        problems.append(Problem(message, value=value, remedy="free space on it, or set run.root to another disk"))
    if memory_gib < plan.memory.host_per_node_gib:
        value = f"{memory_gib:.1f} GiB available, {plan.memory.host_per_node_gib:.1f} GiB needed"
        remedy = f"{plan.config.cluster.memory_remedy}, offload less, or use more nodes"
        problems.append(Problem("there is too little main memory for the offloaded states", "", value, remedy))
    return [*problems, *shared_memory_problems(plan.topology.device, num_ranks)]


def _check_kernels(plan: LaunchPlan) -> list[Problem]:
    """Check the requirements of kernels that the settings request; the ranks try kernels that `auto` chooses."""
    asked = {"model.compile": plan.config.model.compile, "model.liger": plan.liger and plan.config.model.liger is True}
    settings = [setting for setting, is_asked in asked.items() if is_asked]
    problems = []
    if settings:
        needed, without = (" and ".join(f"{setting}={value}" for setting in settings) for value in ("true", "false"))
        problems += [
            replace(problem, message=f"{problem.message}, for {needed}", remedy=f"{problem.remedy}, or set {without}")
            for problem in missing_build_tools(plan.topology.device)
        ]
    if asked["model.liger"] and importlib.util.find_spec("liger_kernel") is None:
        remedy = "pip install 'launcher[gpu]', or set model.liger=auto"
        problems.append(Problem("Liger is not installed", value="model.liger=true", remedy=remedy))
    return problems


def shared_memory_problems(device: str, num_ranks: int) -> list[Problem]:
    """Return a problem if /dev/shm is too small for `num_ranks` ranks of this node on `device` (cuda or cpu)."""
    connects_gpus = device == "cuda" and num_ranks > 1
    shared, least = _free_bytes(SHARED_MEMORY), SHARED_MEMORY_OF_GPUS_BYTES if connects_gpus else SHARED_MEMORY_BYTES
    if shared is not None and shared >= least:
        return []
    message = "the ranks of a node have too little shared memory to communicate"
    free_space = "missing" if shared is None else f"{shared >> 20} MiB free, {least >> 20} MiB needed"
    remedy = "remove stale files there, or give the container more (--shm-size, or an emptyDir of medium Memory)"
    return [Problem(message, value=f"{SHARED_MEMORY}: {free_space}", remedy=remedy)]


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def available_memory_bytes() -> int:
    """Return the available main memory in bytes, limited by this process's control groups."""
    limits = [psutil.virtual_memory().available]
    for line in OWN_CGROUPS.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in CGROUP_MEMORY:
            continue
        folder, file = CGROUP_MEMORY[controllers]
        for level in (Path(group), *Path(group).parents):
            # `max` is not a number, the root has no limit, and a container may not see the levels above it.
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / level.relative_to("/") / file).read_text()))
    return min(limits)
