"""The score pass: the log-probability of every trained token of packed rows, from which follows the loss of each document.

Runs on this machine, one rank per GPU or one on the CPUs. Micro-batches do not depend on the number of ranks, and each is scored
by one data rank. Ranks commit their scores in shards, so a pass that is killed continues where it stopped; stored scores are not
recomputed. Torch is imported only where ranks run: `python -m launcher.evaluate.document_losses TASK_JSON` is one of several.

    <cache>/scores/<key>/            0700
      012-of-256.f32                 a range of micro-batches: little-endian fp32, in order of the rows

The key is a digest of everything that a score depends on, so no scores are mistaken for others.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from launcher import hardware
from launcher.child_process import await_processes, die_with_parent, exit_on_termination, exit_without_shutdown
from launcher.clusters.network import LOOPBACK, free_port
from launcher.data.cache_dir import cache_root
from launcher.data.split import Split
from launcher.errors import RunError
from launcher.evaluate.weights import ScoredWeights
from launcher.models.remote_code import remove_copies
from launcher.plan.launch_plan import DataFacts, LaunchPlan, Record
from launcher.runs import atomic_files
from launcher.security.redaction import printable_output

if TYPE_CHECKING:
    from launcher.data.loader import RowBatches
    from launcher.train.held_out_loss import Scorer

# A pass that is killed computes at most one shard per rank again.
MAX_SHARDS = 256
_DTYPE = np.dtype("<f4")
_NOT_WRITTEN = "the scores cannot be written"

Progress = Callable[[str, int, int], None]


class ScorePass(Record):
    """The rows to score: a whole split, or its `rows`. `title` describes them in progress output."""

    title: str
    facts: DataFacts
    held_out: bool = False
    rows: tuple[int, ...] | None = None

    def open(self) -> Split:
        """Open the split."""
        return Split.open(self.facts, self.held_out)


class RankTask(Record):
    """Input for the ranks of a score pass: the plan to build the engine from, and the passes with their keys."""

    plan: LaunchPlan
    passes: tuple[ScorePass, ...]
    keys: tuple[str, ...]


def score_passes(
    plan: LaunchPlan, weights: ScoredWeights, passes: Sequence[ScorePass], on_progress: Progress, num_ranks: int | None = None
) -> list[np.ndarray]:
    """Return the log-probabilities of the trained tokens of each pass under `weights`; computes those not in the store."""
    device = hardware.device()
    ranks = num_ranks or (device.count if device.kind == "cuda" else 1)
    device_name = device.name if device.kind == "cuda" else device.kind
    keys = tuple(make_key(plan, weights.digest, one, device_name) for one in passes)
    stores = [
        ScoreStore(key, -(-(one.open().num_rows if one.rows is None else len(one.rows)) // plan.batch.micro_batch_size))
        for one, key in zip(passes, keys, strict=True)
    ]
    if any(store.list_missing() for store in stores):
        scored = make_scoring_plan(plan, weights.make_folder(plan), device.kind, ranks)
        _run_ranks(RankTask(plan=scored, passes=tuple(passes), keys=keys), ranks, on_progress)
    return [store.read() for store in stores]


def make_key(plan: LaunchPlan, weights_digest: str, one: ScorePass, device: str) -> str:
    """Return a digest of everything that a pass's scores depend on; kernel packages count, because `attention` may be auto."""
    kernels = ("flash-attn", "flash-attn-3", "flash-attn-4", *(("liger-kernel",) if plan.liger else ()))
    versions = {}
    for package in ("torch", "transformers", *kernels):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    model = plan.config.model
    facts = {
        "format": 3,
        "weights": weights_digest,
        "data": one.facts.digest.split("-")[-1 if one.held_out else 0],
        "rows": one.rows,
        "micro_batch_size": plan.batch.micro_batch_size,
        "dtype": model.dtype,
        "attention": model.attention,
        "device": device,
        "versions": versions,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())


