"""Data preparation as the user's command runs it: cache builds, many short documents, packing waste, the loader's share.

    python benchmarks/data.py [--rounds N] [--data FOLDER] [--only build short packing loader open tokenizer checks]

build    `launcher data` into an empty cache, compared with datasets.map and TRL's packing in a script (map_and_pack.py): seconds,
         CPU seconds and memory of whole processes, on 29,892 chats. Both sides must produce the same token ids.
short    the same for 200,000 documents of 10 to 40 tokens (--short-documents)
packing  rows and waste of both sides on the data sets in FOLDER, which contains gsm8k_train.jsonl and alpaca_en_demo.json
loader   the share of a step that `launcher train` spends on data
open     opening a cache of 100,000 rows, as a rank does: function calls, no command
tokenizer  CPU seconds of a build with the word cache of fast_tokenizer.py and without it (build_cpu.py), on 29,892 chats

checks   CPU seconds of a build compared with another checkout of the launcher (--base FOLDER): the cost of later additions

The tokenizer is converted beforehand. Sides take turns in several rounds, so that other load on the machine affects all of them.
Figures are medians; ratios are medians of paired rounds. Without TRL, only the launcher is measured. Writes tables into
RESULTS.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import data_inputs
import numpy as np
import sides
from sides import Cost

from launcher.data.split import write_split
from launcher.tracking.jsonl import read_metrics

DATA = sides.HERE.parents[1] / "shared" / "data"
ROW_LENGTHS = (1024, 2048, 4096)
MAX_LENGTH = 2048
PROCESSES = 2
PARTS = ("build", "short", "packing", "loader", "open", "tokenizer", "checks")
# Parts that run only if they are named.
NAMED_PARTS = ("checks",)
LAUNCHER, TRL = "launcher data", "datasets.map and TRL"
WORD_CACHE, ENCODE_BATCH = "word cache", "encode_batch alone"
FROM_DATA = f"From `python -m launcher data data.workers={PROCESSES} --json`, run as a whole process with an empty cache."
FROM_BUILD = "From `launcher.data.build.build` in one process: CPU seconds of the build, without imports."
FROM_FUNCTIONS = "From calls to the functions that open a cache and make batches, as a rank does at its start."


def main() -> None:
    parser = sides.parser(__doc__, rounds=5)
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the data sets (default: {DATA})")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--base", type=Path, help="checkout of the launcher that checks compares with")
    parser.add_argument("--copies", type=int, default=data_inputs.COPIES, help="copies of gsm8k in build (default: %(default)s)")
    parser.add_argument("--row-lengths", type=int, nargs="+", default=ROW_LENGTHS, metavar="N", help="row lengths of packing")
    parser.add_argument("--short-documents", type=int, default=200_000, help="documents of short (default: %(default)s)")
    args = parser.parse_args()
    args.only = args.only or [part for part in PARTS if part not in NAMED_PARTS]
    if "checks" in args.only and args.base is None:
        parser.error("checks needs --base FOLDER")
    if not args.data.is_dir() and {"build", "packing", "tokenizer", "checks"} & {*args.only}:
        parser.error(
            f"--data: there is no folder {args.data}; build and packing read gsm8k_train.jsonl and alpaca_en_demo.json there"
        )
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        bench = Bench(Path(name), warm_up=bool({"build", "short", "packing"} & {*args.only}))
        record = partial(sides.record, args.results)
        typed = partial(sides.typed, "data.py", "--rounds", args.rounds, "--only")
        if "build" in args.only:
            table = building(bench, data_inputs.chats(args.data)["gsm8k"], args.copies, args.rounds)
            options = () if args.copies == data_inputs.COPIES else ("--copies", args.copies)
            record("text to cache", "text to cache, two processes", FROM_DATA, typed("build", *options), table)
        if "tokenizer" in args.only:
            file = bench.write_copies(data_inputs.chats(args.data)["gsm8k"], args.copies)
            options = () if args.copies == data_inputs.COPIES else ("--copies", args.copies)
            title = "a build with the word cache and without it"
            record("word cache", title, FROM_BUILD, typed("tokenizer", *options), tokenizing(bench, file, args.rounds))
        if "checks" in args.only:
            file = bench.write_copies(data_inputs.chats(args.data)["gsm8k"], args.copies)
            options = () if args.copies == data_inputs.COPIES else ("--copies", args.copies)
            table = comparing(bench, file, args.base.resolve(), args.rounds)
            title = "a build beside that of an earlier checkout"
            record("cost of the checks", title, FROM_BUILD, typed("checks", *options, "--base", "FOLDER"), table)
        if "short" in args.only:
            file = data_inputs.write_short(bench.folder / "short.jsonl", args.short_documents)
            title = f"{args.short_documents:,} short documents to cache, two processes"
            table = compared(bench, file, args.rounds)
            options = ("--short-documents", args.short_documents)
            record("short documents", title, FROM_DATA, typed("short", *options), table)
        if "packing" in args.only:
            options = () if args.row_lengths == ROW_LENGTHS else ("--row-lengths", *args.row_lengths)
            table = packing(bench, args.data, args.row_lengths)
            record("packing waste", "packing waste", FROM_DATA, typed("packing", *options), table)
        if "loader" in args.only:
            record(
                "the loader's share of a step",
                "the loader's share of a step",
                sides.FROM_TRAIN,
                typed("loader"),
                loading(bench.folder),
            )
        if "open" in args.only:
            title = "opening a cache of 100,000 rows"
            record("opening a cache", title, FROM_FUNCTIONS, typed("open"), opening(bench.folder, args.rounds))


class Bench:
    """Runs both sides on a file of rows, with empty caches each time.

    A first command, which is not measured, converts the tokenizer; `warm_up` also runs each side once.
    """

    def __init__(self, folder: Path, warm_up: bool) -> None:
        self.folder = folder
        self.model = ""
        pairs = [(f"What is {number} and {number}?", f"It is {2 * number}.") for number in range(1000)]
        file = data_inputs.write_chats(folder / "first.jsonl", pairs)
        settings = ["data=jsonl", f"data.path={file}", "model=demo"]
        launcher = [sys.executable, "-m", "launcher"]
        sides.run([*launcher, "data", *settings], folder / "first.log", self._environment())
        plan = json.loads(sides.run([*launcher, "plan", "--json", *settings], folder / "first.log", self._environment()))
        self.model = plan["model"]["path"]
        for run in self.sides().values() if warm_up else ():
            run(file, MAX_LENGTH)

    def sides(self) -> dict[str, Any]:
        return {**({TRL: self.trl} if sides.has_trl() else {}), LAUNCHER: self.launcher}

    def launcher(self, rows: Path, max_length: int, *overrides: str) -> tuple[Cost, dict[str, Any]]:
        """Return the cost of `launcher data`, and its report."""
        # TRL concatenates text prompts and completions unchanged.
        source = f"data.sources=[{{name: train, path: {rows}, completions: text}}]"
        settings = ["data=jsonl", "data.path=null", source, f"model.path={self.model}", f"data.workers={PROCESSES}"]
        command = [sys.executable, "-m", "launcher", "data", *settings, f"data.max_length={max_length}", *overrides, "--json"]
        cost, output = sides.measure(
            command, self.folder / "launcher.log", self._environment(LAUNCHER_CACHE=self._without_data("launcher"))
        )
        return cost, json.loads(output)

    def trl(self, rows: Path, max_length: int) -> tuple[Cost, list[str]]:
        """Return the cost of map_and_pack.py, and the files of its packed rows."""
        script = [sys.executable, str(sides.HERE / "map_and_pack.py"), str(rows), self.model, str(max_length)]
        command = [*script, f"--processes={PROCESSES}"]
        cost, output = sides.measure(
            command, self.folder / "trl.log", self._environment(HF_DATASETS_CACHE=self._emptied("datasets"))
        )
        return cost, json.loads(output.splitlines()[-1])

    def write_copies(self, pairs: list[tuple[str, str]], num_copies: int) -> Path:
        return data_inputs.write_chats(self.folder / "chats.jsonl", data_inputs.copies(pairs, num_copies))

    def build_cpu(self, rows: Path, *options: str) -> dict[str, Any]:
        """Return the figures of build_cpu.py."""
        script = [sys.executable, str(sides.HERE / "build_cpu.py"), str(rows), self.model, str(MAX_LENGTH), *options]
        environment = self._environment(LAUNCHER_CACHE=self._emptied("launcher"))
        measured: dict[str, Any] = json.loads(sides.run(script, self.folder / "build_cpu.log", environment).splitlines()[-1])
        return measured

    def _environment(self, **variables: str) -> dict[str, str]:
        return sides.user_environment(self.folder, HF_HUB_OFFLINE="1", **variables)

    def _without_data(self, name: str) -> str:
        """Return a launcher cache in which the model's weights are already checked, without data."""
        shutil.rmtree(self.folder / name / "data", ignore_errors=True)
        return str(self.folder / name)

    def _emptied(self, name: str) -> str:
        folder = self.folder / f"{name}-cache"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return str(folder)


