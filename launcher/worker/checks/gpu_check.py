"""Checks a node's GPUs without using them: number, model, memory errors, processes, faults, and the speed of their links.

NVML calls and reads of the kernel log have deadlines, because a hung driver is one of the possible faults.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable

import psutil

from launcher import nvml
from launcher.config.sections.cluster import ClusterSection
from launcher.errors import Problem
from launcher.nvml import GpuInfo, NvmlError
from launcher.plan.gpu_types import lookup
from launcher.train.monitoring.xids import BROKEN

COMMAND_DEADLINE_S = 20.0
# The processes of an attempt that just ended need a while to free their memory.
GRACE_S = 10.0
_PAUSE_S = 0.5

# System services, which may hold memory on any GPU.
_SERVICES = re.compile(r"nvidia-cuda-mps|dcgm|nv-hostengine")
# Users choose the process and file names in other log lines; in the driver's lines, its name follows the time.
_XID_LINE = re.compile(r"(?:\[[^]]*\] *){0,2}(NVRM: Xid \(PCI:([0-9a-fA-F:]+)(?:\.[0-9a-fA-F]+)?(?: GPU-I:\d+)?\): (\d+),.*)")


def check_gpus(needed: int, section: ClusterSection) -> tuple[tuple[str, ...], list[Problem]]:
    """Return the driver's names for the GPUs that this job may use, and their problems; `needed` is one GPU per rank."""
    gpu_type = section.gpu_type
    try:
        gpus = nvml.list_gpus(COMMAND_DEADLINE_S)
    except NvmlError as error:
        problem = Problem(f"the GPUs cannot be used: {error}", remedy="exclude this node and tell the administrators")
        return (), [problem, *_check_kernel_log(None)]
    problems = []
    if len(gpus) < needed:
        value = f"{len(gpus)} found, {needed} needed; CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}"
        remedy = f"{section.gpus_remedy}, or set cluster.ranks_per_node to the number of GPUs"
        problems.append(Problem("there are fewer GPUs than ranks", value=value, remedy=remedy))
    others = sorted({gpu.name for gpu in gpus if gpu_type and lookup(gpu.name) != lookup(gpu_type)})
    if others:
        value = f"{', '.join(others)} found, {gpu_type} planned"
        remedy = f"set cluster.gpu_type to the actual type, or {section.gpu_kind_remedy}"
        problems.append(Problem("the GPUs are not of the planned kind", value=value, remedy=remedy))
    for gpu in gpus:
        if gpu.ecc_errors:
            message = f"a GPU had {gpu.ecc_errors} memory errors that could not be corrected"
            remedy = "exclude this node and ask the administrators to reset the GPU"
            problems.append(Problem(message, value=f"{gpu.name} {gpu.uuid}", remedy=remedy))
    if unready := [gpu for gpu in gpus if gpu.fabric in (nvml.FABRIC_STARTING, nvml.FABRIC_FAILED)]:
        value = _list(unready, lambda gpu: nvml.FABRIC_STATES[gpu.fabric or 0])
        remedy = "restart the fabric manager on the node (systemctl restart nvidia-fabricmanager), or exclude this node"
        problems.append(Problem("the NVLink fabric of GPUs is not ready, and CUDA cannot start without it", "", value, remedy))
    problems += _check_processes()
    # A lost GPU has no entry: if some are missing, any fault in the log may be the reason.
    problems += _check_kernel_log({gpu.bus_id for gpu in gpus} if len(gpus) >= needed else None)
    return tuple(gpu.name for gpu in gpus), problems