def make_scoring_plan(plan: LaunchPlan, folder: Path, device: str, num_ranks: int) -> LaunchPlan:
    """Return the ranks' plan: the run's plan with weights from `folder`, on this machine, without what only training needs."""
    model = plan.config.model.model_copy(update={"init": "pretrained", "activation_checkpointing": "none"})
    zero = {key: value for key, value in plan.deepspeed["zero_optimization"].items() if key != "offload_optimizer"}
    zero.pop("zero_hpz_partition_size", None)
    if zero.get("offload_param", {}).get("device") == "nvme":
        # The run's NVMe folder belongs to its own ranks.
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    batch = {"train_micro_batch_size_per_gpu": plan.batch.micro_batch_size, "gradient_accumulation_steps": 1}
    topology = {"nodes": 1, "ranks_per_node": num_ranks, "world_size": num_ranks, "device": device}
    return plan.model_copy(
        update={
            "config": plan.config.model_copy(update={"model": model}),
            "checkpointing": "none",
            "model": plan.model.model_copy(update={"path": str(folder), "has_weights": True}),
            "deepspeed": {**plan.deepspeed, **batch, "zero_optimization": zero},
            "topology": plan.topology.model_copy(update={**topology, "backend": "nccl" if device == "cuda" else "gloo"}),
        }
    )


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder beside the scores, and remove it at the end; `clean` removes folders that killed processes left."""
    root = cache_root() / "scores"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=root) as folder:
        yield Path(folder)


def _run_ranks(task: RankTask, num_ranks: int, on_progress: Progress) -> None:
    """Run the ranks to their end: in this process if there is only one, otherwise as separate processes."""
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": LOOPBACK.address, "MASTER_PORT": str(free_port(LOOPBACK.address))}
    # By default, gloo and NCCL listen on the address of the machine's host name. NCCL treats a bare name as a prefix.
    interfaces = {"GLOO_SOCKET_IFNAME": LOOPBACK.interface, "NCCL_SOCKET_IFNAME": f"={LOOPBACK.interface}"}
    shared |= {name: os.environ.get(name, interface) for name, interface in interfaces.items()}
    if num_ranks > 1:
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_ranks))
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    if num_ranks == 1:
        os.environ.update(environments[0])
        run_rank(task, on_progress)
        return
    with temporary_folder() as folder:
        file = folder / "task.json"
        file.write_text(task.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "launcher.evaluate.document_losses", str(file)]
        processes = [subprocess.Popen(command, env={**os.environ, **environment}) for environment in environments]
        codes = await_processes(processes)
    if failed := [rank for rank, code in enumerate(codes) if code]:
        message = f"rank {failed[0]} of the score pass ended with exit code {codes[failed[0]]}; its messages are above"
        raise RunError(message, remedy="repeat the command: it continues with what is not scored yet")


def run_rank(task: RankTask, on_progress: Progress = lambda stage, done, total: None) -> None:
    """Score a task's passes together with the other ranks; uses torchrun's environment variables. Collective."""
    # DeepSpeed chooses a device on import, but a plan may use the CPUs of a machine with GPUs.
    os.environ["DS_ACCELERATOR"] = task.plan.topology.device
    from launcher.data.loader import RowBatches
    from launcher.distributed import RankInfo
    from launcher.train.engine import build_inference_engine, join_process_group, leave_process_group
    from launcher.train.held_out_loss import Scorer
    from launcher.train.objectives import SupervisedNll

    rank_info = RankInfo(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), attempt=0)
    device = join_process_group(task.plan, rank_info)
    engine, model = build_inference_engine(task.plan)
    scorer = Scorer(engine, model, SupervisedNll(), rank_info, device, task.plan.topology)
    for one, key in zip(task.passes, task.keys, strict=True):
        rows = None if one.rows is None else np.asarray(one.rows)
        batches = RowBatches(one.open(), task.plan.batch.micro_batch_size, pad_id=0, rows=rows)
        store = ScoreStore(key, len(batches))
        score_rows(scorer, batches, store, partial(on_progress, one.title))
    leave_process_group()


def score_rows(scorer: Scorer, batches: RowBatches, store: ScoreStore, on_progress: Callable[[int, int], None]) -> None:
    """Write the log-probabilities of all trained tokens of `batches` that `store` lacks into it. Collective.

    `on_progress` is called with the number of scored rows and that of all rows. CheckpointError is raised on every rank.
    """
    from launcher.distributed import rank0_broadcast, run_on_all_ranks

    rank, topology, num_rows = scorer.rank_info.rank, scorer.topology, len(batches.rows)
    missing = rank0_broadcast(scorer.rank_info, _NOT_WRITTEN, store.list_missing)
    # Ranks with fewer micro-batches still take part in the passes of the other ranks.
    width = max((len(store.shards[number]) for number in missing), default=0)
    with scorer.without_dropout():
        for first in range(0, len(missing), topology.data_ranks):
            on_progress((len(store.shards) - len(missing) + first) * num_rows // len(store.shards), num_rows)
            next_shard = first + topology.data_rank(rank)
            own = missing[next_shard] if next_shard < len(missing) else None
            numbers = [] if own is None else [*store.shards[own]]
            losses = [*scorer.score(batches, [*numbers, *[len(batches)] * (width - len(numbers))], lambda: None)]
            scored = [np.negative(loss.cpu().numpy()) for loss in losses[: len(numbers)] if loss is not None]
            # Of the ranks with the same rows, the first one writes.
            commit = (lambda: None) if own is None or rank % topology.sequence_ranks else partial(store.commit, own, scored)
            run_on_all_ranks(scorer.device, _NOT_WRITTEN, commit)
    on_progress(num_rows, num_rows)


class ScoreStore:
    """The scores of one pass, in shards (ranges of micro-batches) that appear when complete; two passes may write it at once."""

    def __init__(self, key: str, num_micro_batches: int, root: Path | None = None) -> None:
        """`root` is the launcher's cache by default."""
        self.folder = (root or cache_root()) / "scores" / key
        width = max(1, -(-num_micro_batches // MAX_SHARDS))
        self.shards = [range(first, min(first + width, num_micro_batches)) for first in range(0, num_micro_batches, width)]

    def list_missing(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        return [number for number in range(len(self.shards)) if not self._file(number).is_file()]

    def read(self) -> np.ndarray:
        """Return all log-probabilities, fp32 [num_labels], of a complete pass."""
        contents = [self._file(number).read_bytes() for number in range(len(self.shards))]
        return np.frombuffer(b"".join(contents), _DTYPE)

    def commit(self, number: int, log_probs: Sequence[np.ndarray]) -> None:
        """Write the log-probabilities of the micro-batches of a shard."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write_bytes(self._file(number), np.concatenate(log_probs).astype(_DTYPE).tobytes(), mode=0o600)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:03d}-of-{len(self.shards):03d}.f32"


if __name__ == "__main__":
    exit_on_termination()
    # TERM would not end it: Python runs no handler while the rank waits in a collective.
    die_with_parent()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        run_rank(RankTask.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    remove_copies()
    exit_without_shutdown(0)
