"""One rank of the checkpoint tests: a real ZeRO-3 engine over gloo. Run as `python checkpoint_ranks.py SCENARIO FOLDER`."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch._dynamo  # a lazy import of it inside zero.Init fails
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from launcher.checkpoint import shards, store, zero3
from launcher.errors import CheckpointError

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PLAN = "digest-of-the-plan"
VOCAB = 511
# Odd sizes: on two ranks almost every parameter is padded. The norms (27) are persistent, the rest is partitioned.
LLAMA = {
    "hidden_size": 27,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    # Dropout makes every loss depend on the random-generator state.
    "attention_dropout": 0.1,
    "initializer_range": 0.2,
}


def deepspeed_config(kind: str) -> dict:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100, "sub_group_size": 4000, "overlap_comm": False}
    if kind == "offload":
        zero["offload_optimizer"] = {"device": "cpu"}
    if kind == "hpz":
        zero["zero_hpz_partition_size"] = 2
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
    }
    return config if kind == "fp32" else config | {"bf16": {"enabled": True}}


def build(kind: str):
    """fp32: untied embeddings; bf16: tied; hpz: bf16 with second copies; offload: bf16 with DeepSpeed's compiled CPU Adam."""
    torch.manual_seed(7 + RANK)
    config = deepspeed_config(kind)
    # DeepSpeed refuses a second engine with hpZ in one process while this is set.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    llama = LlamaConfig(**LLAMA, tie_word_embeddings=kind != "fp32", dtype="float32" if kind == "fp32" else "bfloat16")
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AutoModelForCausalLM.from_config(llama)
    decay = [p for p in model.parameters() if len(p.ds_shape) > 1]
    plain = [p for p in model.parameters() if len(p.ds_shape) == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    if kind == "offload":
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def names(engine) -> dict[str, torch.nn.Parameter]:
    return dict(engine.module.named_parameters())


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + RANK)
    return torch.randint(0, VOCAB, (2, 16), generator=generator)


def train(engine, first: int, last: int) -> list[float]:
    engine.train()
    losses = []
    for step in range(first, last + 1):
        ids = tokens(step)
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def probe_of(engine) -> dict[str, torch.Tensor]:
    engine.eval()
    ids = torch.arange(24).unsqueeze(0) * 17 % VOCAB
    positions = torch.cat([torch.arange(14), torch.arange(10)]).unsqueeze(0)
    with torch.no_grad():
        logits = engine(input_ids=ids, position_ids=positions, use_cache=False).logits
    engine.train()
    return {"input_ids": ids, "position_ids": positions, "logits": logits}


