"""Checks of a node beside its GPUs: memory, limits, network adapters, versions, compilers, kernels, and the folders of a run.

Every file that the checks write is removed again. Checks whose imports may crash or hang run in separate Python processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

import launcher
from launcher.clusters.check_results import NO_ROOM, SHARED_FILE_VARIABLE, CheckResult, failure, ok, warning
from launcher.clusters.preflight import existing_folder
from launcher.config.schema import RunConfig
from launcher.errors import describe_exit
from launcher.hardware import available_bytes, is_full, missing_build_tools
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
# Containers get 64 MiB by default, which is too little for NCCL to connect a node's GPUs.
_SHARED_MEMORY_BYTES, _SHARED_MEMORY_OF_GPUS_BYTES = 64 << 20, 1 << 30
# Adapters for InfiniBand, RoCE and EFA: in the kernel, which a container sees too, and the devices, which it may lack.
ADAPTERS, ADAPTER_DEVICES = Path("/sys/class/infiniband"), Path("/dev/infiniband")
_PACKAGES = (
    *("torch", "deepspeed", "transformers", "accelerate", "tokenizers", "numpy", "safetensors", "liger-kernel"),
    *("huggingface-hub", "ray", "flash-attn", "flash-attn-3", "flash-attn-4"),
)
# Enough to distinguish two versions of the code.
_DIGEST_CHARS = 8
_IMPORT_S = 180.0
# For each kernel: the setting that requests it, and what ranks import.
_KERNELS = {
    "flash-attn": ("model.attention=flash_attention_2", "from flash_attn import flash_attn_func, flash_attn_varlen_func"),
    "flash-attn-3": ("model.attention=flash_attention_3", "from flash_attn_interface import flash_attn_func"),
    "flash-attn-4": ("model.attention=flash_attention_4", "from flash_attn.cute import flash_attn_func"),
    "liger-kernel": ("model.liger=True", "from liger_kernel.transformers import _apply_liger_kernel_to_instance"),
}
_CHUNK_BYTES = 4 << 20
# Enough to measure a speed; the check before a start writes one.
_NUM_CHUNKS = 32
_CHECKPOINT_MARGIN = 1.2
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 20 << 30, 1 << 30
_SHARED_REMEDY = "set run.root to a folder on storage that all nodes share"


@dataclass(frozen=True)
class CheckedNode:
    """A machine and what it shall train: `device` is cuda or cpu, with `num_ranks` ranks.

    `plan` and `attempt` are those of the run that is about to start; None and 0 if the settings are checked without a run.
    """

    config: RunConfig
    device: str
    num_ranks: int
    plan: LaunchPlan | None = None
    attempt: int = 0

    @property
    def run(self) -> RunDir:
        """The run that is about to start."""
        assert self.plan is not None
        return RunDir(Path(self.plan.run_dir))


def run_python(arguments: Sequence[str], deadline_s: float, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Run `python ARGUMENTS`; returns the last line of its output, and why it failed, empty if it did not.

    It imports nothing from the working directory, has a temporary folder of its own, because other users can put compiled code
    into the shared one, and is killed with its children at the deadline.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-doctor-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**environ, "TMPDIR": folder},
        )
        try:
            output, errors = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            kill_children(process.pid)
            process.kill()
            return "", f"it did not end within {deadline_s:.0f} s"
    if process.returncode < 0:
        return "", f"it {describe_exit(process.returncode)}"
    if process.returncode:
        return "", ([f"exit code {process.returncode}", *filter(str.strip, errors.splitlines())])[-1].strip()
    return (["", *output.strip().splitlines()])[-1], ""


def kill_children(pid: int) -> None:
    """Kill all processes that a process started, without waiting: one that hangs in the kernel does not end."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()


