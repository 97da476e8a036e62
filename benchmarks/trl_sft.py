"""TRL's SFTTrainer on the same data and model: ZeRO-3, the same dtype, packed rows, loss on the completion only.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/trl_sft.py --model DIR --data CHATS.jsonl --deepspeed DS.json

CHATS.jsonl has one {"prompt": [messages], "completion": [messages]} per line. Tokens are counted without padding.
Rank 0 prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from typing import Any

import deepspeed
import torch
import torch._dynamo  # DeepSpeed patches tensor constructors; a later import of dynamo would fail on them.
import torch.distributed as dist
from datasets import load_dataset
from steps import peak_gib, start_of_process, summarize
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class CountingTrainer(SFTTrainer):
    """Counts this rank's tokens without padding, per micro-batch."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Packed rows arrive as one flat row, padded with zero positions at its end. Counting does not wait for the GPU.
        positions = inputs["position_ids"][0]
        counts = torch.arange(1, len(positions) + 1, device=positions.device)
        self.seen = [*getattr(self, "seen", []), (counts * (positions != 0)).max()]
        return super().training_step(model, inputs, *args, **kwargs)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []
        self.began = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.time())


def main() -> None:
    args = _arguments()
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*|.*_(all_gather|reduce_scatter)_base.*")
    with open(args.deepspeed) as file:
        config = json.load(file)
    # On CPUs it would compile a kernel for tensor parallelism first, which takes a minute.
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingTrainer(
            model=args.model,
            args=_settings(args, config, folder),
            train_dataset=load_dataset("json", data_files=args.data, split="train", cache_dir=folder),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[clock],
        )
        if trainer.accelerator.num_processes != dist.get_world_size():
            raise SystemExit("the trainer does not see all ranks: each would train the same rows")
        trainer.train()
    accumulation = config["gradient_accumulation_steps"]
    tokens = torch.stack(trainer.seen).reshape(args.steps, accumulation).sum(1)
    dist.all_reduce(tokens)
    if dist.get_rank() == 0:
        started = start_of_process()
        figures = summarize(started, clock.began, clock.times, tokens.tolist(), args.warmup)
        measured = {"began": clock.began, "times": clock.times, "tokens": tokens.tolist(), "peak_gib": peak_gib()}
        print(json.dumps({**measured, **figures}))
    dist.barrier()
    dist.destroy_process_group()


def _settings(args: argparse.Namespace, config: dict[str, Any], folder: str) -> SFTConfig:
    return SFTConfig(
        output_dir=folder,
        max_steps=args.steps,
        max_length=args.max_length,
        packing=True,
        completion_only_loss=True,
        bf16="bf16" in config,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=config,
        per_device_train_batch_size=config["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        max_grad_norm=config["gradient_clipping"],
        gradient_checkpointing=args.recompute,
        learning_rate=args.lr,
        optim="adamw_torch_fused",
        model_init_kwargs={
            "dtype": torch.bfloat16 if "bf16" in config else torch.float32,
            "attn_implementation": args.attention,
            "use_cache": False,
        },
        **({"use_liger_kernel": True} if args.liger else {}),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        seed=42,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--data", required=True, help="JSONL file of prompts and completions")
    parser.add_argument("--deepspeed", required=True, help="DeepSpeed's JSON configuration")
    parser.add_argument("--max-length", type=int, default=256, help="tokens in a packed row")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--attention", default="sdpa", help="attention kernel of transformers")
    parser.add_argument("--liger", action="store_true", help="use Liger's kernels")
    parser.add_argument("--recompute", action="store_true", help="recompute activations, which is TRL's default")
    return parser.parse_args()


if __name__ == "__main__":
    main()
