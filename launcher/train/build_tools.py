"""Checks for the build tools that Triton and torch's compiler need on the computing machine: a compiler and Python's headers.

On GPUs, Triton compiles a C launcher for each kernel of Liger and of torch.compile. On CPUs, torch.compile generates C++.
This module does not import torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from launcher.errors import Problem

_HEADER = "Python.h"
# By device kind: the compiler, the variable that names one, the commands that the package tries if it is unset, and the variable
# with header folders.
_COMPILERS = {
    "cuda": ("C compiler", "CC", ("gcc", "clang"), "C_INCLUDE_PATH"),
    "cpu": ("C++ compiler", "CXX", ("g++",), "CPLUS_INCLUDE_PATH"),
}


def missing_build_tools(device: str) -> list[Problem]:
    """Return one problem for a missing compiler and one for missing headers that kernels for this device (cuda or cpu) need."""
    compiler, variable, commands, folders = _COMPILERS[device]
    problems = []
    # The package calls whatever the variable names, and looks for no other compiler.
    named = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(map(shutil.which, named or commands)):
        looked_for = f"{variable}={named[0]}" if named else " and ".join(commands)
        remedy = f"apt-get install {commands[0]}" + (f", and unset {variable}" if named else "")
        problems.append(Problem(f"no {compiler} is found", value=looked_for, remedy=remedy))
    variables = (os.environ.get(name, "") for name in ("CPATH", folders))
    given = [folder for value in variables for folder in value.split(os.pathsep) if folder]
    if not any(Path(folder, _HEADER).is_file() for folder in (_include_folder(), *given)):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        remedy = f"apt-get install {package}, or use a Python that has its headers, such as one from uv or conda"
        problems.append(Problem(f"Python's headers are not installed ({_HEADER})", value=_include_folder(), remedy=remedy))
    return problems


def _include_folder() -> str:
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for packages installed by pip has no headers.
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