def building(bench: Bench, pairs: list[tuple[str, str]], num_copies: int, rounds: int) -> list[str]:
    file = bench.write_copies(pairs, num_copies)
    return [
        *compared(bench, file, rounds),
        f"The documents are {num_copies} copies of gsm8k as chats, with different numbers in each copy.",
    ]


def compared(bench: Bench, file: Path, rounds: int) -> list[str]:
    """Return a table of both sides' costs over the rounds.

    Raises:
        SystemExit: if the sides produced different token ids.
    """
    costs: dict[str, list[Cost]] = {}
    made: set[tuple[int, int, str]] = set()
    report: dict[str, Any] = {}
    for number in range(rounds):
        for side, run in bench.sides().items():
            cost, result = run(file, MAX_LENGTH)
            costs.setdefault(side, []).append(cost)
            if side == LAUNCHER:
                report = result
                made.add(data_inputs.digest(data_inputs.launcher_documents(report)))
            else:
                made.add(data_inputs.digest(data_inputs.packed_documents(result)))
            figures = f"{cost.seconds:.2f} s, {cost.cpu_s:.2f} s of CPU, {cost.peak_mib:.0f} MiB"
            print(f"round {number + 1}: {side}: {figures}", flush=True)
    if len(made) != 1:
        raise SystemExit(f"the sides made different token ids (documents, tokens, digest): {sorted(made)}")
    num_documents, num_tokens, _ = made.pop()
    held_out = report["held_out"]["documents"]
    same = f"{num_documents:,} documents, {num_tokens:,} tokens; " + ("both sides produce the same ids. " if TRL in costs else "")
    more = f"The launcher also makes the loss masks, checks and compares documents, and holds {held_out:,} of them out."
    return [*cost_table(costs), "", same + more]


