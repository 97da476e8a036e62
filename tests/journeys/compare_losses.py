"""Fail unless two runs have the same loss, to the last bit, at every step: python compare_losses.py RUN_DIR RUN_DIR"""

import json
import sys
from pathlib import Path


def losses(run: str) -> dict[int, float]:
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return {line["trainer/step"]: line["train/loss"] for line in lines if "train/loss" in line}


first, second = (losses(run) for run in sys.argv[1:])
if not first or first != second:
    sys.exit(f"the losses differ: {first} and {second}")
