"""Ranks of the checkpoint tests: real ZeRO-3 engines over gloo, run by tests/forked_ranks.py."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch._dynamo  # a lazy import of it inside zero.Init fails
import torch.distributed as dist
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from launcher.checkpoint import shards, store, zero3
from launcher.checkpoint.saver import Saved, Saver
from launcher.errors import CheckpointError
from launcher.runs import atomic_files
from launcher.train.engine import import_muon

PLAN = "digest-of-the-plan"
VOCAB = 511
# Odd sizes: on two ranks almost every parameter is padded. The norms (27 elements) are persistent, the rest is partitioned.
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
# Large enough for DeepSpeed to swap: each rank holds at least 1 MiB, of a sub-group in fp32 or of a single parameter in bf16.
SWAPPED = {"hidden_size": 1023, "intermediate_size": 1101, "num_hidden_layers": 1, "initializer_range": 0.02}

# Fetch weights from NVMe when they are used, and release them afterwards, as plans do: see launcher/plan/deepspeed.py.
IN_TURN = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def deepspeed_config(kind: str) -> dict:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100, "sub_group_size": 4000, "overlap_comm": False}
    if kind == "offload":
        zero["offload_optimizer"] = {"device": "cpu"}
    if kind.startswith("nvme"):
        # A separate folder for each call: resumed processes must not find the files of earlier ones on disk.
        place = {"device": "nvme", "nvme_path": str(Path(os.environ["RENDEZVOUS"]).with_name("nvme"))}
        zero |= {"sub_group_size": 300_000, "offload_optimizer": place}
        if kind == "nvme_params":
            zero |= {"offload_param": place | {"max_in_cpu": 0, "buffer_size": 1_200_000}, **IN_TURN}
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
    """Build an engine. fp32: untied embeddings; bf16: tied; hpz: bf16 with secondary partitions; offload: bf16 with CPU Adam.

    nvme: as offload, with optimizer states on disk; nvme_params: compute weights on disk too.
    """
    torch.manual_seed(7 + dist.get_rank())
    config = deepspeed_config(kind)
    # DeepSpeed refuses a second engine with hpZ in one process while this is set.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    sizes = LLAMA | (SWAPPED if kind.startswith("nvme") else {})
    llama = LlamaConfig(**sizes, tie_word_embeddings=kind != "fp32", dtype="float32" if kind == "fp32" else "bfloat16")
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AutoModelForCausalLM.from_config(llama)
    decay = [p for p in model.parameters() if len(p.ds_shape) > 1]
    plain = [p for p in model.parameters() if len(p.ds_shape) == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    if kind in ("offload", "nvme", "nvme_params"):
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    import_muon()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def names(engine) -> dict[str, torch.nn.Parameter]:
    return dict(engine.module.named_parameters())


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(0, VOCAB, (2, 16), generator=generator)


def train(engine, first: int, last: int, saver: Saver | None = None) -> list[float]:
    engine.train()
    losses = []
    for step in range(first, last + 1):
        ids = tokens(step)
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        if saver is not None:
            saver.wait_for_staging()
        engine.step()
        losses.append(loss.item())
    return losses


def reference_logits_of(engine) -> dict[str, torch.Tensor]:
    engine.eval()
    ids = torch.arange(24).unsqueeze(0) * 17 % VOCAB
    positions = torch.cat([torch.arange(14), torch.arange(10)]).unsqueeze(0)
    with torch.no_grad():
        logits = engine(input_ids=ids, position_ids=positions, use_cache=False).logits
    engine.train()
    return {"input_ids": ids, "position_ids": positions, "logits": logits}


def dump(engine, path: Path) -> None:
    """Write what rank 0 sees of the full fp32 weights, both moments, and the low-precision compute weights."""
    tensors = {}
    for name, parameter in names(engine).items():
        tensors[f"{name}|fp32"] = safe_get_full_fp32_param(parameter).clone()
        for key in zero3.find_optimizer(engine).states:
            tensors[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            tensors[f"{name}|compute"] = parameter.detach().clone()
    if dist.get_rank() == 0:
        save_file(tensors, path)


def report(folder: Path, name: str, content: object) -> None:
    (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(content))


def saver_of(engine, root: Path, *, attempt: int = 1, background: bool = False, named=None) -> Saver:
    return Saver(
        engine,
        names(engine) if named is None else named,
        root,
        plan_digest=PLAN,
        attempt=attempt,
        prune=lambda committed: store.prune(root, store.Retention(3), keep=[committed]),
        background=background,
        deadline_s=30,
    )


def save(
    engine, folder: Path, step: int, *, extra_state=None, reference_logits=None, name: str = "checkpoints", **parts
) -> Saved:
    """Save and wait, as at the end of a run."""
    saver = saver_of(engine, folder / name, **parts)
    saver.save(step, {"seen": step} if extra_state is None else extra_state, reference_logits=reference_logits, wait=True)
    return committed(saver)


def committed(saver: Saver) -> Saved:
    outcome = saver.wait()
    if isinstance(outcome, CheckpointError):
        raise outcome
    return outcome


def failing(action) -> list[str]:
    try:
        action()
    except CheckpointError as error:
        return [str(p) for p in error.problems]
    return []


def straight(kind: str, folder: Path) -> None:
    """Train four steps; then, from the same start, train two, save, make further saves fail, continue, and go back."""
    folder.mkdir(exist_ok=True)
    engine = build(kind)
    report(folder, "losses", train(engine, 1, 4))
    report(folder, "on-nvme", on_nvme(engine))
    dump(engine, folder / "straight.safetensors")
    engine.destroy()

    engine = build(kind)
    start = save(engine, folder, 0)
    train(engine, 1, 2)
    reference_logits = reference_logits_of(engine)
    result = save(engine, folder, 2, reference_logits=reference_logits)
    report(folder, "saved", {"path": str(result.path), "bytes": result.bytes, "seconds": result.seconds})
    dump(engine, folder / "saved.safetensors")
    train(engine, 3, 3)
    if kind in ("fp32", "nvme", "nvme_params"):
        failures = {"disk": failing(lambda: with_small_files(lambda: save(engine, folder, 3)))}
        failures["space"] = failing(lambda: with_free_bytes(1000, lambda: save(engine, folder, 3)))
        some = dict(list(names(engine).items())[1:])
        failures["names"] = failing(lambda: saver_of(engine, folder / "checkpoints", named=some))
        failures["json"] = failing(lambda: save(engine, folder, 3, extra_state={"x": object()}))
        report(folder, "failures", failures)
    report(folder, "losses-last", train(engine, 4, 4))
    # Go back to step 2 in an engine that holds gathered weights and secondary partitions.
    shards.load(engine, names(engine), result.path)
    report(folder, "losses-back", train(engine, 3, 4))
    shards.load(engine, names(engine), start.path)
    report(folder, "losses-again", train(engine, 1, 2))
    engine.destroy()


def on_nvme(engine) -> dict[str, int]:
    """Count the optimizer's sub-groups, and the compute weights, that are on NVMe now."""
    zero = engine.optimizer
    flats = [flat for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if zero._swappable_optimizer_subgroup(i)]
    states = zero3.find_optimizer(engine).states
    assert all(flat.numel() == 0 and not any(len(zero.optimizer.state[flat][key]) for key in states) for flat in flats)
    absent = [p for p in names(engine).values() if p.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE]
    return {"sub_groups": len(flats), "of": len(zero.fp32_partitioned_groups_flat), "weights": len(absent)}


