"""The cost of a checkpoint: the stall of a save, steps during the write, bandwidth, and a resume on another rank count.

    python benchmarks/saving.py [--rounds N] [overrides of the launcher]

`launcher train` trains the demonstration model on two ranks and saves in the background; its own metrics (ckpt/*, time/step_s)
give the times. For comparison, the bare DeepSpeed loop calls save_checkpoint, and the same number of bytes is plainly written and
flushed. Both checkpoints are then resumed on one rank, with `launcher resume` and with ds_to_universal and the bare loop, timed
from the command to the end of the first step. Writes two tables into RESULTS.md.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sides

from launcher.tracking.jsonl import read_metrics

SETTINGS = (
    *("model=demo", "data=stdlib_docs", "data.max_length=512", "train.global_batch_size=4", "train.micro_batch_size=1"),
    *("tracking=none", "eval.at_start=false", "eval.sample=false", "export.enabled=false"),
)
RANKS = 2
# The first save of a run allocates its buffer; the run waits for the last one at its end.
SAVES, SAVE_EVERY = 4, 4
STEPS = SAVES * SAVE_EVERY + 2
# Steps after a start that are not measured.
WARMUP = 2
SAVING = "From `python -m launcher train` (ckpt/* and time/step_s in its metrics.jsonl)."
RESUMING = "From `python -m launcher resume RUN cluster.ranks_per_node=1` (its metrics.jsonl)."


def main() -> None:
    args, overrides = sides.parser(__doc__, rounds=2).parse_known_args()
    saves: dict[str, list[float]] = {}
    resumes: dict[str, list[float]] = {"launcher resume": [], "ds_to_universal and the bare loop": []}
    command = sides.typed("saving.py", "--rounds", args.rounds, *overrides)
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
            folder = Path(name)
            two, one = (_prepared(folder / f"{ranks}", ranks, overrides) for ranks in (RANKS, 1))
            figures, num_bytes = one_round(two)
            for name, values in figures.items():
                saves.setdefault(name, []).extend(values)
            resumes["launcher resume"].append(resume(one, two.folder / "runs" / "bench"))
            resumes["ds_to_universal and the bare loop"].append(resume_universal(one, two.folder / "deepspeed"))
        shown = {name: round(values[-1], 2) for name, values in {**saves, **resumes}.items()}
        print(f"round {number + 1}: {shown}", flush=True)
    head = ["| what | s, or a ratio | range |", "|---|---|---|"]
    title = f"saving, {num_bytes / 2**30:.2f} GiB a checkpoint, {RANKS} ranks"
    sides.record(args.results, "saving", title, SAVING, command, [*head, *rows(saves, 3)])
    ours, theirs = resumes.values()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    table = [
        "| side | s to the first step's end | range |",
        "|---|---|---|",
        *rows(resumes, 2),
        "",
        f"launcher / ds_to_universal: {ratio:.2f}",
    ]
    title = f"resume on 1 rank of a checkpoint of {RANKS}"
    sides.record(args.results, "resume on another number of ranks", title, RESUMING, command, table)


def rows(figures: dict[str, list[float]], digits: int) -> list[str]:
    return [
        f"| {name} | {statistics.median(v):.{digits}f} | {min(v):.{digits}f} to {max(v):.{digits}f} |"
        for name, v in figures.items()
    ]


def _prepared(folder: Path, num_ranks: int, overrides: list[str]) -> sides.Prepared:
    folder.mkdir()
    return sides.prepare(folder, [*SETTINGS, f"cluster.ranks_per_node={num_ranks}", *overrides], STEPS, warmup=1)


def one_round(prepared: sides.Prepared) -> tuple[dict[str, list[float]], int]:
    """Run both sides once. Return the seconds of saves and steps, with their ratios, and the bytes of a checkpoint."""
    folder = prepared.folder
    settings = [
        *prepared.overrides,
        f"checkpoint.save_every={SAVE_EVERY}",
        "checkpoint.keep_last=1",
        f"run.root={folder / 'runs'}",
    ]
    os.sync()
    sides.run([sys.executable, "-m", "launcher", "train", *settings, "run.name=bench"], folder / "train.log")
    measured = measured_saves(read_metrics(folder / "runs" / "bench" / "metrics.jsonl"))
    # DeepSpeed's saves block, so they need no steps between them.
    options = (f"--save-to={folder / 'deepspeed'}", "--save-every=1")
    deepspeed = sides.bare_side(replace(prepared, steps=SAVES), *options)["saves"][1:]
    bare = bare_write(folder / "plain", measured.num_bytes, RANKS)
    alone, beside = statistics.median(measured.alone), statistics.median(measured.beside)
    figures = {
        "step": measured.alone,
        "step beside a write": measured.beside,
        "stall of a save": measured.stalls,
        "stall of DeepSpeed's save_checkpoint": deepspeed,
        "save in the background": measured.background,
        "save that is waited for": [measured.waited],
        "plain write and fsync": [bare],
        "stall / DeepSpeed's": [statistics.median(measured.stalls) / statistics.median(deepspeed)],
        "step beside a write / step": [beside / alone],
        "bandwidth / plain write's": [bare / measured.waited],
    }
    return figures, measured.num_bytes


@dataclass(frozen=True)
class Saves:
    """Seconds from a run's metrics: steps without and during a write, background saves except the first, and the last save."""

    alone: list[float]
    beside: list[float]
    stalls: list[float]
    background: list[float]
    waited: float
    num_bytes: int