def check_memory(node: CheckedNode) -> Iterator[CheckResult]:
    """Compare the main memory that this job may use with what the plan offloads to it."""
    available = available_bytes()
    needed_gib = node.plan.memory.host_per_node_gib if node.plan is not None else 0.0
    if available / 2**30 < needed_gib:
        seen = f"there is too little main memory for the offloaded states: {format_size(available)} available, "
        remedy = f"{node.config.cluster.memory_remedy}, offload less, or use more nodes"
        yield failure(f"{seen}{needed_gib:.1f} GiB needed", remedy)
    else:
        yield ok(f"{len(os.sched_getaffinity(0))} CPU cores, {format_size(available)} of main memory available")


def check_shared_memory(node: CheckedNode) -> Iterator[CheckResult]:
    """Check /dev/shm, through which the ranks of a node communicate."""
    least = _SHARED_MEMORY_OF_GPUS_BYTES if node.device == "cuda" and node.num_ranks > 1 else _SHARED_MEMORY_BYTES
    usage = shutil.disk_usage(SHARED_MEMORY)
    shown = f"{format_size(usage.free)} of {format_size(usage.total)} free"
    if usage.free < least:
        seen = "the ranks of a node have too little shared memory to communicate"
        remedy = "remove stale files there, or give the container more (--shm-size, or an emptyDir of medium Memory)"
        yield failure(f"{seen}: {SHARED_MEMORY}: {shown}, {format_size(least)} needed", remedy)
    else:
        yield ok(shown)


def check_adapters(node: CheckedNode) -> Iterator[CheckResult]:
    """Check whether NCCL can use the adapters for InfiniBand, RoCE or EFA, if there are any."""
    try:
        adapters = ", ".join(sorted(adapter.name for adapter in ADAPTERS.iterdir()))
    except OSError:
        return
    if adapters and not any(ADAPTER_DEVICES.glob("uverbs*")):
        remedy = "pass them to the container: docker run takes --device=/dev/infiniband, Kubernetes a resource such as rdma/ib"
        yield warning(f"the network adapters cannot be opened here, so NCCL uses TCP: {adapters}", remedy)


