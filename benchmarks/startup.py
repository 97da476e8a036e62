"""Seconds from the command to the beginning of the first optimizer step, for the launcher and a bare torchrun script.

    python benchmarks/startup.py [--rounds N] [overrides of the launcher]

Both load the same model and train the same rows; the data cache and the converted model exist already. The launcher's time
includes composing, planning, the run directory, its agent and W&B's offline start. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import sides

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "data.max_length=256", "train.global_batch_size=8", "tracking.mode=offline"),
    *("eval.at_start=false", "eval.sample=false", "export.enabled=false"),
)


def main() -> None:
    args, overrides = sides.parser(__doc__, rounds=3).parse_known_args()
    bare, launcher = [], []
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        prepared = sides.prepare(Path(folder), [*SETTINGS, *overrides], steps=2, warmup=1)
        for round_number in range(args.rounds):
            bare.append(sides.bare_side(prepared)["to_first_step_s"])
            launcher.append(sides.launcher_side(prepared)["to_first_step_s"])
            print(f"round {round_number + 1}: bare {bare[-1]:.1f} s, launcher {launcher[-1]:.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(launcher, bare, strict=True))
    rows = [
        f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} |"
        for name, times in (("bare torchrun", bare), ("launcher", launcher))
    ]
    table = ["| side | s to the first step's beginning | range |", "|---|---|---|", *rows, "", f"launcher / bare: {ratio:.2f}"]
    command = sides.typed("startup.py", "--rounds", args.rounds, *overrides)
    sides.record(args.results, "start-up", "start-up", sides.FROM_TRAIN, command, table)


if __name__ == "__main__":
    main()
