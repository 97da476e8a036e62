"""Saving and loading a ZeRO-3 engine: one safetensors file per rank, no pickle, on any number of ranks.

A shard holds, under `<parameter>|fp32`, `<parameter>|exp_avg` and `<parameter>|exp_avg_sq`, the elements of the flattened
parameter that `store.partition` gives to its rank, without padding, and the rank's random-generator states. `save` and
`load` are collective: every rank calls them with the same arguments, at an optimizer boundary.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn import Parameter

from launcher.checkpoint import durable, store, tensor_file, zero3
from launcher.checkpoint.tensor_file import ShardSet, TensorSpec, as_bytes, tensor_key
from launcher.errors import CheckpointError, DamagedCheckpoint, LauncherError, Problem

T = TypeVar("T")
# What is written, and how to fetch it when its turn comes.
Tensors = Sequence[tuple[TensorSpec, Callable[[], torch.Tensor]]]

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
_RNG_CPU = "rng|cpu"
_RNG_CUDA = "rng|cuda"


@dataclass(frozen=True)
class SaveResult:
    """A committed checkpoint: its directory, the bytes of all ranks' files, and the seconds that this rank was in the save."""

    path: Path
    bytes: int
    seconds: float


def save(
    engine: Any,
    named_parameters: Mapping[str, Parameter],
    root: Path,
    *,
    step: int,
    plan_digest: str,
    attempt: int,
    extra_state: Mapping[str, Any],
    keep_last: int,
    probe: Mapping[str, torch.Tensor] | None = None,
    fence: Callable[[], None] = lambda: None,
) -> SaveResult:
    """Write and commit `root/step-...`, then remove all but the `keep_last` newest checkpoints.

    `named_parameters` names each parameter of the engine's model once, as in the Hugging Face model. `extra_state` is
    JSON-able. `probe` holds `input_ids` [1, T], `position_ids` [1, T] and `logits` [1, T, V], these in the dtype that the
    model computes in. Of the last two, rank 0's are written. `fence` is called on rank 0 before anything is written and
    before the commit, and raises where this process may not write any more.

    CheckpointError on every rank when any rank fails; what was committed before stays as it is.
    """
    started = time.monotonic()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    saving = store.saving_path(root, step, attempt)

    def prepare() -> tuple[Tensors, bytes, Tensors]:
        zero3.require_served(engine, named_parameters)
        shard = _shard(engine, named_parameters)
        if rank != 0:
            return shard, b"", ()
        return shard, _state(engine, named_parameters, extra_state).to_json().encode(), _with_specs(probe or {})

    def finish() -> None:
        if rank != 0:
            return
        files = {store.shard_name(r): _take_entry(saving, r) for r in range(world_size)}
        files[store.STATE] = durable.write_file(saving / store.STATE, [state])
        if probe_tensors:
            files[store.PROBE] = _write(saving / store.PROBE, probe_tensors)
        fence()
        manifest = store.Manifest(step=step, world_size=world_size, plan_digest=plan_digest, attempt=attempt, files=files)
        store.prune(root, store.Retention(keep_last), keep=[store.commit(saving, manifest)])

    shard, state, probe_tensors = _together(engine, "the checkpoint could not be prepared", prepare)
    needed = torch.tensor(len(state) + _file_bytes(shard) + _file_bytes(probe_tensors), dtype=torch.int64, device=engine.device)
    dist.all_reduce(needed)
    num_bytes = int(needed)

    def begin() -> None:
        if rank == 0:
            fence()
            store.begin(root, step=step, attempt=attempt, needed_bytes=num_bytes)

    try:
        _together(engine, "the checkpoint could not be started", begin)
        _together(engine, "the checkpoint could not be written", lambda: _write_shard(saving, rank, shard))
        _together(engine, "the checkpoint could not be committed", finish)
    except CheckpointError:
        # All ranks have agreed that this save is over: nobody writes here any more.
        if rank == 0:
            shutil.rmtree(saving, ignore_errors=True)
        raise
    return SaveResult(root / store.step_name(step), num_bytes, time.monotonic() - started)


