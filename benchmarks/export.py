"""Peak memory and seconds of an export: the launcher's, and DeepSpeed's own zero_to_fp32.py on the same engine's state.

    python benchmarks/export.py [--rounds N] [overrides of the launcher]

One engine of the demonstration model saves its state twice, as the launcher does and as DeepSpeed does. Both sides then run
as a person would type them, each in a process of its own, in several rounds; memory is the largest resident set of any
process that the command started. The launcher verifies files and compares every tensor's digest, and does not load the
folder back, as zero_to_fp32.py does not either. Prints a table and appends it to RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import sides

from launcher.checkpoint import store
from launcher.checkpoint.state import read_state
from launcher.plan.run_dir import RunDir

SETTINGS = ("model=demo", "data=stdlib_docs", "train.global_batch_size=2", "train.micro_batch_size=1", "tracking=none")
ZERO_TO_FP32 = "zero_to_fp32.py"
LAUNCHER = ("launcher, fp32", "launcher, bf16")
# Runs a command and prints the largest resident set, in KiB, of it and of all that it has waited for.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@dataclass(frozen=True)
class Sample:
    seconds: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        commands, imports, largest_mib = prepare(folder, overrides)
        compared = 0
        found: dict[str, list[Sample]] = {side: [] for side in commands}
        for round_number in range(args.rounds):
            for side, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                sample = measure(command, folder / "log")
                found[side].append(sample)
                if side in LAUNCHER:
                    compared = json.loads((folder / "out" / "export.json").read_text())["tensors_compared"]
                print(f"round {round_number + 1}: {side}: {sample.seconds:.2f} s, {sample.peak_mib:.0f} MiB", flush=True)
        baseline = statistics.median(measure(imports, folder / "log").peak_mib for _ in range(args.rounds))
    above = statistics.median(sample.peak_mib for side in LAUNCHER for sample in found[side]) - baseline
    notes = [
        "",
        f"Interpreter with the launcher's imports: {baseline:.0f} MiB; its export takes {above:.0f} MiB above that. "
        f"The largest tensor has {largest_mib:.0f} MiB in fp32. {compared} tensors were compared by digest.",
    ]
    command = f"`python benchmarks/export.py --rounds {args.rounds} {' '.join(overrides)}`".replace(" `", "`")
    sides.record("export of a 2-rank checkpoint", [command], [*table(found), *notes])


def prepare(folder: Path, overrides: list[str]) -> tuple[dict[str, list[str]], list[str], float]:
    """Save the two checkpoints; returns the command of each side, the launcher's imports alone, and the largest tensor's MiB."""
    run, deepspeed = RunDir(folder / "run"), folder / "deepspeed"
    run.root.mkdir()
    python = [sys.executable, "-m"]
    sides.run([*python, "launcher", "data", *SETTINGS, *overrides], folder / "data.log")
    run.plan.write_text(sides.run([*python, "launcher", "plan", "--json", *SETTINGS, *overrides], folder / "plan.log"))
    ranks = json.loads(run.plan.read_text())["topology"]["world_size"]
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = str(sides.HERE / "export_state.py")
    sides.run([*torchrun, script, str(run.plan), str(run.root), str(deepspeed)], folder / "save.log")
    out = str(folder / "out")
    export = [*python, "launcher", "export", str(run.root), "--no-check", "--out", out]
    commands = {
        ZERO_TO_FP32: [sys.executable, str(deepspeed / ZERO_TO_FP32), str(deepspeed), out],
        **{side: [*export, "--dtype", side.split()[-1]] for side in LAUNCHER},
    }
    elements = [math.prod(shape) for shape in read_state(store.latest(run.checkpoints).path).parameters.values()]
    return commands, [sys.executable, "-c", "import launcher.worker.export"], max(elements) * 4 / 2**20


def measure(command: list[str], log: Path) -> Sample:
    """Run a command to its end.

    Raises:
        SystemExit: where it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(sides.HERE.parent)}
    started = time.perf_counter()
    with open(log, "w") as errors:
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            timeout=sides.RUN_TIMEOUT_S,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{log.read_text()[-4000:]}")
    return Sample(time.perf_counter() - started, int(done.stdout) / 1024)


def table(found: dict[str, list[Sample]]) -> list[str]:
    """A Markdown table: medians over rounds, and each side as a share of zero_to_fp32.py."""
    lines = ["| side | s | range | peak MiB | s / zero_to_fp32 | memory / zero_to_fp32 |", "|---|---|---|---|---|---|"]
    for side, samples in found.items():
        seconds, peak = [s.seconds for s in samples], statistics.median(s.peak_mib for s in samples)
        # Rounds are pairs: what slows the machine down for a while slows both.
        pairs = list(zip(samples, found[ZERO_TO_FP32], strict=True))
        time_ratio = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
        memory_ratio = statistics.median(ours.peak_mib / theirs.peak_mib for ours, theirs in pairs)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        lines.append(
            f"| {side} | {statistics.median(seconds):.2f} | {spread} | {peak:.0f} | {time_ratio:.2f} | {memory_ratio:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