def check_packages(node: CheckedNode) -> Iterator[CheckResult]:
    """Report the versions that must be the same on all nodes: the run's code, Python, and the packages that compute."""
    code = node.run.code if node.plan is not None else Path(launcher.__file__).resolve().parent
    digest = hashlib.blake2b()
    for file in sorted(code.rglob("*.py")):
        for part in (str(file.relative_to(code)).encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    versions = {"launcher": launcher.__version__, "code": digest.hexdigest()[:_DIGEST_CHARS], "Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    yield ok(", ".join(f"{name} {version}" for name, version in versions.items()), must_match=True)


def check_build_tools(node: CheckedNode) -> Iterator[CheckResult]:
    """Look for the compilers that torch.compile and Liger need; DeepSpeed names those of its offloading itself."""
    section = node.config.model
    uses_liger = section.liger is True and node.device == "cuda"
    settings = [*(["model.compile=true"] if section.compile else []), *(["model.liger=true"] if uses_liger else [])]
    for problem in missing_build_tools(node.device) if settings else ():
        yield failure(f"{problem.message}, for {' and '.join(settings)}: {problem.value}", problem.remedy)


def check_kernels(node: CheckedNode) -> Iterator[CheckResult]:
    """Import the optional kernels that are installed or requested: a build for another torch fails only on import."""
    model = node.config.model
    requested = (f"model.attention={model.attention}", f"model.liger={model.liger}")
    for package, (setting, statement) in _KERNELS.items():
        result = failure if setting in requested else warning
        remedy = f"build it for this torch: pip install --force-reinstall --no-deps --no-build-isolation {package}"
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            if setting in requested:
                yield failure(f"{package} is not installed, and the run asks for it: {setting}", f"pip install {package}")
            continue
        _, problem = run_python(["-c", statement], _IMPORT_S)
        if problem:
            yield result(f"{package} {version} cannot be used: {problem}", remedy)
        else:
            yield ok(f"{package} {version} can be imported", must_match=True)


def check_run_storage(node: CheckedNode) -> Iterator[CheckResult]:
    """Check that this node sees the same folder as the others, and write, sync, rename and lock a file there."""
    if node.plan is not None:
        root, folder = node.run.root, node.run.attempt(node.attempt)
        if not os.access(root, os.R_OK | os.X_OK):
            yield failure(f"the run directory is not visible: {root}", _SHARED_REMEDY)
            return
        if not (folder / "attempt.json").is_file():
            seen = f"the run directory differs from that of the other nodes: it lacks the attempt: {folder}"
            yield failure(seen, _SHARED_REMEDY)
            return
    else:
        root = Path(node.config.run.root).expanduser().absolute()
        shared, _, content = os.environ.get(SHARED_FILE_VARIABLE, "").rpartition("=")
        folder = Path(shared).parent if shared else existing_folder(root)
        if shared and (not os.access(shared, os.R_OK) or Path(shared).read_text() != content):
            seen = f"{root} is not the folder that the submitting machine sees: a file written there is not here"
            yield failure(seen, _SHARED_REMEDY)
            return
    try:
        with tempfile.TemporaryDirectory(prefix=".launcher-check-", dir=folder) as scratch:
            yield from _exercise_storage(Path(scratch), root, 1 if node.plan is not None else _NUM_CHUNKS)
    except OSError as error:
        seen = f"{NO_ROOM if is_full(error) else 'the run directory cannot be written'}: {error.strerror}: {folder}"
        yield failure(seen, "check its permissions, its quota and that it is mounted for writing; or set run.root")
        return
    free = shutil.disk_usage(folder).free
    needed = int(_CHECKPOINT_MARGIN * node.plan.checkpoint_bytes) if node.plan is not None else _TOO_LITTLE_BYTES
    remedy = "free space on it, or set run.root to another disk"
    if free < needed:
        yield failure(f"{NO_ROOM} for a checkpoint: {root}: {format_size(free)} free, {format_size(needed)} needed", remedy)
    elif node.plan is None and free < _LITTLE_BYTES:
        yield warning(f"{format_size(free)} free beside the runs, which is little", remedy)
    else:
        yield ok(f"{format_size(free)} free beside the runs")


def _exercise_storage(folder: Path, root: Path, num_chunks: int) -> Iterator[CheckResult]:
    """Perform the file operations of a checkpoint."""
    file, chunk = folder / "shard", os.urandom(_CHUNK_BYTES)
    started = time.perf_counter()
    with open(file, "xb", buffering=0) as opened:
        for _ in range(num_chunks):
            opened.write(chunk)
        os.fsync(opened.fileno())
    write_s, renamed = time.perf_counter() - started, folder / "committed"
    os.replace(file, renamed)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"
    yield ok(f"{root} on {kind}: writes {_CHUNK_BYTES * num_chunks / write_s / 1e6:,.0f} MB/s")
    remedy = "mount the storage with file locks (NFS: without nolock; Lustre: with flock), or set run.root to another folder"
    with open(renamed, "r+b") as first, open(renamed, "r+b") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError as error:
            yield failure(f"files cannot be locked: {error.strerror}", remedy)
            return
    yield failure("file locks have no effect: a locked file could be locked again", remedy)


def check_inputs(node: CheckedNode) -> Iterator[CheckResult]:
    """Check that this node sees the data cache, the model and the tokenizer of the run."""
    plan = node.plan
    if plan is None:
        return
    inputs = (
        *(("a data cache", folder, "meta.json") for folder in plan.cache_dirs),
        ("the model", plan.model.path, "config.json"),
        ("the tokenizer", plan.model.tokenizer_path, "."),
    )
    for subject, folder, file in inputs:
        if folder and not os.access(Path(folder, file), os.R_OK):
            remedy = "put it on storage that all nodes share: LAUNCHER_CACHE, or HF_HOME for a model of the Hub, on every node"
            yield failure(f"{subject} is not visible: {folder}", remedy)
