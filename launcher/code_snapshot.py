"""The copy of the package in a run directory: queued and resumed jobs run the code that was submitted."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path

import xxhash

import launcher
from launcher import atomic_files
from launcher.plan.run_dir import SCHEMA_VERSION, RunDir

# The package to copy.
_PACKAGE = Path(launcher.__file__).resolve().parent
# In the code's folder: which plans this code reads.
_PLAN_SCHEMA = "plan_schema_version"


def create(run: RunDir) -> None:
    """Copy the package into a run directory that has no code yet.

    The copy includes the bytecode, so that nodes need not compile the package again.
    """
    _copy_package(run.code)


def is_current(run: RunDir) -> bool:
    """Return True if the code of the run reads the plans that this launcher writes."""
    try:
        return (run.code / _PLAN_SCHEMA).read_text(encoding="utf-8").strip() == plan_schema()
    except FileNotFoundError:
        return False


def plan_schema() -> str:
    """Return the schema version of plans with a digest of their keys: code rejects unknown settings."""
    from launcher.plan.launch_plan import LaunchPlan

    schema = LaunchPlan.model_json_schema()
    keys = {name: sorted(one.get("properties", ())) for name, one in {**schema.get("$defs", {}), "": schema}.items()}
    return f"{SCHEMA_VERSION} {xxhash.xxh3_64_hexdigest(json.dumps(keys, sort_keys=True).encode())}"


def replace(run: RunDir, newest_attempt: int) -> Path:
    """Replace the code that previous attempts ran with a copy of this package; returns the folder that keeps the earlier code."""
    earlier = run.earlier_code(newest_attempt)
    copy = run.root / ".code"
    shutil.rmtree(copy, ignore_errors=True)
    _copy_package(copy)
    if run.code.is_dir() and not earlier.exists():
        run.code.rename(earlier)
    shutil.rmtree(run.code, ignore_errors=True)
    atomic_files.rename(copy, run.code)
    return earlier


def _list_left_out(folder: str, names: list[str]) -> set[str]:
    """Return what not to copy: settings (plans hold them), files being written, and bytecode that this user may not read."""
    bytecode = [name for name in names if name == "__pycache__" or name.endswith(".pyc")]
    unreadable = {name for name in bytecode if not os.access(f"{folder}/{name}", os.R_OK, effective_ids=True)}
    return {"conf", *fnmatch.filter(names, "*.pyc.*"), *unreadable}


def _copy_package(folder: Path) -> None:
    """Copy the package to a folder that does not exist yet, and make everything durable."""
    shutil.copytree(_PACKAGE, folder / "launcher", ignore=_list_left_out)
    (folder / _PLAN_SCHEMA).write_text(f"{plan_schema()}\n", encoding="utf-8")
    # Without this, files may be empty after a power loss, and every later attempt runs them.
    atomic_files.fsync_tree(folder)
