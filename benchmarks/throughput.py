"""Training throughput of the launcher, of a bare DeepSpeed loop and of TRL on the same model, data and batch.

    python benchmarks/throughput.py [--steps N] [--rounds N] [overrides of the launcher]

The sides run one after another, in several rounds, so that other load on the machine affects all of them. Tokens exclude
padding; the rate covers all steps after the warm-up. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sides

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "data.max_length=256", "train.global_batch_size=8", "tracking=none"),
    *("eval.at_start=false", "eval.sample=false", "export.enabled=false"),
)
BARE, LAUNCHER = "bare loop", "launcher"
TRL_KEPT, TRL_DEFAULT = "TRL, activations kept", "TRL, its default (recompute)"


def main() -> None:
    parser = sides.parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument(
        "--only", nargs="+", metavar="SIDE", help="leave out the sides whose names do not begin with one of these"
    )
    args, overrides = parser.parse_known_args()
    names = (BARE, LAUNCHER, TRL_KEPT, TRL_DEFAULT)
    # --only would take overrides that follow it for sides.
    if unknown := [side for side in args.only or () if not any(name.startswith(side) for name in names)]:
        parser.error(
            f"--only: no side begins with {unknown[0]!r}; the sides are {'; '.join(names)}; write overrides before --only"
        )
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        prepared = sides.prepare(Path(folder), [*SETTINGS, *overrides], args.steps, args.warmup)
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            BARE: partial(sides.bare_side, prepared),
            LAUNCHER: partial(sides.launcher_side, prepared),
        }
        if sides.has_trl():
            runs[TRL_KEPT] = partial(sides.trl_side, prepared, recompute=False)
            runs[TRL_DEFAULT] = partial(sides.trl_side, prepared, recompute=True)
        if args.only:
            runs = {name: side for name, side in runs.items() if name.startswith(tuple(args.only))}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        for round_number in range(args.rounds):
            for name, side in runs.items():
                found[name].append(side())
                print(f"round {round_number + 1}: {name}: {found[name][-1]['tokens_per_sec']:.1f} tokens/s", flush=True)
        batch, ranks = prepared.plan.batch, prepared.plan.topology.world_size
    title = f"throughput, {ranks} ranks, {batch.micro_batch_size} rows x {batch.accumulation} micro-batches, {args.steps} steps"
    command = sides.typed("throughput.py", "--steps", args.steps, "--rounds", args.rounds, *overrides)
    sides.record(args.results, "throughput", title, sides.FROM_TRAIN, command, table(found))


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a Markdown table: medians over rounds, their range, and the launcher's rate relative to each side's."""
    rates = {name: [figures["tokens_per_sec"] for figures in rounds] for name, rounds in found.items()}
    lines = ["| side | tokens/s | range | s per step | launcher / side |", "|---|---|---|---|---|"]
    for name, rate in rates.items():
        step_s = statistics.median(figures["step_s"] for figures in found[name])
        # Ratios use paired rounds, because a temporary slowdown affects both sides.
        ratio = statistics.median(a / b for a, b in zip(rates[LAUNCHER], rate, strict=True)) if LAUNCHER in rates else None
        shown = f"{ratio:.2f}" if ratio is not None else ""
        lines.append(f"| {name} | {statistics.median(rate):.1f} | {min(rate):.1f} to {max(rate):.1f} | {step_s:.2f} | {shown} |")
    return lines


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