def cost_table(costs: dict[str, list[Cost]]) -> list[str]:
    """Return medians and ranges over rounds, and the ratios of paired rounds."""
    names = ("s", "CPU s", "peak MiB of all processes", "MiB of the largest process")
    head = [f"| side | {' | range | '.join(names)} | range |", "|---" * (2 * len(names) + 1) + "|"]
    digits = (2, 2, 0, 0)
    lines = [
        f"| {side} | {' | '.join(map(_spread, zip(*map(astuple, taken), strict=True), digits))} |"
        for side, taken in costs.items()
    ]
    if TRL not in costs:
        return [*head, *lines]
    pairs = [
        [a / b for a, b in zip(astuple(theirs), astuple(ours), strict=True)]
        for theirs, ours in zip(costs[TRL], costs[LAUNCHER], strict=True)
    ]
    ratios = [_spread(values, 2) for values in zip(*pairs, strict=True)]
    return [*head, *lines, f"| {TRL} / launcher, pairs | {' | '.join(ratios)} |"]


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} | {min(values):.{digits}f} to {max(values):.{digits}f}"


def tokenizing(bench: Bench, file: Path, rounds: int) -> list[str]:
    """Return the CPU seconds of builds with and without the word cache, in turns.

    Raises:
        SystemExit: if the two sides built different caches.
    """
    options = {ENCODE_BATCH: ("--without-word-cache",), WORD_CACHE: ()}
    cpu_s: dict[str, list[float]] = {side: [] for side in options}
    built = set()
    for number in range(rounds):
        for side, flags in options.items():
            measured = bench.build_cpu(file, *flags)
            cpu_s[side].append(measured["cpu_s"])
            built.add((measured["documents"], measured["tokens"], measured["digest"]))
            print(f"round {number + 1}: {side}: {measured['cpu_s']:.2f} s of CPU", flush=True)
    if len(built) != 1:
        raise SystemExit(f"the sides built different caches (documents, tokens, digest): {sorted(built)}")
    num_documents, num_tokens, _ = built.pop()
    ratios = [plain / cached for plain, cached in zip(cpu_s[ENCODE_BATCH], cpu_s[WORD_CACHE], strict=True)]
    return [
        "| side | CPU s | range |",
        "|---|---|---|",
        *(f"| {side} | {_spread(values, 2)} |" for side, values in cpu_s.items()),
        f"| {ENCODE_BATCH} / {WORD_CACHE}, pairs | {_spread(ratios, 2)} |",
        "",
        f"{num_documents:,} documents to train on, {num_tokens:,} tokens; both sides build the same cache.",
    ]