def dump(engine, path: Path) -> None:
    """Full fp32 weights, both moments, and the low-precision weights that the model computes with, as rank 0 sees them."""
    tensors = {}
    for name, parameter in names(engine).items():
        tensors[f"{name}|fp32"] = safe_get_full_fp32_param(parameter).clone()
        for key in zero3.MOMENTS:
            tensors[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            tensors[f"{name}|compute"] = parameter.detach().clone()
    if RANK == 0:
        save_file(tensors, path)


def report(folder: Path, name: str, content: object) -> None:
    (folder / f"{name}-{RANK}.json").write_text(json.dumps(content))


def save(engine, folder: Path, step: int, **parts):
    parts = {"plan_digest": PLAN, "attempt": 1, "extra_state": {"seen": step}, "keep_last": 3} | parts
    return shards.save(engine, names(engine), folder / "checkpoints", step=step, **parts)


def failing(action) -> list[str]:
    try:
        action()
    except CheckpointError as error:
        return [str(p) for p in error.problems]
    return []


def straight(kind: str, folder: Path) -> None:
    """Four steps without interruption; then, from the same start, two steps, a save, saves that fail, and a kill in a save."""
    folder.mkdir(exist_ok=True)
    engine = build(kind)
    report(folder, "losses", train(engine, 1, 4))
    dump(engine, folder / "straight.safetensors")
    engine.destroy()

    engine = build(kind)
    start = save(engine, folder, 0)
    train(engine, 1, 2)
    probe = probe_of(engine)
    result = save(engine, folder, 2, probe=probe)
    report(folder, "saved", {"path": str(result.path), "bytes": result.bytes, "seconds": result.seconds})
    dump(engine, folder / "saved.safetensors")
    train(engine, 3, 3)
    if kind == "fp32":
        failures = {"disk": failing(lambda: with_small_files(lambda: save(engine, folder, 3)))}
        failures["space"] = failing(lambda: with_free_bytes(1000, lambda: save(engine, folder, 3)))
        some = dict(list(names(engine).items())[1:])
        failures["names"] = failing(
            lambda: shards.save(
                engine, some, folder / "checkpoints", step=3, plan_digest=PLAN, attempt=1, extra_state={}, keep_last=1
            )
        )
        failures["json"] = failing(lambda: save(engine, folder, 3, extra_state={"x": object()}))
        report(folder, "failures", failures)
    report(folder, "losses-last", train(engine, 4, 4))
    # Back to step 2 in an engine that has weights gathered and second copies of them.
    shards.load(engine, names(engine), result.path)
    report(folder, "losses-back", train(engine, 3, 4))
    shards.load(engine, names(engine), start.path)
    report(folder, "losses-again", train(engine, 1, 2))
    engine.destroy()


def with_small_files(action) -> None:
    """Rank 1 cannot write files of more than 4 KiB, like a disk that fills up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if RANK == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def with_free_bytes(num_bytes: int, action) -> None:
    original = store.shutil.disk_usage
    store.shutil.disk_usage = lambda path: original(path)._replace(free=num_bytes)
    try:
        action()
    finally:
        store.shutil.disk_usage = original


def killed(kind: str, folder: Path) -> None:
    """Rank 0 dies after every byte is written and before the commit."""
    engine = build(kind)
    train(engine, 1, 3)
    store.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(engine, folder, 3)


def resume(kind: str, folder: Path) -> None:
    engine = build(kind)
    checkpoint = store.latest(folder / "checkpoints").path
    refused = failing(lambda: shards.load(engine, names(engine), checkpoint, plan_digest="another"))
    damaged = damaged_copy(checkpoint, folder / "damaged" / checkpoint.name)
    refused += failing(lambda: shards.load(engine, names(engine), damaged, plan_digest=PLAN))
    extra = shards.load(engine, names(engine), checkpoint, plan_digest=PLAN)
    dump(engine, folder / "loaded.safetensors")
    logits = probe_of(engine)["logits"]
    report(folder, "resumed", {"extra": extra, "refused": refused, "step": engine.global_steps, "losses": train(engine, 3, 4)})
    if RANK == 0:
        save_file({"logits": logits}, folder / "logits.safetensors")
    dump(engine, folder / "resumed.safetensors")
    before = held_bytes(engine)
    zero3.release(engine)
    report(folder, "released", {"before": before, "after": held_bytes(engine)})
    engine.destroy()


def held_bytes(engine) -> int:
    """Bytes of the weights, in both precisions, and of the moments."""
    zero = engine.optimizer
    moments = [t for state in zero.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
    tensors = [*zero.fp32_partitioned_groups_flat, *(p.ds_tensor for p in engine.module.parameters()), *moments]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def damaged_copy(checkpoint: Path, target: Path) -> Path:
    """A copy with one flipped bit in the shard of rank 1."""
    if RANK == 0:
        shutil.copytree(checkpoint, target)
        shard = target / store.shard_name(1)
        content = bytearray(shard.read_bytes())
        content[20_000] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    return target


def move(kind: str, folder: Path, source: str, target: str) -> None:
    """Load on another number of ranks, save there, and train on."""
    engine = build(kind)
    shards.load(engine, names(engine), store.at_step(folder / source, 2).path)
    dump(engine, folder / f"{target}.safetensors")
    shards.save(engine, names(engine), folder / target, step=2, plan_digest=PLAN, attempt=2, extra_state={}, keep_last=1)
    report(folder, f"{target}-losses", train(engine, 3, 4))
    engine.destroy()


def main(scenario: str, folder: Path) -> None:
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=RANK,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    for kind in os.environ["KINDS"].split(","):
        of_kind = folder / kind
        if scenario == "shrink":
            move(kind, of_kind, "checkpoints", "one")
        elif scenario == "grow":
            move(kind, of_kind, "one", "two")
        else:
            {"straight": straight, "killed": killed, "resume": resume}[scenario](kind, of_kind)
    dist.barrier()
    sys.stdout.flush()
    # Threads of destroyed engines are still alive in C++ and would abort an orderly exit now and then.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
