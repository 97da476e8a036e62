"""Folders with splits and subsets, for tests of local and remote sources."""

from __future__ import annotations

import json

# File text by path.
Files = dict[str, str]


def row(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


SPLITS = {"train-0.jsonl": row("a"), "train-1.jsonl": row("b"), "test.jsonl": row("t"), "README.md": "# Rows"}
# The dataset card of SUBSETS.
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/first*
  - split: held
    path: [main/second.jsonl]
- config_name: socratic
  data_dir: socratic
---
"""
SUBSETS = {
    "README.md": CARD,
    "main/first.jsonl": row("m"),
    "main/second.jsonl": row("h"),
    "socratic/train.jsonl": row("s"),
    "socratic/test.jsonl": row("st"),
}
