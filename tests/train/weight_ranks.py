"""One rank that builds models under ZeRO-3: `python weight_ranks.py FOLDER...`, with RANK, WORLD_SIZE and RENDEZVOUS set.

Prints one JSON value per folder: what the refusal says, or null where the model was built.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from launcher.config.schema import ModelSection
from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts
from launcher.train.model import build_model


def main(folders: list[str]) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{os.environ['RENDEZVOUS']}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    settings = {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    partitioned = HfDeepSpeedConfig(settings)
    for folder in folders:
        facts = model_facts(json.loads((Path(folder) / "config.json").read_text()), folder, folder, None)
        try:
            build_model(ModelSection(path=folder, dtype="fp32"), facts, "cpu", chunk_tokens=64)
        except ConfigError as error:
            print(json.dumps(error.problems[0].what), flush=True)
        else:
            print(json.dumps(None), flush=True)
    del partitioned


if __name__ == "__main__":
    main(sys.argv[1:])