def comparing(bench: Bench, file: Path, base: Path, rounds: int) -> list[str]:
    """Return the CPU seconds of builds with this launcher and the one in the checkout `base`, in turns."""
    options = {"earlier": (f"--checkout={base}",), "this": ()}
    cpu_s: dict[str, list[float]] = {side: [] for side in options}
    num_documents: dict[str, int] = {}
    for number in range(rounds):
        for side, flags in list(options.items())[:: -1 if number % 2 else 1]:
            measured = bench.build_cpu(file, *flags)
            cpu_s[side].append(measured["cpu_s"])
            num_documents[side] = measured["documents"]
            print(f"round {number + 1}: {side}: {measured['cpu_s']:.2f} s of CPU", flush=True)
    ratios = [this / earlier for this, earlier in zip(cpu_s["this"], cpu_s["earlier"], strict=True)]
    return [
        "| side | documents | CPU s | range |",
        "|---|---|---|---|",
        *(f"| {side} | {num_documents[side]:,} | {_spread(values, 2)} |" for side, values in cpu_s.items()),
        f"| this / earlier, pairs | | {_spread(ratios, 3)} |",
    ]


def packing(bench: Bench, data: Path, row_lengths: Sequence[int]) -> list[str]:
    """Return rows and waste of both sides on the same documents; every round gives the same."""
    columns = (
        "data, row length | documents | rows, launcher | TRL | fewest | waste, launcher | TRL | by longest row, launcher | TRL"
    )
    lines = [f"| {columns} |", "|---" * 9 + "|"]
    for name, pairs in data_inputs.chats(data).items():
        file = data_inputs.write_chats(bench.folder / f"{name}.jsonl", pairs)
        lines += [_packed(bench, f"{name}, {length}", file, length) for length in row_lengths]
    return [
        *lines,
        "",
        "Waste is 1 - tokens / (rows x length), with the configured length or with that of the longest row. Fewest is "
        "ceil(tokens / length): no packing makes fewer rows, so if the launcher makes that many, its waste with the configured "
        "length is the least possible.",
    ]


