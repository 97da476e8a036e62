"""Read W&B's files with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of all offline files of a run, oldest file first."""
    lines = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        # The command that `wandb leet inspect` runs after it has imported W&B's package.
        command = [
            get_core_path(),
            "leet",
            "inspect",
            "--no-observability",
            "--json",
            "--run-file",
            str(file),
            str(file.parent.parent),
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        lines += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return lines


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The logged values, one dict for each of W&B's steps."""
    return [record["history"]["item"] for record in records(run_dir) if record["type"] == "history"]
