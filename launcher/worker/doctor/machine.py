"""The machine itself: cores, memory, process limits of this user, and package versions."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import launcher
from launcher.clusters.cgroups import LimitEvents
from launcher.clusters.check_results import WARNING, CheckResult, failure, from_problem, ok, warning
from launcher.config.schema import RunConfig
from launcher.plan.quantities import format_size
from launcher.worker.checks import node_check

# A rank opens a few hundred files: shards, sockets to other ranks, libraries.
_FEW_FILES, _TOO_FEW_FILES = 4096, 1024
# Ranks, their threads, and the workers that build the data cache.
_FEW_PROCESSES = 4096
# Packages whose versions decide whether a run works.
_CORE = ("torch", "deepspeed", "transformers", "accelerate", "tokenizers", "safetensors", "ray", "huggingface-hub", "numpy")
_CONSTRAINTS = "constraints.txt"
# Enough to distinguish two versions of the code.
_DIGEST_CHARS = 8


def check_machine(config: RunConfig) -> Iterator[CheckResult]:
    """Report the cores and the main memory that this job may use."""
    cores, memory = len(os.sched_getaffinity(0)), node_check.available_memory_bytes()
    yield ok(f"{cores} CPU cores, {format_size(memory)} of main memory available")


def check_limits(config: RunConfig) -> Iterator[CheckResult]:
    """Check open files and processes and, where there are adapters for InfiniBand, whether NCCL can use them."""
    yield from _check_files()
    yield from _check_processes()
    if adapters := node_check.list_adapters():
        problems = node_check.adapter_problems()
        yield from (from_problem(problem, WARNING) for problem in problems)
        if not problems:
            yield ok(f"NCCL can use the network adapters {', '.join(adapters)}")


def _check_files() -> Iterator[CheckResult]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        yield ok(f"open files (ulimit -n) {shown}")
        return
    can_raise = hard == resource.RLIM_INFINITY or hard >= _FEW_FILES
    remedy = f"ulimit -n {_FEW_FILES * 4 if hard == resource.RLIM_INFINITY else min(hard, _FEW_FILES * 4)}"
    if not can_raise:
        remedy = "raise `nofile` in /etc/security/limits.conf; docker run takes --ulimit nofile=65536"
    yield (failure if soft < _TOO_FEW_FILES else warning)(f"open files (ulimit -n) are limited to {shown}", remedy)


def _check_processes() -> Iterator[CheckResult]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    pids = LimitEvents.read().num_processes
    limits = [limit for limit in (pids, None if soft == resource.RLIM_INFINITY else soft) if limit is not None]
    if not limits or min(limits) >= _FEW_PROCESSES:
        yield ok(f"processes and threads {f'up to {min(limits):,}' if limits else 'unlimited'}")
        return
    remedy = "raise `nproc` in /etc/security/limits.conf, or pids.max of the container (docker run --pids-limit=-1)"
    yield warning(f"processes and threads (ulimit -u, pids.max) are limited to {min(limits):,}", remedy)


def check_packages(config: RunConfig) -> Iterator[CheckResult]:
    """Compare installed packages with the launcher's requirements and with the tested versions."""
    versions = {name: version for name in _CORE if (version := _version(name)) is not None}
    code, problems = node_check.code_digest(Path(launcher.__file__).resolve().parent)
    yield from map(from_problem, problems)
    own = f"{launcher.__version__} (code {code[:_DIGEST_CHARS]})"
    versions = {"launcher": own, "Python": platform.python_version(), **versions}
    yield ok(", ".join(f"{name} {version}" for name, version in versions.items()), must_match=True)
    unmet = [
        f"{requirement.name} {_version(requirement.name) or 'is not installed'} ({requirement.specifier} is required)"
        for requirement in _requirements()
        if not _is_met(requirement)
    ]
    if unmet:
        yield failure(f"the launcher's requirements are not met: {', '.join(unmet)}", "pip install . in the launcher's checkout")
    constraints = _constraints()
    if constraints is None:
        return
    tested = {canonicalize_name(pin.name): pin for pin in constraints}
    others = [
        f"{name} {version} ({pin.specifier})"
        for name in _CORE
        if (version := _version(name)) is not None
        and (pin := tested.get(canonicalize_name(name))) is not None
        and not pin.specifier.contains(version.partition("+")[0], prereleases=True)
    ]
    if others:
        file = _constraints_file()
        yield warning(f"versions that differ from the tested ones: {', '.join(others)}", f"pip install --constraint {file} .")


def _requirements() -> Iterator[Requirement]:
    """Yield the launcher's requirements in this environment, without extras; nothing if it is not installed."""
    try:
        lines = metadata.requires("launcher") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _constraints_file() -> Path:
    """Return the path of constraints.txt: in the installed package, or beside it in a checkout."""
    package = Path(launcher.__file__).resolve().parent
    inside = package / _CONSTRAINTS
    return inside if inside.is_file() else package.parent / _CONSTRAINTS


def _constraints() -> list[Requirement] | None:
    try:
        lines = _constraints_file().read_text().splitlines()
    except OSError:
        return None
    pins = []
    for line in lines:
        text = line.partition("#")[0].strip()
        try:
            pins += [Requirement(text)] if text else []
        except InvalidRequirement:
            continue
    return pins
