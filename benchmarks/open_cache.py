"""Open a data cache in a separate process, as a rank does at its start; run by benchmarks/data.py.

python benchmarks/open_cache.py CACHE DIGEST
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def open_cache(folder: str, digest: str) -> dict[str, float]:
    """Return the milliseconds and added MB for opening the cache and for reading batches far apart.

    `added_mb` is the memory that opening adds. `own_mb` is the process's private memory after all batches, without the pages of
    the cache's files, which the system shares between ranks and reclaims when necessary.
    """
    import torch

    from launcher.data.loader import TrainBatches
    from launcher.data.split import Split
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
    # Exclude the memory that torch allocates when it is first used.
    torch.zeros(8).sum()
    rss, own = resident_mb()
    times = {}
    began = time.perf_counter()
    split = Split.open(facts)
    batches = TrainBatches(split, batch, seed=1, data_rank=0, data_ranks=2, pad_id=0)
    times["open_ms"] = (time.perf_counter() - began) * 1000
    times["added_mb"] = resident_mb()[0] - rss
    for step in (0, 1, 100_000, 100_001):
        began = time.perf_counter()
        batches.step(step)
        times[f"step_{step}_ms"] = (time.perf_counter() - began) * 1000
    return {**times, "own_mb": resident_mb()[1] - own}


def resident_mb() -> tuple[float, float]:
    """Return the total and the private resident memory of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    rss, own = (int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "RssAnon"))
    return rss, own


if __name__ == "__main__":
    print(json.dumps(open_cache(*sys.argv[1:])))