def _packed(bench: Bench, name: str, file: Path, length: int) -> str:
    _, report = bench.launcher(file, length, "data.eval_fraction=0")
    rows, tokens = [report["rows"]], report["tokens"]
    waste = [1 - tokens / (report["rows"] * length)]
    by_longest = [1 - report["fill_frac"]]
    if sides.has_trl():
        _, files = bench.trl(file, length)
        widths = [int(sum(row["seq_lengths"])) for row in data_inputs.packed_rows(files)]
        if sum(widths) != tokens:
            raise SystemExit(f"{name}: the launcher packed {tokens:,} tokens, TRL {sum(widths):,}")
        rows.append(len(widths))
        waste.append(1 - tokens / (len(widths) * length))
        by_longest.append(1 - tokens / (len(widths) * max(widths)))
    both = [_pair([f"{count:,}" for count in rows]), f"{-(-tokens // length):,}"]
    both += [_pair([f"{share:.3%}" for share in shares]) for shares in (waste, by_longest)]
    line = f"| {name} | {report['documents']:,} | {' | '.join(both)} |"
    print(line, flush=True)
    return line


def _pair(cells: list[str]) -> str:
    """Return both sides' cells; TRL's is empty if it is not installed."""
    return " | ".join([*cells, ""][:2])


def opening(folder: Path, rounds: int) -> list[str]:
    """Return the cost of opening a cache of 100,000 rows of 1,024 tokens, with two ranks at a time."""
    made = folder / "cache"
    num_rows, length = 100_000, 1024
    starts = np.arange(num_rows + 1) * length
    docs = np.arange(4 * num_rows + 1) * (length // 4)

    def parts(dtype: type) -> Iterator[np.ndarray]:
        return (np.full(1000 * length, 1, dtype) for _ in range(num_rows // 1000))

    digest = write_split(
        made, parts(np.uint32), parts(np.uint8), rows=starts, docs=docs,
        columns={"source": np.zeros(4 * num_rows), "num_trained": np.full(4 * num_rows, length // 4)},
    )  # fmt: skip
    command = [sys.executable, str(sides.HERE / "open_cache.py"), str(made), digest]
    measured = [json.loads(sides.run(command, folder / "open.log")) for _ in range(rounds)]
    names = {
        "open_ms": "open, ms",
        "added_mb": "added memory by that, MB",
        "step_0_ms": "first batch, ms",
        "step_100000_ms": "batch of step 100,000, ms",
        "step_1_ms": "next batch, ms",
        "step_100001_ms": "batch of step 100,001, ms",
        "own_mb": "added own memory after all batches, MB",
    }
    lines = ["| what | median | range |", "|---|---|---|"]
    for key, shown in names.items():
        values = [one[key] for one in measured]
        lines.append(f"| {shown} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")
    return [
        *lines,
        "",
        "Rows of 1,024 tokens; a batch is 64 rows over 2 ranks; the order of an epoch is made with its first batch.",
    ]


def loading(folder: Path) -> list[str]:
    """Return `time/data_s` of a training run of the demonstration model."""
    root = folder / "runs"
    settings = ("model=demo", "data=stdlib_docs", "data.max_length=256", "train.global_batch_size=8", "train.max_steps=4")
    quiet = ("train.epochs=null", "tracking=none", "eval.at_start=false", "eval.sample=false", "export.enabled=false")
    command = [sys.executable, "-m", "launcher", "train", *settings, *quiet, f"run.root={root}", "run.name=bench"]
    sides.run(command, folder / "train.log")
    steps = [line for line in read_metrics(root / "bench" / "metrics.jsonl") if "time/data_s" in line]
    shares = [line["time/data_s"] / line["time/step_s"] for line in steps]
    lines = ["| step | s | of which data, ms | share |", "|---|---|---|---|"]
    for line, share in zip(steps, shares, strict=True):
        lines.append(
            f"| {line['trainer/step']:.0f} | {line['time/step_s']:.2f} | {1000 * line['time/data_s']:.2f} | {share:.4%} |"
        )
    return [*lines, "", f"Largest share: {max(shares):.4%}."]


if __name__ == "__main__":
    main()