def waits(kind: str, folder: Path) -> None:
    """Request a background save of states that cannot be read while training continues."""
    engine = build(kind)
    saver = saver_of(engine, folder / "waited", background=True)
    train(engine, 1, 1)
    saver.save(1, {})
    report(folder, "waited", {"is_there": (folder / "waited" / store.step_name(1)).exists()})
    engine.destroy()


def with_small_files(action) -> None:
    """Run `action` while rank 1 cannot write files larger than 4 KiB, as on a disk that fills up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
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
    """Kill rank 0 after it has written every byte and before the commit."""
    engine = build(kind)
    train(engine, 1, 3)
    store.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(engine, folder, 3)


def background(kind: str, folder: Path) -> None:
    """Save in the background at step 2 and continue training at once; then again at step 3, where rank 1 cannot write."""
    engine = build(kind)
    root = folder / "behind"
    saver = saver_of(engine, root, background=True)
    slow_writes(saver)
    losses = train(engine, 1, 2)
    saver.save(2, {"seen": 2})
    report(folder, "behind-early", {"is_there": (root / store.step_name(2)).exists(), "known": saver.poll() is not None})
    losses += train(engine, 3, 3, saver)
    stall_s = saver._job.stall_s
    atomic_files.fault_point = passing
    # Poll late, and later on one rank than on the other.
    time.sleep(1.5 + dist.get_rank())
    first = committed(saver)
    failures = failing(lambda: with_small_files(lambda: (saver.save(3, {}), train(engine, 4, 4, saver), committed(saver))))
    report(folder, "behind", {"losses": losses, "seconds": first.seconds, "stall_s": stall_s, "failures": failures})
    saver.save(4, {"seen": 4})
    committed(saver)
    unremovable(engine, folder)
    poison(engine)
    saver.save(5, {})
    report(folder, "behind-poisoned", failing(lambda: committed(saver)))
    engine.destroy()


passing = atomic_files.fault_point


def unremovable(engine, folder: Path) -> None:
    """Commit a checkpoint while older ones cannot be removed."""
    saver = saver_of(engine, folder / "unremovable", background=True)

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "older"))

    saver._context = replace(saver._context, prune=refuse)
    saver.save(4, {"seen": 4})
    report(folder, "unremovable", committed(saver).not_pruned)


def slow_writes(saver: Saver) -> None:
    """Make each shard take half a second to write after its copy was taken."""
    atomic_files.fault_point = lambda point: time.sleep(0.5) if point == "half-written" else None


def poison(engine) -> None:
    """Set one weight of the last rank to NaN."""
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.optimizer.fp32_partitioned_groups_flat[0].data[0] = float("nan")


def kill_both(folder: Path) -> None:
    """Kill both ranks once both have arrived: if one died earlier, the other could fail before it arrives."""
    rank = dist.get_rank()
    # A symlink appears together with its content.
    (folder / f"here-{rank}").symlink_to(str(os.getpid()))
    with suppress(FileNotFoundError):
        both = f"{os.getpid()} {os.readlink(folder / f'here-{1 - rank}')}"
        # Stop both first, so that neither can fail because the other is gone.
        subprocess.run(["sh", "-c", f"kill -STOP {both}; kill -KILL {both}"], check=True)
    # The test kills ranks that wait too long.
    time.sleep(600)


def points(kind: str, folder: Path) -> None:
    """Save step 2; then, during a background save of step 3, kill the rank VICTIM (or all) at POINT."""
    victim, point = os.environ["VICTIM"], os.environ["POINT"]
    engine = build("bf16")
    saver = saver_of(engine, folder / "checkpoints", background=True)
    train(engine, 1, 2)
    saver.save(2, {"seen": 2}, wait=True)
    committed(saver)
    train(engine, 3, 3)
    if victim == "all":
        atomic_files.fault_point = lambda passed: kill_both(folder) if passed == point else None
    elif victim == str(dist.get_rank()):
        atomic_files.fault_point = lambda passed: os.kill(os.getpid(), signal.SIGKILL) if passed == point else None
    saver.save(3, {"seen": 3})
    train(engine, 4, 4, saver)
    committed(saver)


def after(kind: str, folder: Path) -> None:
    """Check that the newest committed checkpoint is intact, resume from it, and save, which sweeps leftovers."""
    engine = build("bf16")
    newest = store.get_latest(folder / "checkpoints")
    shards.load(engine, names(engine), newest.path)
    losses = train(engine, newest.step + 1, 4)
    save(engine, folder, 4)
    report(folder, "after", {"from": newest.step, "losses": losses})


def resume(kind: str, folder: Path) -> None:
    engine = build(kind)
    checkpoint = store.get_latest(folder / "checkpoints").path
    damaged = damaged_copy(checkpoint, folder / "damaged" / checkpoint.name)
    refused = failing(lambda: shards.load(engine, names(engine), damaged))
    extra = shards.load(engine, names(engine), checkpoint)
    dump(engine, folder / "loaded.safetensors")
    logits = reference_logits_of(engine)["logits"]
    report(folder, "resumed", {"extra": extra, "refused": refused, "step": engine.global_steps, "losses": train(engine, 3, 4)})
    if dist.get_rank() == 0:
        save_file({"logits": logits}, folder / "logits.safetensors")
    dump(engine, folder / "resumed.safetensors")
    # A pass after the last step, as in the last evaluation of a run: hpZ keeps a second copy of the weights.
    reference_logits_of(engine)
    before = held_bytes(engine)
    zero3.release_engine(engine)
    report(folder, "released", {"before": before, "after": held_bytes(engine)})
    engine.destroy()


def held_bytes(engine) -> int:
    """Bytes of the weights, in both precisions and with hpZ's second copy, and of the optimizer moments."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    moments = [t for state in zero.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
    copies = [p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None]
    assert bool(copies) == (zero.zero_hpz_partition_size > 1)
    tensors = [*zero.fp32_partitioned_groups_flat, *(p.ds_tensor for p in parameters), *copies, *moments]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def damaged_copy(checkpoint: Path, target: Path) -> Path:
    """Copy the checkpoint and flip one bit in rank 1's shard."""
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint, target)
        shard = target / store.shard_name(1)
        content = bytearray(shard.read_bytes())
        content[20_000] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    return target


def move(kind: str, folder: Path, source: str, target: str) -> None:
    """Load on a different number of ranks, save there, and continue training."""
    engine = build(kind)
    shards.load(engine, names(engine), store.get_at_step(folder / source, 2).path)
    dump(engine, folder / f"{target}.safetensors")
    save(engine, folder, 2, name=target, attempt=2)
    report(folder, f"{target}-losses", train(engine, 3, 4))
    engine.destroy()


# For each scenario, the checkpoints to load, and where another number of ranks saves the same state.
MOVES = {"shrink": ("checkpoints", "one"), "grow": ("one", "two"), "double": ("checkpoints", "four"), "halve": ("four", "half")}


def main(scenario: str, root: str, kinds: list[str]) -> None:
    """Run a scenario for each kind of engine, in a folder of its own under `root`."""
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=60),
    )
    for kind in kinds:
        folder = Path(root) / kind
        if scenario in MOVES:
            move(kind, folder, *MOVES[scenario])
        else:
            folder.mkdir(exist_ok=True)
            globals()[scenario](kind, folder)
    dist.barrier()