def load(
    engine: Any, named_parameters: Mapping[str, Parameter], checkpoint: Path, *, plan_digest: str | None = None
) -> dict[str, Any]:
    """Put a committed checkpoint into the engine and return its `extra_state`.

    The world size may differ from the one that saved; weights, moments and steps are the same bit for bit. Each rank
    reads just the byte ranges that it needs. Random-generator states are restored on the same world size only: on another
    one there is no rank that they belong to, and they stay as they are.

    All files are checked first, each by one of the ranks; with the engine untouched, these are raised on every rank.

    Raises:
        DamagedCheckpoint: when a file is not what was committed, with all that are.
        CheckpointError: when a file is foreign, when `plan_digest` is given and differs, or when the model has other
            parameters.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def check() -> tuple[store.Manifest, store.State]:
        zero3.require_served(engine, named_parameters)
        manifest = store.open_checkpoint(checkpoint).manifest
        if plan_digest is not None and manifest.plan_digest != plan_digest:
            raise CheckpointError(
                "this checkpoint was saved by another plan",
                where=str(checkpoint),
                value=f"{manifest.plan_digest}, this run's plan is {plan_digest}",
                remedy="resume the run that saved it, or start a new run from its exported weights",
            )
        # Sorted names put a rank's own shard first on the same world size, so that it is in the page cache when it is read.
        own_share = sorted(manifest.files, key=lambda name: (not name.startswith("rank-"), name))[rank::world_size]
        if problems := store.foreign_files(checkpoint, manifest):
            raise CheckpointError(problems)
        if problems := store.verify_files(checkpoint, manifest, own_share):
            raise DamagedCheckpoint(problems)
        state = store.read_state(checkpoint)
        _require_same_parameters(state, named_parameters, checkpoint)
        return manifest, state

    manifest, state = _together(engine, "the checkpoint cannot be used", check)
    with ShardSet(checkpoint, manifest.world_size) as shards:

        def read(parameter: str, key: str, num_elements: int, start: int, out: torch.Tensor) -> None:
            shards.read_into(tensor_key(parameter, key), num_elements, start, as_bytes(out))

        _together(
            engine, "the checkpoint could not be read", lambda: zero3.fill(engine, named_parameters, state.optimizer_step, read)
        )
        zero3.publish(engine)
        zero3.set_loss_scale_state(engine, state.loss_scaler)
        zero3.set_counters(engine, state.engine)
        if manifest.world_size == world_size:
            _restore_random_states(shards.shard(rank))
    return state.extra


def _shard(engine: Any, named_parameters: Mapping[str, Parameter]) -> Tensors:
    """This rank's tensors in the order of the file; the bytes of random states come last, which keeps fp32 aligned."""
    keys = zero3.state_keys(engine)
    parts: list[tuple[TensorSpec, Callable[[], torch.Tensor]]] = [
        (TensorSpec(tensor_key(name, key), "F32", (zero3.local_elements(p),)), partial(zero3.local_state, p, key))
        for name, p in named_parameters.items()
        for key in keys
    ]
    random_states = {_RNG_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states[_RNG_CUDA] = torch.cuda.get_rng_state()
    return [*parts, *_with_specs(random_states)]


def _restore_random_states(shard: tensor_file.TensorFile) -> None:
    for key, restore in ((_RNG_CPU, torch.set_rng_state), (_RNG_CUDA, torch.cuda.set_rng_state)):
        if key in shard.specs and (key == _RNG_CPU or torch.cuda.is_available()):
            state = torch.empty(shard.specs[key].shape, dtype=torch.uint8)
            shard.read_into(key, 0, as_bytes(state))
            restore(state)


def _state(engine: Any, named_parameters: Mapping[str, Parameter], extra_state: Mapping[str, Any]) -> store.State:
    return store.State(
        parameters={name: tuple(parameter.ds_shape) for name, parameter in named_parameters.items()},
        optimizer_step=zero3.optimizer_step(engine),
        loss_scaler=zero3.loss_scale_state(engine),
        engine=zero3.counters(engine),
        extra=dict(extra_state),
    )


def _require_same_parameters(state: store.State, named_parameters: Mapping[str, Parameter], checkpoint: Path) -> None:
    saved, model = state.parameters, {name: tuple(parameter.ds_shape) for name, parameter in named_parameters.items()}
    if differing := sorted(name for name in model.keys() | saved.keys() if model.get(name) != saved.get(name)):
        first = differing[0]
        raise CheckpointError(
            f"the model and the checkpoint differ in {len(differing)} parameters",
            where=str(checkpoint),
            value=f"{first}: {saved.get(first, 'absent')} in the checkpoint, {model.get(first, 'absent')} in the model",
        )


def _write_shard(saving: Path, rank: int, shard: Tensors) -> None:
    """The shard, and beside it a small file with its size and digest, which tells rank 0 that the shard is on disk."""
    entry = _write(saving / store.shard_name(rank), shard)
    durable.write_file(_entry_path(saving, rank), [entry.model_dump_json().encode()])


def _take_entry(saving: Path, rank: int) -> durable.FileEntry:
    path = _entry_path(saving, rank)
    entry = durable.FileEntry.model_validate_json(path.read_bytes())
    if (size := (saving / store.shard_name(rank)).stat().st_size) != entry.size:
        raise CheckpointError(f"rank {rank} wrote {entry.size:,} bytes, of which {size:,} are on disk", where=str(saving))
    path.unlink()
    return entry


def _entry_path(saving: Path, rank: int) -> Path:
    return saving / f"rank-{rank:05d}.json"


def _with_specs(named: Mapping[str, torch.Tensor]) -> Tensors:
    return [(TensorSpec(name, _DTYPES[t.dtype], tuple(t.shape)), partial(torch.Tensor.detach, t)) for name, t in named.items()]


def _file_bytes(tensors: Tensors) -> int:
    return tensor_file.file_bytes([spec for spec, _ in tensors], {}) if tensors else 0


def _write(path: Path, tensors: Tensors) -> durable.FileEntry:
    return tensor_file.write(path, [spec for spec, _ in tensors], _blocks(tensors), {})


def _blocks(tensors: Tensors) -> Iterator[memoryview]:
    for _, fetch in tensors:
        yield as_bytes(fetch().cpu().contiguous())


def _together(engine: Any, what: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; CheckpointError on all of them when it fails on any, so that no rank waits for another.

    It is a DamagedCheckpoint where that was raised on any.
    """
    result: T | None = None
    caught: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        caught = error
    failed = torch.tensor(int(caught is not None), device=engine.device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return result  # type: ignore[return-value]
    gathered: list[tuple[bool, tuple[Problem, ...]]] = [(False, ())] * dist.get_world_size()
    dist.all_gather_object(gathered, (isinstance(caught, DamagedCheckpoint), _problems(what, caught)))
    kind = DamagedCheckpoint if any(damaged for damaged, _ in gathered) else CheckpointError
    raise kind(dict.fromkeys(problem for _, problems in gathered for problem in problems)) from caught


def _problems(what: str, error: Exception | None) -> tuple[Problem, ...]:
    if error is None:
        return ()
    if isinstance(error, LauncherError):
        return error.problems
    where = f"rank {dist.get_rank()}"
    if isinstance(error, OSError):
        where += f", {error.filename}" if error.filename else ""
        return (Problem(what, where=where, value=error.strerror or str(error)),)
    return (Problem(what, where=where, value=f"{type(error).__name__}: {error}"),)