def find_slow_gpus() -> list[Problem]:
    """Return the reasons why GPUs that work are slow: PCIe links, clocks, and NVLink; empty if the driver cannot be asked."""
    try:
        gpus = nvml.list_gpus(COMMAND_DEADLINE_S)
    except NvmlError:
        # The check of the GPUs reports this.
        return []
    problems = []
    if few := [gpu for gpu in gpus if gpu.pcie_lanes and gpu.most_pcie_lanes and gpu.pcie_lanes < gpu.most_pcie_lanes]:
        value = _list(few, lambda gpu: f"{gpu.pcie_lanes} of {gpu.most_pcie_lanes} lanes")
        remedy = "ask the administrators to reseat the GPU, or exclude this node"
        problems.append(Problem("a GPU's PCIe link has fewer lanes than the GPU and its slot", "", value, remedy))
    if slowed := [gpu for gpu in gpus if gpu.slowdowns]:
        value = _list(slowed, lambda gpu: " and ".join(gpu.slowdowns))
        remedy = "check the node's cooling and power supply, or exclude this node"
        problems.append(Problem("the clocks of a GPU are lowered before the run uses it", "", value, remedy))
    if weak := [gpu for gpu in gpus if gpu.is_fabric_degraded]:
        remedy = "ask the administrators to check NVLink and its switches, or exclude this node"
        problems.append(Problem("the NVLink fabric of a GPU has less bandwidth than it should", "", _list(weak), remedy))
    return problems


def _list(gpus: Iterable[GpuInfo], describe: Callable[[GpuInfo], str] | None = None) -> str:
    return ", ".join(f"{gpu.name} {gpu.uuid}" + (f": {describe(gpu)}" if describe else "") for gpu in gpus)


def _check_processes() -> list[Problem]:
    """Return a problem for each foreign process that holds GPU memory, such as leftovers of an earlier job."""
    this, deadline = psutil.Process(), time.monotonic() + GRACE_S
    own_pids = {process.pid for process in (this, *this.children(recursive=True))}
    at_first: set[int] | None = None
    while True:
        try:
            processes = nvml.list_processes(COMMAND_DEADLINE_S)
        except NvmlError as error:
            return [Problem(f"the processes on the GPUs cannot be listed: {error}", remedy="exclude this node")]
        others = [each for each in processes if each.pid not in own_pids and not _SERVICES.search(each.name)]
        # A local run does not wait for its check: others that appear meanwhile may be its ranks.
        at_first = {each.pid for each in others} if at_first is None else at_first
        others = [each for each in others if each.pid in at_first]
        if not others or time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE_S)
    return [
        Problem(
            "a process outside this run holds GPU memory",
            value=f"process {each.pid} ({each.name or 'unknown name'}) of {_owner(each.pid)}: "
            f"{'an unknown number of' if each.used_mib is None else each.used_mib} MiB of {each.gpu_uuid}",
            remedy=f"end it on the node with: kill {each.pid}; or exclude this node",
        )
        for each in others
    ]


def _owner(pid: int) -> str:
    try:
        return psutil.Process(pid).username()
    except psutil.Error:
        return "an unknown user"


def _check_kernel_log(buses: set[str] | None) -> list[Problem]:
    """Return the faults since boot of the GPUs at `buses` (None for all GPUs); no faults if the log is unreadable."""
    try:
        # splitlines() would also split at characters that may occur in a name.
        lines = _output("dmesg").split("\n")
    except _CommandError:
        return []
    faults = {}
    for match in filter(None, map(_XID_LINE.match, lines)):
        bus, number = match[2].lower(), int(match[3])
        if number in BROKEN and (buses is None or bus in buses):
            faults[bus, number] = match[1]
    return [
        Problem(
            f"a GPU has a fault, Xid {number}: {BROKEN[number]}",
            value=line,
            remedy="exclude this node, and ask the administrators to reset or replace the GPU and then to clear the kernel's log "
            "(dmesg --clear)",
        )
        for (_, number), line in faults.items()
    ]


class _CommandError(Exception):
    """A command failed, is missing or did not answer; the message says which and why."""


def _output(*argv: str) -> str:
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise _CommandError(f"{argv[0]} cannot be started: {error.strerror}") from None
    try:
        text = process.communicate(timeout=COMMAND_DEADLINE_S)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        # A process that hangs in the driver cannot be killed; waiting for it, as subprocess.run does, would hang too.
        process.kill()
        raise _CommandError(f"{argv[0]} did not answer within {COMMAND_DEADLINE_S:g} s") from None
    if process.returncode:
        last = text.strip().splitlines()[-1:]
        raise _CommandError(f"{argv[0]} failed: {''.join(last) or f'exit code {process.returncode}'}")
    return text
