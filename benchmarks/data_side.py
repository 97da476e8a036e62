"""One side of benchmarks/data.py, in a process of its own; prints when the work began and when its result lay on disk.

python benchmarks/data_side.py launcher|datasets CHATS TOKENIZER MAX_LENGTH FOLDER   from text to packed rows
python benchmarks/data_side.py open CACHE                                            what a rank does at its start
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

PROCESSES = 2


def main(side: str, *arguments: str) -> None:
    began = time.time()
    if side == "open":
        print(json.dumps(open_cache(*arguments)))
        return
    work, digest = {"launcher": with_launcher, "datasets": with_datasets}[side](*arguments)
    called = time.time()
    with cpu_of_children() as children:
        result = work()
    ended = time.time()
    figures = {"imports_s": called - began, "call_s": ended - called, "ended": ended}
    figures["cpu_s"] = time.process_time() + sum(children.values())
    print(json.dumps({**figures, "documents": digest(result)}))


@contextlib.contextmanager
def cpu_of_children() -> Iterator[dict[int, float]]:
    """CPU seconds of each process below this one, filled in while the block runs; the last fifth of a second may be missing."""
    found: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[child.pid] = sum(child.cpu_times()[:2])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def with_launcher(chats: str, tokenizer: str, max_length: str, folder: str):
    """The launcher's build, into an empty cache in `folder`."""
    os.environ["LAUNCHER_CACHE"] = folder
    from launcher.config.data import DataSection, Source
    from launcher.data.build import build
    from launcher.data.cache import Split

    source = Source(path=chats, format="messages")
    data = DataSection(sources=(source,), max_length=int(max_length), workers=PROCESSES)

    def digest(facts) -> str:
        split = Split.open(facts)
        return _digest(split.tokens[a:b].tolist() for a, b in zip(split.docs[:-1], split.docs[1:], strict=True))

    return lambda: build(data, tokenizer), digest


def with_datasets(chats: str, tokenizer: str, max_length: str, folder: str):
    """What a person writes with the libraries: load, map in batches and processes, pack."""
    import datasets
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    datasets.disable_progress_bars()

    def work():
        loaded = AutoTokenizer.from_pretrained(tokenizer)

        def tokenise(batch):
            texts = loaded.apply_chat_template(batch["messages"], tokenize=False)
            return loaded(texts, add_special_tokens=False)

        rows = load_dataset("json", data_files=chats, split="train", cache_dir=folder)
        tokens = rows.map(tokenise, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names)
        return pack_dataset(tokens.select_columns(["input_ids"]), seq_length=int(max_length), strategy="bfd")

    def digest(packed) -> str:
        def documents():
            for row in packed:
                start = 0
                for length in row["seq_lengths"]:
                    yield row["input_ids"][start : start + length]
                    start += length

        return _digest(documents())

    return work, digest


def _digest(documents: Iterable[list[int]]) -> str:
    """The same for the same documents in any order."""
    each = sorted(hashlib.blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest() for ids in documents)
    return f"{len(each)} {hashlib.blake2b(''.join(each).encode(), digest_size=8).hexdigest()}"


def open_cache(folder: str, digest: str) -> dict[str, float]:
    """Milliseconds and MB of added memory for opening the cache, and for batches far apart in it.

    `added_mb` is all that opening has added; `own_mb` what lies in this process's own memory after all batches, without the
    pages of the cache's files, which the system shares between ranks and takes back when it needs room.
    """
    import torch

    from launcher.data.cache import Split
    from launcher.data.loader import TrainBatches
    from launcher.plan.launch_plan import Batch, DataFacts

    batch = Batch(
        global_batch_size=64,
        micro_batch_size=4,
        accumulation=8,
        max_tokens_per_step=0,
        tokens_per_step=None,
        max_steps=1,
        epochs=None,
    )
    # What torch takes when it is first used belongs to no cache.
    torch.zeros(8).sum()
    rss, own = resident_mb()
    times = {}
    began = time.perf_counter()
    split = Split.open(DataFacts.model_construct(cache_dir=folder, digest=digest))
    batches = TrainBatches(split, batch, seed=1, rank=0, world_size=2, pad_id=0)
    times["open_ms"] = (time.perf_counter() - began) * 1000
    times["added_mb"] = resident_mb()[0] - rss
    for step in (0, 1, 100_000, 100_001):
        began = time.perf_counter()
        batches.step(step)
        times[f"step_{step}_ms"] = (time.perf_counter() - began) * 1000
    return {**times, "own_mb": resident_mb()[1] - own}


def resident_mb() -> tuple[float, float]:
    """(all, own) resident memory of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    rss, own = (int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "RssAnon"))
    return rss, own


if __name__ == "__main__":
    main(*sys.argv[1:])
