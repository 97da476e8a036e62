"""What a rank does with a data cache at its start, in a process of its own: benchmarks/data.py runs it.

python benchmarks/open_cache.py CACHE DIGEST
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def open_cache(folder: str, digest: str) -> dict[str, float]:
    """Milliseconds and MB of added memory for opening the cache, and for batches far apart in it.

    `added_mb` is all that opening has added; `own_mb` what lies in this process's own memory after all batches, without the
    pages of the cache's files, which the system shares between ranks and takes back when it needs room.
    """
    import torch

    from launcher.data.cache.split import Split
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
    facts = DataFacts.model_construct(cache_dir=folder, digest=digest)
    # What torch takes when it is first used belongs to no cache.
    torch.zeros(8).sum()
    rss, own = resident_mb()
    times = {}
    began = time.perf_counter()
    split = Split.open(facts)
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
    print(json.dumps(open_cache(*sys.argv[1:])))
