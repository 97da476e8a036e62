"""What DeepSpeed compiles with, and the optional kernels: whether they can really be imported."""

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
from launcher.worker.doctor.python_process import run_python
from launcher.worker.doctor.torch_build import read_torch_build

_COMMAND_S = 30.0
_IMPORT_S = 180.0
_CUDA_DEFAULT = Path("/usr/local/cuda")
_NVCC_RELEASE = re.compile(r"release (\d+)\.(\d+)")

# By the value of model.attention: the package, and what ranks import of it.
_FLASH_ATTENTION = {
    "flash_attention_2": ("flash-attn", "from flash_attn import flash_attn_func, flash_attn_varlen_func"),
    "flash_attention_3": ("flash-attn-3", "from flash_attn_interface import flash_attn_func, flash_attn_varlen_func"),
    "flash_attention_4": ("flash-attn-4", "from flash_attn.cute import flash_attn_func, flash_attn_varlen_func"),
}
_LIGER = ("liger-kernel", "from liger_kernel.transformers import _apply_liger_kernel_to_instance")


def check_compiler(config: RunConfig) -> Iterator[CheckResult]:
    """Check the programs with which DeepSpeed compiles CPU Adam and asynchronous I/O: g++, ninja, and nvcc beside GPUs.

    Only offloading needs them: a missing one is a failure where the settings offload, and else a warning.
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
    if may_use_gpus():
        yield from _check_nvcc(offloads, needed)


def _check_nvcc(offloads: bool, needed: str) -> Iterator[CheckResult]:
    """Compare nvcc with torch's CUDA, as DeepSpeed does: it refuses to compile with another major version."""
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
        yield report(f"{nvcc} does not say its version; {needed}", install)
    elif wanted and release[1] != wanted.partition(".")[0]:
        seen = f"{nvcc} is of CUDA {release[1]}.{release[2]} and torch is built for CUDA {wanted}; {needed}"
        yield report(seen, install)
    else:
        yield ok(f"{nvcc} of CUDA {release[1]}.{release[2]}")


def check_flash_attention(config: RunConfig) -> Iterator[CheckResult]:
    """Import flash-attn if it is installed: a build for another torch fails only then."""
    attention = config.model.attention
    package, statement = _FLASH_ATTENTION.get(attention, _FLASH_ATTENTION["flash_attention_2"])
    asked = f"model.attention={attention}" if attention in _FLASH_ATTENTION else ""
    yield from _check_import(package, statement, asked, bool(asked), "model.attention=auto")


def check_liger(config: RunConfig) -> Iterator[CheckResult]:
    """Import Liger's kernels if they are installed."""
    is_used = config.model.liger is True
    yield from _check_import(*_LIGER, "model.liger=true" if is_used else "", is_used, "model.liger=false")


def _check_import(package: str, statement: str, asked: str, is_used: bool, without: str) -> Iterator[CheckResult]:
    """Import a package in another process; `asked` is the setting that names it, `without` the one that does without it."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        if asked:
            seen, remedy = (
                f"{package} is not installed, and the run asks for it: {asked}",
                f"pip install {package}, or set {without}",
            )
            yield failure(seen, remedy)
        elif may_use_gpus():
            yield ok(f"{package} is not installed; runs train without it", must_match=True)
        return
    finished = run_python(["-c", statement], _IMPORT_S)
    if not finished.reason:
        yield ok(f"{package} {version} can be imported", must_match=True)
        return
    remedy = f"build it for this torch: pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation {package}"
    seen = f"{package} {version} cannot be imported: {finished.reason}"
    yield (failure if is_used else warning)(seen, f"{remedy}; or set {without}, and pip uninstall {package}")


def _first_line(*command: str) -> str:
    return next(iter(_run(*command).splitlines()), "")


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
