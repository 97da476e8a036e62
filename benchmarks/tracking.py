"""The cost of tracking per step: measuring, monitoring, logging and alerts, with one log per step and the tiny model.

    python benchmarks/tracking.py [--only runs blocks] [--rounds N] [--blocks N] [overrides of the launcher]

runs: `launcher train` with tracking=none and with W&B offline, as whole processes in turn. Users can choose between these two;
most of the tracking is always on.

blocks: within one run, blocks of steps with full tracking (timers, metrics, monitoring of all ranks and its part of the
all-reduce, the probe, metrics.jsonl, events, the terminal, W&B offline, status.json) alternate with blocks without any of it, so
that other load on the machine affects both. Each block is compared with its neighbors. Batches have the size of the README's
first run, and each row is one document of the same length, so that all steps do the same work. The first SETTLE steps of a
block are not timed, because W&B is still processing the previous block.

Step times vary by far more than half a percent, because other machines share this one's processors and memory. Short steps
(`--blocks 60 train.global_batch_size=2 data.max_length=64`) vary by fewer milliseconds and thus show the cost of a step's
metrics. The tracking's own time is also measured, over LEAD steps with full tracking: the wall-clock time of its calls on the
training thread, and the CPU time of W&B's process and of rank 0's other Python threads, except the one that reads batches.
Their sum is the cost if no core were free to run them in parallel with the step. It excludes only the few numbers that
tracking adds to an all-reduce. Writes tables into RESULTS.md.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

# W&B is imported and starts during the first steps, so many are needed if they are short.
WARMUP, LEAD, BLOCK, SETTLE = 40, 60, 15, 6
# The first step of the blocks, counted from 0.
FIRST = WARMUP + LEAD
SETTINGS = (
    *("model=tiny", "data=jsonl", "data.max_length=256", "data.eval_fraction=0", "data.checks.no_turn_end=keep"),
    "data.checks.truncated=keep",
    *("train.global_batch_size=8", "eval.sample=false", "export.enabled=false", "checkpoint.save_every=0"),
    "cluster.ranks_per_node=2",
)
TRACKING = {"without": ("tracking=none",), "with W&B": ("tracking=wandb", "tracking.mode=offline")}
PARTS = ("runs", "blocks")
FROM_RUNS = "From `python -m launcher train`, with `tracking=none` and with `tracking=wandb tracking.mode=offline`."
FROM_LOOP = "From the training loop, called in the benchmark's own ranks, because no setting turns all tracking off."


def is_on(step: int) -> bool:
    """Return whether tracking is on at a step, counted from 1."""
    return step <= FIRST or (step - FIRST - 1) // BLOCK % 2 == 0


class NoStop:
    at: float | None = None

    def __call__(self) -> str | None:
        return None

    def cancel(self) -> None:
        """Do nothing, because nothing requests a stop."""

    def begin_training(self) -> None:
        """Do nothing, because nothing ends the process while it loads."""


class Recorder:
    """Seconds of each step: wall-clock time, CPU time of the training thread, and time inside the tracking.

    `process` contains the CPU seconds of this process before each block and at the end. `helpers` and `beside` contain those of
    its tracking threads and processes, before and after the LEAD steps.
    """

    def __init__(self, num_steps: int | None) -> None:
        self.step, self._num_steps = 0, num_steps
        self.walls: list[float] = []
        self.threads: list[float] = []
        self.insides: list[float] = []
        self._inside = 0.0
        self.process: list[float] = []
        self.helpers: list[float] = []
        self.beside: list[float] = []

    def take(self, step: int, train: Callable[[], Any]) -> Any:
        self.step = step
        if step in (WARMUP + 1, FIRST + 1):
            self.helpers.append(sum(map(cpu_seconds, threading.enumerate())))
            times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
            self.beside.append(sum(one.user + one.system for one in times))
        if step > FIRST and (step - FIRST - 1) % BLOCK == 0:
            self.process.append(time.process_time())
        self._inside = 0.0
        wall, thread = time.perf_counter(), time.thread_time()
        result = train()
        self.walls.append(time.perf_counter() - wall)
        self.threads.append(time.thread_time() - thread)
        self.insides.append(self._inside)
        if step == self._num_steps:
            self.process.append(time.process_time())
        return result

    def timed(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments, **named)
        self._inside += time.perf_counter() - began
        return result


def cpu_seconds(thread: threading.Thread) -> float:
    """Return the CPU seconds of a thread; 0 for the training thread, the batch reader and autograd's threads."""
    if thread.name in ("MainThread", "batches_0") or isinstance(thread, threading._DummyThread):
        return 0.0
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