def measured_saves(lines: list[dict[str, Any]]) -> Saves:
    """Extract save times from the metrics.jsonl lines of a run that saved in the background and at its end."""
    steps = [line for line in lines if "train/loss" in line]
    saves = [line for line in lines if "ckpt/save_s" in line]
    ended = {line["trainer/step"]: line["time"] for line in steps}
    *background, last = saves
    # A save begins when its step ends.
    writing = [(ended[save["ckpt/last_step"]], ended[save["ckpt/last_step"]] + save["ckpt/save_s"]) for save in background]
    alone, beside = [], []
    for line in steps[WARMUP:]:
        begin, end = line["time"] - line["time/step_s"], line["time"]
        overlapping = [number for number, (begun, written) in enumerate(writing) if begin < written and end > begun]
        if not overlapping:
            alone.append(line["time/step_s"])
        elif overlapping != [0]:
            beside.append(line["time/step_s"])
    stalls, seconds = ([save[name] for save in background[1:]] for name in ("ckpt/stall_s", "ckpt/save_s"))
    return Saves(alone, beside, stalls, seconds, last["ckpt/save_s"], int(last["ckpt/bytes"]))


def bare_write(folder: Path, num_bytes: int, num_files: int) -> float:
    """Return the seconds to write and flush `num_bytes`, with one file per rank at a time."""
    folder.mkdir()
    block = memoryview(bytearray(os.urandom(2**20)) * 16)

    def write(number: int) -> None:
        with open(folder / f"{number}", "wb", buffering=0) as file:
            left = num_bytes // num_files
            while left:
                left -= file.write(block[: min(left, len(block))])
            os.fsync(file.fileno())

    os.sync()
    began = time.perf_counter()
    with ThreadPoolExecutor(num_files) as pool:
        list(pool.map(write, range(num_files)))
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def resume(one: sides.Prepared, run: Path) -> float:
    """Return the seconds from `launcher resume` on one rank to the end of its first step."""
    os.sync()
    started = time.time()
    command = [sys.executable, "-m", "launcher", "resume", str(run), "cluster.ranks_per_node=1", f"train.max_steps={STEPS + 1}"]
    sides.run(command, one.folder / "resume.log")
    return (
        next(line["time"] for line in read_metrics(run / "metrics.jsonl") if line["time"] > started and "train/loss" in line)
        - started
    )


def resume_universal(one: sides.Prepared, saved: Path) -> float:
    """Return the seconds from starting ds_to_universal to the end of the bare loop's first step on its output."""
    universal = one.folder / "universal"
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=2", "--num_merge_workers=2"]
    convert += [f"--input_folder={saved / 'saved'}", f"--output_folder={universal / 'saved'}"]
    os.sync()
    began = time.monotonic()
    sides.run(convert, one.folder / "convert.log")
    converted = time.monotonic() - began
    return converted + sides.bare_side(replace(one, steps=2), f"--load-universal={universal}")["first_step_s"]


if __name__ == "__main__":
    main()
