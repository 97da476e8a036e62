"""A bare DeepSpeed ZeRO-3 training loop, the launcher's baseline: no tracking, no checkpoints, no checks.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/bare_loop.py --model DIR --rows ROWS.npz --deepspeed DS.json

ROWS.npz holds input_ids, position_ids and labels [rows, T] (labels as Hugging Face takes them, unshifted) and
lengths [rows] (tokens without padding). Step s takes rows s * G to (s + 1) * G; rank r of micro-batch m takes the
(m * world + r)-th group of them. Rank 0 prints one JSON object. --save-to calls and times DeepSpeed's own save_checkpoint;
--load-universal starts training from such a checkpoint after ds_to_universal has converted it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
import torch._dynamo  # DeepSpeed patches tensor constructors; a later import of dynamo would fail on them.
import torch.distributed as dist
from steps import peak_gib, start_of_process, summarize
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

TAG = "saved"


def main() -> None:
    found = train(arguments())
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train in the existing process group, or in one that the environment describes. Return the times at which steps end."""
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*|.*_(all_gather|reduce_scatter)_base.*")
    # On CPUs it would compile a kernel for tensor parallelism first, which takes a minute.
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    with open(args.deepspeed) as file:
        config = json.load(file)
    if args.load_universal:
        config["checkpoint"] = {"load_universal": True}
    engine = _engine(args, config)
    if args.load_universal:
        engine.load_checkpoint(args.load_universal, tag=TAG)
    rows = dict(np.load(args.rows))
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    size = micro * accumulation * world
    times, tokens, saves = [], [], []
    began = time.time()
    for step in range(args.steps):
        batch = np.arange(step * size, (step + 1) * size).reshape(accumulation, world, micro)
        for mine in batch[:, rank]:
            width = int(rows["lengths"][mine].max())
            inputs = {
                name: torch.from_numpy(rows[name][mine, :width]).to(engine.device)
                for name in ("input_ids", "position_ids", "labels")
            }
            engine.backward(engine(**inputs, use_cache=False).loss)
            engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.time())
        tokens.append(int(rows["lengths"][batch].sum()))
        if args.save_to and (step + 1) % args.save_every == 0:
            saves.append(_save(engine, args.save_to))
    started = start_of_process()
    figures = summarize(started, began, times, tokens, args.warmup)
    return {"began": began, "times": times, "tokens": tokens, "saves": saves, "peak_gib": peak_gib(), **figures}


def _save(engine: Any, folder: str) -> float:
    """Return the seconds that training waits for DeepSpeed's own checkpoint, with no earlier writes pending."""
    os.sync()
    dist.barrier()
    began = time.perf_counter()
    engine.save_checkpoint(folder, tag=TAG)
    dist.barrier()
    return time.perf_counter() - began


def _engine(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    partitioned = HfDeepSpeedConfig(config)
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=args.attention)
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    del partitioned
    return engine


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--rows", required=True, help=".npz file of packed rows")
    parser.add_argument("--deepspeed", required=True, help="DeepSpeed's JSON configuration")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--attention", default="sdpa", help="attention kernel; FlashAttention needs one row at a time")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--save-to", metavar="DIR", help="save with DeepSpeed's save_checkpoint, each time under the same tag")
    parser.add_argument("--save-every", type=int, default=1, metavar="STEPS")
    parser.add_argument("--load-universal", metavar="DIR", help="folder that ds_to_universal has written, under the same tag")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
