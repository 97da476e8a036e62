"""What a checkpoint costs: the stall of a save, steps during the write, bandwidth, and a resume on another number of ranks.

    python benchmarks/saving.py [--rounds N] [overrides of the launcher]

Two ranks train the demonstration model. DeepSpeed's own save_checkpoint of the same engine, a bare write of the same bytes, and
ds_to_universal with the load that follows are measured beside the launcher's, in turn. Appends tables to RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import sides

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "data.max_length=512", "train.global_batch_size=4", "train.micro_batch_size=1"),
    *("tracking=none", "cluster.ranks_per_node=2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="resumes of each kind")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        prepared = sides.prepare(folder, [*SETTINGS, *overrides], steps=8, warmup=1)
        two, one = folder / "two.json", folder / "one.json"
        two.write_text(prepared.plan.to_json())
        alone = sides.prepare(folder, [*SETTINGS, *overrides, "cluster.ranks_per_node=1"], steps=8, warmup=1)
        one.write_text(alone.plan.to_json())
        saved = ranks(2, "save", two, folder)
        loads = [resumes(one, folder) for _ in range(args.rounds)]
    rows = saved["rows"]
    table = [f"| {name} | {median(v):.3f} | {min(v):.3f} to {max(v):.3f} |" for name, v in rows.items()]
    head = ["| what | s, or a ratio | range |", "|---|---|---|"]
    size = f"{saved['bytes'] / 2**30:.2f} GiB a checkpoint, 2 ranks"
    command = f"`python benchmarks/saving.py --rounds {args.rounds} {' '.join(overrides)}`".replace(" `", "`")
    sides.record(f"saving, {size}", [command], [*head, *table])
    ours, theirs = [o for o, _, _ in loads], [c + u for _, c, u in loads]
    table = [
        f"| launcher, load | {median(ours):.2f} | {min(ours):.2f} to {max(ours):.2f} |",
        f"| ds_to_universal and load | {median(theirs):.2f} | {min(theirs):.2f} to {max(theirs):.2f} |",
        "",
        f"launcher / ds_to_universal and load: {median([a / b for a, b in zip(ours, theirs, strict=True)]):.2f}",
    ]
    sides.record("resume on 1 rank of a checkpoint of 2", [command], ["| side | s | range |", "|---|---|---|", *table])


def resumes(plan: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds of the launcher's load, of the conversion, and of DeepSpeed's load of what was converted."""
    ours = ranks(1, "load-ours", plan, folder)["seconds"]
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=2", "--num_merge_workers=2"]
    convert += [f"--input_folder={folder / 'deepspeed' / 'saved'}", f"--output_folder={folder / 'universal' / 'saved'}"]
    os.sync()
    began = time.monotonic()
    sides.run(convert, folder / "convert.log")
    converted = time.monotonic() - began
    return ours, converted, ranks(1, "load-universal", plan, folder)["seconds"]


def ranks(world_size: int, action: str, plan: Path, folder: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command += [str(sides.HERE / "saving_ranks.py"), action, str(plan), str(folder)]
    output = sides.run(command, folder / f"{action}.log")
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
