"""How many answers that were swapped between questions of similar length `data --scored` ranks first.

    python benchmarks/triage.py [--rows N] [--exchanged N] [--step N] [overrides of the launcher]

Uses rows of GSM8K (one JSON object per line, with question and answer), some with swapped answers. The demonstration model trains
on them for one step to create a run; by default, its initial weights score the rows. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import sides

SETTINGS = (
    *("model=demo", "data=jsonl", "train.max_steps=1", "train.epochs=null", "train.global_batch_size=1"),
    *("cluster.ranks_per_node=1", "tracking=none", "export.enabled=false", "eval.at_start=false"),
)
# The share of the list that a person would review.
FIRST = 0.04


def exchange(rows: list[dict[str, Any]], num_exchanged: int, seed: int = 0) -> list[int]:
    """Swap the answers of rows in pairs whose questions have similar lengths; return the indices of the rows."""
    chosen = Random(seed).sample(range(len(rows)), num_exchanged)
    chosen.sort(key=lambda i: len(rows[i]["question"]))
    for one, other in zip(chosen[::2], chosen[1::2], strict=True):
        rows[one]["answer"], rows[other]["answer"] = rows[other]["answer"], rows[one]["answer"]
    return chosen


def main() -> None:
    arguments = sides.parser(__doc__, rounds=None)
    arguments.add_argument("--data", type=Path, required=True, help="GSM8K's training rows, such as gsm8k_train.jsonl")
    arguments.add_argument("--rows", type=int, default=2000)
    arguments.add_argument("--exchanged", type=int, default=40)
    arguments.add_argument("--step", type=int, default=0, help="step whose weights score the rows (default: 0, the initial ones)")
    args, overrides = arguments.parse_known_args()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()[: args.rows]]
    exchanged = exchange(rows, args.exchanged)
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, "-m", "launcher"]
        settings = (f"data.path={file}", f"run.root={folder}", "run.name=triage", *SETTINGS, *overrides)
        sides.run([*command, "train", *settings], folder / "train.log")
        scored = [*command, "data", "--scored", str(folder / "triage"), "--step", str(args.step), "--json"]
        cost, output = sides.measure(scored, folder / "scored.log", dict(os.environ))
        report = json.loads(output)
    ranked = [int(entry["where"].rpartition(":")[2]) - 1 for entry in report["lists"]["mislabeled"]]
    first = ranked[: math.ceil(FIRST * len(rows))]
    found, likely = len({*first} & {*exchanged}), [e for e in report["lists"]["mislabeled"] if e["likely"]]
    true = sum(int(entry["where"].rpartition(":")[2]) - 1 in exchanged for entry in likely)
    table = [
        "| rows | exchanged | in the first 4% | marked as likely | of them exchanged | AUC | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| {len(rows):,} | {len(exchanged)} | {found} ({found / len(exchanged):.0%}) | {len(likely)} | {true} | "
        f"{_auc(ranked, exchanged):.4f} | {cost.seconds:.0f} | {cost.cpu_s:.0f} |",
    ]
    command_line = sides.typed("triage.py", "--data", args.data.name, "--rows", args.rows, "--step", args.step, *overrides)
    source = "From `python -m launcher data --scored RUN --json`."
    sides.record(args.results, "triage", f"exchanged answers of {len(rows):,} rows", source, command_line, table)


def _auc(ranked: list[int], exchanged: list[int]) -> float:
    """Return the probability that a swapped row ranks before an unchanged one."""
    ranks = [rank for rank, row in enumerate(ranked) if row in {*exchanged}]
    num_others = len(ranked) - len(ranks)
    before = sum(rank - i for i, rank in enumerate(ranks))
    return 1 - before / (len(ranks) * num_others)


if __name__ == "__main__":
    main()
