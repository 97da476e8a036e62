"""Seconds and memory of an export: `launcher export` compared with DeepSpeed's zero_to_fp32.py on the same model.

    python benchmarks/export.py [--rounds N] [overrides of the launcher]

`launcher train` and the bare DeepSpeed loop each train the demonstration model for two steps on two ranks and save. Both exports
then run as user commands, in several rounds. With --no-check, the launcher verifies its files and compares every tensor's
digest, but does not load the folder back; neither does zero_to_fp32.py. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import sides
from sides import Cost

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "train.global_batch_size=2", "train.micro_batch_size=1", "tracking=none"),
    *("eval.at_start=false", "eval.sample=false", "export.enabled=false", "cluster.ranks_per_node=2"),
)
STEPS = 2
ZERO_TO_FP32 = "zero_to_fp32.py"
CHECKED = "launcher export, with its check"
SOURCE = "From `python -m launcher export RUN --out DIR --dtype TYPE --no-check`, and without --no-check."


def main() -> None:
    args, overrides = sides.parser(__doc__, rounds=5).parse_known_args()
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        commands = prepare(folder, overrides)
        environment = sides.user_environment(folder)
        num_compared = 0
        costs: dict[str, list[Cost]] = {side: [] for side in commands}
        # The first round writes Python's bytecode and is not counted.
        for number in range(args.rounds + 1):
            for side, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                cost, _ = sides.measure(command, folder / "side.log", environment)
                if side != ZERO_TO_FP32:
                    num_compared = json.loads((folder / "out" / "export.json").read_text())["tensors_compared"]
                if number:
                    costs[side].append(cost)
                    print(f"round {number}: {side}: {cost.seconds:.2f} s, {cost.largest_mib:.0f} MiB", flush=True)
    notes = ["", f"The launcher compared {num_compared} tensors by digest."]
    command = sides.typed("export.py", "--rounds", args.rounds, *overrides)
    sides.record(args.results, "export", "export of a 2-rank checkpoint", SOURCE, command, [*table(costs), *notes])


def prepare(folder: Path, overrides: list[str]) -> dict[str, list[str]]:
    """Save the two checkpoints; return the command of each side."""
    prepared = sides.prepare(folder, [*SETTINGS, *overrides], steps=STEPS, warmup=1)
    launcher = [sys.executable, "-m", "launcher"]
    run, deepspeed = folder / "runs" / "bench", folder / "deepspeed"
    sides.run([*launcher, "train", *prepared.overrides, f"run.root={run.parent}", "run.name=bench"], folder / "train.log")
    sides.bare_side(prepared, f"--save-to={deepspeed}", f"--save-every={STEPS}")
    out = str(folder / "out")
    export = [*launcher, "export", str(run), "--out", out, "--replace"]
    return {
        ZERO_TO_FP32: [sys.executable, str(deepspeed / ZERO_TO_FP32), str(deepspeed), out],
        **{f"launcher export, {dtype}": [*export, "--no-check", "--dtype", dtype] for dtype in ("fp32", "bf16")},
        CHECKED: export,
    }


def table(costs: dict[str, list[Cost]]) -> list[str]:
    """Return a Markdown table: medians over rounds, and each side relative to zero_to_fp32.py."""
    columns = "side | s | range | MiB of the largest process | peak MiB of all processes | s / zero_to_fp32 | MiB / zero_to_fp32"
    lines = [f"| {columns} |", "|---" * 7 + "|"]
    for side, taken in costs.items():
        seconds = [cost.seconds for cost in taken]
        largest, peak = (statistics.median(getattr(cost, name) for cost in taken) for name in ("largest_mib", "peak_mib"))
        # Ratios use paired rounds, because a temporary slowdown affects both sides.
        pairs = list(zip(taken, costs[ZERO_TO_FP32], strict=True))
        time_ratio = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
        memory_ratio = statistics.median(ours.largest_mib / theirs.largest_mib for ours, theirs in pairs)
        spread = f"{statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f}"
        lines.append(f"| {side} | {spread} | {largest:.0f} | {peak:.0f} | {time_ratio:.2f} | {memory_ratio:.2f} |")
    return lines


if __name__ == "__main__":
    main()
