"""DeepSpeed's compilers, and the optional kernels: checks that they can actually be imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launcher.clusters.check_results import CheckResult, failure, ok, warning
from launcher.config.schema import RunConfig
from launcher.hardware import may_use_gpus
from launcher.train.kernels.build_tools import missing_build_tools
from launcher.worker.doctor.python_process import run_python
from launcher.worker.doctor.torch_build import read_torch_build

_COMMAND_S = 30.0
_IMPORT_S = 180.0
_CUDA_DEFAULT = Path("/usr/local/cuda")
_NVCC_RELEASE = re.compile(r"release (\d+)\.(\d+)")

# For each value of model.attention: the package, and what ranks import from it.
_FLASH_ATTENTION = {
    "flash_attention_2": ("flash-attn", "from flash_attn import flash_attn_func, flash_attn_varlen_func"),
    "flash_attention_3": ("flash-attn-3", "from flash_attn_interface import flash_attn_func, flash_attn_varlen_func"),
    "flash_attention_4": ("flash-attn-4", "from flash_attn.cute import flash_attn_func, flash_attn_varlen_func"),
}
_LIGER = "liger-kernel"
_IMPORT_LIGER = "from liger_kernel.transformers import _apply_liger_kernel_to_instance"
_TRY_LIGER = (
    "import torch; from launcher.train.kernels.liger import try_kernels; "
    "try_kernels('llama', torch.device('cuda'), torch.float32)"
)


def check_compiler(config: RunConfig) -> Iterator[CheckResult]:
    """Check the programs with which DeepSpeed compiles CPU Adam and asynchronous I/O: g++, ninja, and, with GPUs, nvcc.

    Only offloading needs them: a missing one is a failure if the settings offload, otherwise a warning. Also check what Liger and
    torch.compile build kernels with: a failure if the settings request them, a warning if Liger is installed.
    """
    section = config.deepspeed
    offloads = (section.offload_optimizer, section.offload_params) != ("none", "none")
    missing = failure if offloads else warning
    needed = "deepspeed.offload_* needs it" if offloads else "only offloading (deepspeed=zero3_offload) needs it"
    compiler = os.environ.get("CXX") or "c++"
    versions = {}
    for name, commands, remedy in (
        ("C++ compiler", (compiler, "g++"), "apt-get install g++"),
        ("ninja", ("ninja",), "pip install ninja, and activate the environment so that it is in PATH"),
    ):
        command = next(filter(shutil.which, commands), None)
        version = "" if command is None else _first_line(command, "--version")
        if version:
            versions[name] = version if name == "C++ compiler" else f"ninja {version}"
        else:
            yield missing(f"no {name} is found; {needed}", remedy)
    if versions:
        yield ok("; ".join(versions.values()))
    yield from _check_build_tools(config)
    if may_use_gpus():
        yield from _check_nvcc(offloads, needed)


def _check_build_tools(config: RunConfig) -> Iterator[CheckResult]:
    device, section = "cuda" if may_use_gpus() else "cpu", config.model
    asked = ["model.compile=true"] if section.compile else []
    if device == "cuda" and section.liger is True:
        asked.append("model.liger=true")
    if not asked and not (device == "cuda" and section.liger == "auto" and _version(_LIGER)):
        return
    needed = " and ".join(asked) or "Liger's kernels (model.liger=auto, else runs train without them)"
    problems = missing_build_tools(device)
    for problem in problems:
        seen = f"{problem.message}: {problem.value}; needed for {needed}"
        yield (failure if asked else warning)(seen, problem.remedy)
    if not problems:
        yield ok(f"a compiler and Python's headers are found, for {needed}")


def _check_nvcc(offloads: bool, needed: str) -> Iterator[CheckResult]:
    """Compare nvcc with torch's CUDA, as DeepSpeed does: it refuses to compile with a different major version."""
    build = read_torch_build()
    wanted = "" if isinstance(build, str) else build.cuda
    report = failure if offloads else warning
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None and not home:
        nvcc = shutil.which("nvcc", path=str(_CUDA_DEFAULT / "bin"))
    where = f"CUDA_HOME={home}" if home else "CUDA_HOME is not set"
    install = f"install the CUDA toolkit {wanted} and export CUDA_HOME=/usr/local/cuda-{wanted}"
    if nvcc is None:
        yield report(f"no nvcc is found ({where}); {needed}", install)
        return
    release = _NVCC_RELEASE.search(_run(nvcc, "--version"))
    if release is None:
        yield report(f"{nvcc} does not report its version; {needed}", install)
    elif wanted and release[1] != wanted.partition(".")[0]:
        seen = f"{nvcc} belongs to CUDA {release[1]}.{release[2]}, and torch is built for CUDA {wanted}; {needed}"
        yield report(seen, install)
    else:
        yield ok(f"{nvcc} of CUDA {release[1]}.{release[2]}")


def check_flash_attention(config: RunConfig) -> Iterator[CheckResult]:
    """Import the FlashAttention that the settings request, otherwise each one that is installed, as ranks do before they choose.

    A build for another torch fails only on import.
    """
    attention = config.model.attention
    asked = f"model.attention={attention}" if attention in _FLASH_ATTENTION else ""
    installed = [name for name, (package, _) in _FLASH_ATTENTION.items() if _version(package)]
    for name in [attention] if asked else installed or ["flash_attention_2"]:
        package, statement = _FLASH_ATTENTION[name]
        remedy = f"build it for this torch: pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation {package}"
        yield from _try(package, statement, ("can be imported", "cannot be imported"), asked, remedy, "model.attention=auto")


def check_liger(config: RunConfig) -> Iterator[CheckResult]:
    """Run Liger's kernels, if installed, as the ranks do when they try them."""
    asked = "model.liger=true" if config.model.liger is True else ""
    remedy = "; ".join(problem.remedy for problem in missing_build_tools("cuda")) or f"pip install --upgrade {_LIGER}"
    if may_use_gpus():
        statement, outcomes = _TRY_LIGER, ("computes on this machine's GPU", "cannot be used")
    else:
        statement, outcomes = _IMPORT_LIGER, ("can be imported", "cannot be imported")
    yield from _try(_LIGER, statement, outcomes, asked, remedy, "model.liger=false")


def _try(package: str, statement: str, outcomes: tuple[str, str], asked: str, remedy: str, without: str) -> Iterator[CheckResult]:
    """Run a statement with an optional package in a separate process.

    `asked` is the setting that requests the package, `without` the one that avoids it; `outcomes` are the messages for success
    and failure.
    """
    version = _version(package)
    if not version:
        if asked:
            seen, install = (
                f"{package} is not installed, and the run asks for it: {asked}",
                f"pip install {package}, or set {without}",
            )
            yield failure(seen, install)
        elif may_use_gpus():
            yield ok(f"{package} is not installed; runs train without it", must_match=True)
        return
    finished = run_python(["-c", statement], _IMPORT_S)
    works, fails = outcomes
    if not finished.reason:
        yield ok(f"{package} {version} {works}", must_match=True)
        return
    seen = f"{package} {version} {fails}: {finished.reason}"
    yield (failure if asked else warning)(seen, f"{remedy}; or set {without}, and pip uninstall {package}")


def _version(package: str) -> str:
    """Return the version of a package, empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _first_line(*command: str) -> str:
    return next(iter(_run(*command).splitlines()), "")


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
