"""Seconds that a user waits for `plan`, `data` on a finished cache, and `status`, each run as a command.

    python benchmarks/commands.py [--rounds N] [overrides of the launcher]

The data cache and the run exist already. Writes a table into RESULTS.md.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

import psutil
import sides

SETTINGS = ("model=demo", "data=stdlib_docs", "tracking=none")
# The run for `status`.
RUN = (
    *("model=tiny", "data=stdlib_docs", "data.max_length=128", "tracking=none", "cluster.ranks_per_node=1"),
    *("train.max_steps=1", "train.epochs=null", "export.enabled=false", "run.name=bench"),
)


def main() -> None:
    args, overrides = sides.parser(__doc__, rounds=9, rounds_help="runs of each command").parse_known_args()
    settings = [*SETTINGS, *overrides]
    costs: dict[str, list[sides.Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        log = Path(folder) / "log"
        environment = sides.user_environment(Path(folder))
        launcher = [sys.executable, "-m", "launcher"]
        sides.run([*launcher, "data", *settings], log, environment)
        sides.run([*launcher, "train", *RUN, f"run.root={folder}/runs"], log, environment)
        commands = {
            "plan": ["plan", *settings],
            "data, finished cache": ["data", *settings],
            "data --json, finished cache": ["data", "--json", *settings],
            "status": ["status", f"{folder}/runs/bench"],
        }
        for round_number in range(args.rounds + 1):
            for name, arguments in commands.items():
                cost, _ = sides.measure([*launcher, *arguments], log, environment)
                # The first round writes bytecode and is not counted.
                if round_number:
                    costs.setdefault(name, []).append(cost)
    load = os.getloadavg()[0]
    rows = []
    for name, runs in costs.items():
        seconds, cpu = [cost.seconds for cost in runs], [cost.cpu_s for cost in runs]
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        rows.append(f"| {name} | {statistics.median(seconds):.2f} | {spread} | {statistics.median(cpu):.2f} |")
    table = ["| command | s, median | range | CPU s, median |", "|---|---|---|---|", *rows]
    if load > psutil.cpu_count():
        table += ["", f"The machine was busy with other work: {load:.0f} processes wanted its {psutil.cpu_count()} cores."]
    command = sides.typed("commands.py", "--rounds", args.rounds, *overrides)
    source = "From `python -m launcher plan`, `data` and `status`, each run as a whole process."
    sides.record(args.results, "answers of commands", "answers of commands", source, command, table)


if __name__ == "__main__":
    main()
