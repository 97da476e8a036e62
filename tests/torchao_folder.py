"""torchao, for FP8, is in a separate folder: transformers imports it in every process that can find it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from missing_program import skip_or_fail

# `make` installs torchao here.
_FOLDER = Path(sys.prefix) / "fp8"


def find_torchao() -> Path:
    """Return a folder for sys.path with torchao; skip the test if there is none."""
    if (_FOLDER / "torchao").is_dir():
        return _FOLDER
    installed = importlib.util.find_spec("torchao")
    if installed is None or installed.origin is None:
        skip_or_fail("torchao is installed with: make .venv/.installed-dev")
    return Path(installed.origin).parents[1]