class Switched:
    """Forwards attributes to `real`; while tracking is off, the methods in `idle` take their place."""

    def __init__(self, real: Any, recorder: Recorder, idle: Mapping[str, Callable[..., Any]]) -> None:
        self._real, self._recorder, self._idle = real, recorder, idle

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in self._idle:
            return real
        return partial(self._recorder.timed, real) if is_on(self._recorder.step) else self._idle[name]


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a method while tracking is off."""


def main() -> None:
    import sides

    parser = sides.parser(__doc__, rounds=3, rounds_help="runs with and without tracking")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--blocks", type=int, default=12, help="blocks of steps with tracking, and as many without")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    args, overrides = parser.parse_known_args()
    if args.blocks < 2:
        parser.error("--blocks: a block is compared with the two around it, so give 2 or more")
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": f"{number} " * 256}) + "\n" for number in range(1000, 1400)))
        settings = [*SETTINGS, f"data.path={rows}", f"run.root={folder / 'runs'}", "run.name=bench", *overrides]
        sides.run([sys.executable, "-m", "launcher", "data", *settings], folder / "data.log")
        if "runs" in args.only:
            table = whole_runs(folder, [*settings, f"train.max_steps={args.steps}"], args.rounds)
            command = sides.typed("tracking.py", "--only", "runs", "--rounds", args.rounds, "--steps", args.steps, *overrides)
            sides.record(
                args.results, "tracking, whole runs", f"tracking, whole runs of {args.steps} steps", FROM_RUNS, command, table
            )
        if "blocks" in args.only:
            steps = FIRST + 2 * BLOCK * args.blocks
            table = block_table(**switched_run(folder, [*settings, *TRACKING["with W&B"], f"train.max_steps={steps}"]))
            command = sides.typed("tracking.py", "--only", "blocks", "--blocks", args.blocks, *overrides)
            title = f"tracking, {steps} steps of 2 ranks, blocks of {BLOCK}"
            sides.record(args.results, "tracking", title, FROM_LOOP, command, table)


def whole_runs(folder: Path, settings: list[str], rounds: int) -> list[str]:
    """Return a table of commands that differ only in `tracking`; tracking=none still writes metrics.jsonl and status.json."""
    import sides

    from launcher.tracking.jsonl import read_metrics

    environment = sides.user_environment(folder, OMP_NUM_THREADS="1")
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in TRACKING}
    # The first round writes Python's bytecode and is not counted.
    for number in range(rounds + 1):
        for name, chosen in TRACKING.items():
            command = [sys.executable, "-m", "launcher", "train", *settings, *chosen]
            cost, _ = sides.measure(command, folder / "run.log", environment)
            steps = [line["time/step_s"] for line in read_metrics(folder / "runs/bench/metrics.jsonl") if "train/loss" in line]
            shutil.rmtree(folder / "runs")
            if number:
                figures[name].append((statistics.median(steps), cost.seconds, cost.cpu_s, cost.peak_mib))
                print(f"round {number}: {name}: {cost.seconds:.1f} s, {cost.cpu_s:.1f} s of CPU", flush=True)
    columns = "run | s per step | s | CPU s of all processes | peak MiB of all processes"
    lines = [f"| {columns} |", "|---" * 5 + "|"]
    for name, taken in figures.items():
        medians = [statistics.median(values) for values in zip(*taken, strict=True)]
        lines.append(f"| {name} | {medians[0]:.4f} | {medians[1]:.2f} | {medians[2]:.2f} | {medians[3]:.0f} |")
    without, tracked = figures.values()
    pairs = [[a / b for a, b in zip(*both, strict=True)] for both in zip(tracked, without, strict=True)]
    ratios = [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in zip(*pairs, strict=True)]
    return [*lines, f"| with / without, pairs | {' | '.join(ratios)} |"]


def switched_run(folder: Path, settings: list[str]) -> dict[str, list[float]]:
    """Return the ranks' measurements from one run whose tracking is switched on and off."""
    import sides

    plan_file = folder / "plan.json"
    plan_file.write_text(
        sides.read_plan(sides.run([sys.executable, "-m", "launcher", "plan", "--json", *settings], folder / "plan.log")).to_json()
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = sides.run([*command, str(Path(__file__).resolve()), "--rank", str(plan_file)], folder / "log")
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"walls"')))


def block_table(
    walls: list[float],
    threads: list[float],
    insides: list[float],
    process: list[float],
    helpers: list[float],
    beside: list[float],
) -> list[str]:
    step = statistics.median(blocks(walls)[1::2])
    parts = {
        "inside the calls of the tracking, wall-clock": statistics.fmean(insides[WARMUP:FIRST]),
        "CPU of rank 0's other threads that track": (helpers[-1] - helpers[0]) / LEAD,
        "CPU of W&B's process": (beside[-1] - beside[0]) / LEAD,
    }
    parts["these three, one after another"] = sum(parts.values())
    return [
        "| ms a step | without | with | with / without | 95% of that | ms more | 95% of that |",
        "|---|---|---|---|---|---|---|",
        row("step, wall-clock", blocks(walls)),
        row("CPU of the thread that trains", blocks(threads)),
        row("CPU of rank 0, all threads", [(end - begin) / BLOCK for begin, end in pairwise(process)]),
        *(f"| {name} | | {seconds * 1e3:.3f} | {1 + seconds / step:.4f} | | | |" for name, seconds in parts.items()),
    ]


def blocks(seconds: Sequence[float]) -> list[float]:
    """Return the mean step time of each block; the first block has tracking."""
    return [statistics.fmean(seconds[b + SETTLE : b + BLOCK]) for b in range(FIRST, len(seconds), BLOCK)]


def row(what: str, values: Sequence[float]) -> str:
    on, off = values[0::2], values[1::2]
    # Compare each block with tracking with the mean of its two neighbors.
    around = [(off[i - 1] + off[i]) / 2 for i in range(1, len(on))]
    ratio, low, high = middle([mine / others for mine, others in zip(on[1:], around, strict=True)])
    more, least, most = middle([(mine - others) * 1e3 for mine, others in zip(on[1:], around, strict=True)])
    medians = f"{statistics.median(off) * 1e3:.2f} | {statistics.median(on) * 1e3:.2f}"
    return f"| {what} | {medians} | {ratio:.4f} | {low:.4f} to {high:.4f} | {more:.2f} | {least:.2f} to {most:.2f} |"


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95% confidence bounds: order statistics, by the normal approximation of the binomial."""
    ordered = sorted(values)
    outside = max(0, int((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
    return statistics.median(ordered), ordered[outside], ordered[-1 - outside]


def switch(recorder: Recorder) -> None:
    """Patch the loop to track only the steps for which `is_on` is True, and to time its steps with `recorder`."""
    from launcher.train import loop
    from launcher.train.monitoring import monitor
    from launcher.train.monitoring.step_metrics import LayerTimer

    class SwitchedTimer(LayerTimer):
        def _begin(self, *arguments: Any) -> None:
            if is_on(recorder.step):
                recorder.timed(super()._begin, *arguments)

        def _end(self, *arguments: Any) -> None:
            recorder.timed(super()._end, *arguments)

    build, train_step, start_trackers = loop.build_components, loop.TrainingLoop.train_step, loop.start_trackers
    calls = ("beat", "record_step", "update_ranks", "alert")
    idle: dict[str, dict[str, Callable[..., Any]]] = {
        "monitor": {**dict.fromkeys(calls, nothing), "pack_local": list, "reached_limit": str, "metrics": lambda tokens: {}},
        "meter": {"step": lambda *_: {}},
        "timer": {"begin": nothing, "part": lambda *_, **__: nullcontext(), "read": dict},
        "status": {"update_step": nothing},
    }

    def switched_build(*arguments: Any) -> Any:
        components = build(*arguments)
        for name, methods in idle.items():
            setattr(components, name, Switched(getattr(components, name), recorder, methods))
        return components

    def switched_trackers(*arguments: Any) -> Any:
        return Switched(start_trackers(*arguments), recorder, {"log": nothing, "event": nothing})

    monitor.LayerTimer = SwitchedTimer  # type: ignore[misc]
    loop.start_trackers = switched_trackers
    loop.build_components = switched_build
    loop.TrainingLoop.train_step = lambda session: recorder.take(  # type: ignore[method-assign, assignment]
        session.step + 1, lambda: train_step(session)
    )


def rank(plan_path: str) -> None:
    from launcher.distributed import RankInfo
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.runs import run_records, run_store
    from launcher.train import loop

    plan = LaunchPlan.load(plan_path)
    rank_info = RankInfo(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), attempt=1)
    if rank_info.is_main:
        run_store.create_attempt(run_store.create(plan), run_records.Attempt(None))
    else:
        while not (Path(plan.run_dir) / "attempts" / "001" / "attempt.json").exists():
            time.sleep(0.1)
    recorder = Recorder(plan.batch.max_steps)
    switch(recorder)
    loop.train(plan, rank_info, NoStop())
    if rank_info.is_main:
        names = ("walls", "threads", "insides", "process", "helpers", "beside")
        print(json.dumps({name: getattr(recorder, name) for name in names}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    rank(sys.argv[2]) if sys.argv[1:2] == ["--rank"] else main()
