"""Called by benchmarks/gpu_wheels.sh: find the requirements that an image lacks, and collect their wheels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

REPO = Path(__file__).resolve().parents[1]
# The image provides torch and its CUDA packages; the benchmarks need neither Ray nor W&B.
_IN_THE_IMAGE = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
_NOT_NEEDED = ("ray", "wandb", "wandb-workspaces")
_FOR_TESTS = ("pytest", "pytest-timeout", "hypothesis")
_TO_COMPARE = ("trl", "datasets", "liger-kernel")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main(image: str, folder: str, python_version: str) -> None:
    target = python_version or ".".join(map(str, sys.version_info[:2]))
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    installed = read_freeze(Path(image).read_text(encoding="utf-8"))
    without = {canonicalize_name(name) for name in (*_NOT_NEEDED, *os.environ.get("WITHOUT", "").split())}
    collected: set[str] = set()
    due = list(first_requirements(os.environ))
    while due:
        needed = {
            canonicalize_name(requirement.name): requirement
            for requirement in lacking(due, installed, without)
            if canonicalize_name(requirement.name) not in collected
        }
        collected |= needed.keys()
        wheels = [fetch(requirement, out, target) for requirement in needed.values()]
        due = [requirement for wheel in wheels for requirement in requirements_of(wheel, target)]
    total = sum(wheel.stat().st_size for wheel in out.rglob("*.whl"))
    print(f"{len(collected)} packages, {total / 2**20:.0f} MiB in {out}")


def read_freeze(text: str) -> dict[str, str]:
    """Return the versions in the output of `pip freeze` or `pip list --format=freeze`; empty if a line has none."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (re.split(r"==|\s+@\s+", line, maxsplit=1) for line in lines if line and not line.startswith(("#", "-")))
    return {canonicalize_name(name.strip()): (rest[0] if rest else "") for name, *rest in pairs}


def first_requirements(environment: os._Environ[str] | dict[str, str]) -> Iterator[Requirement]:
    """Yield the requirements of the launcher, its GPU tests and the benchmarks."""
    with open(REPO / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extra = {Requirement(one).name: one for group in project["optional-dependencies"].values() for one in group}
    names = [*_FOR_TESTS, *(_TO_COMPARE if environment.get("COMPARE") else ()), *environment.get("PACKAGES", "").split()]
    for text in (*project["dependencies"], *(extra.get(name, name) for name in names)):
        yield Requirement(text)


def lacking(requirements: Iterable[Requirement], installed: dict[str, str], without: set[str]) -> Iterator[Requirement]:
    """Yield the requirements that the image does not satisfy.

    Raises:
        SystemExit: if the image's torch is too old.
    """
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name in without or is_satisfied(requirement, installed.get(name)):
            continue
        if _IN_THE_IMAGE.fullmatch(name):
            if name == "torch":
                raise SystemExit(f"the image has torch {installed.get(name, 'not at all')}, and {requirement} is needed")
            continue
        yield requirement


def is_satisfied(requirement: Requirement, version: str | None) -> bool:
    """Return whether an installed version suffices; custom builds such as 2.9.0a0+git count as their release."""
    if version is None:
        return False
    try:
        release = Version(version).base_version
    except InvalidVersion:
        return True
    return requirement.specifier.contains(release, prereleases=True)


def fetch(requirement: Requirement, out: Path, target: str) -> Path:
    """Download the wheel of a requirement, or build it if there is none; return its path."""
    print(f"{requirement}", flush=True)
    before = set(out.glob("*.whl"))
    shared = ["--no-deps", "--quiet", "--disable-pip-version-check", "--constraint", str(REPO / "constraints.txt")]
    wanted = f"{requirement.name}{requirement.specifier}"
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    binary = ["--only-binary=:all:", "--python-version", target, *platforms, "--dest", str(out)]
    command = [sys.executable, "-m", "pip"]
    if subprocess.run([*command, "download", *shared, *binary, wanted], capture_output=True).returncode:
        # Build source distributions without compiled parts: DeepSpeed compiles its ops when they are used.
        variables = {**os.environ, "DS_BUILD_OPS": "0"}
        subprocess.run([*command, "wheel", *shared, "--wheel-dir", str(out), wanted], check=True, env=variables)
    added = [*(set(out.glob("*.whl")) - before), *out.glob(f"{canonicalize_name(requirement.name).replace('-', '_')}-*.whl")]
    if not added:
        raise SystemExit(f"pip has left no wheel of {wanted} in {out}")
    return added[0]


def requirements_of(wheel: Path, target: str) -> Iterator[Requirement]:
    """Yield the requirements of a wheel on the target machine, without its extras."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(files.read(name).decode("utf-8"))
    environment = {**default_environment(), "python_version": target, "python_full_version": f"{target}.0", "extra": ""}
    for text in metadata.get_all("Requires-Dist") or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


if __name__ == "__main__":
    main(*sys.argv[1:4])
