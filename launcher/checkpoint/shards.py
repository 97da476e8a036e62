"""One rank's shard of a checkpoint: a safetensors file without pickle. Any world size can read any other's shards.

A shard holds the elements of each flattened parameter that `store.partition` assigns to its rank, without padding: under
`<parameter>|fp32` the weights, and under `<parameter>|<state>` each optimizer state (AdamW: `exp_avg`, `exp_avg_sq`). It also
holds the rank's random-generator states, and rank 0's holds the buffers that belong in weight files, under `buffer|<name>`. Its
header names the dtype that the engine computes in, and holds a digest of each buffer and of the rank's part of every weight in
that dtype, by which an export verifies that it writes the same values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from launcher.checkpoint import safetensors_io, store, zero3
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.safetensors_io import ShardSet, TensorSpec, as_bytes, buffer_key, buffer_name, tensor_key, weight_digest
from launcher.checkpoint.state import State, read_state
from launcher.distributed import run_on_all_ranks
from launcher.errors import CheckpointError, DamagedCheckpoint
from launcher.runs import atomic_files

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STORED_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MakeProgress = Callable[[str, int], Callable[[int], None]]
_RNG_CPU = "rng|cpu"
_RNG_CUDA = "rng|cuda"
_NO_DIGEST = "0" * 16


@dataclass(frozen=True)
class Shard:
    """Content of a rank's shard: fp32 states in the order of `zero3.local_states`, then buffers and random-generator states.

    The states come first, so that they stay aligned.
    """

    specs: tuple[TensorSpec, ...]
    whole_tensors: Mapping[str, torch.Tensor]
    dtype: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, engine: Any, named_parameters: Mapping[str, Parameter], named_buffers: Mapping[str, torch.Tensor]) -> Shard:
        """Build this rank's shard for the engine's present state; whole tensors are copied at once."""
        buffers = named_buffers if dist.get_rank() == 0 else {}
        whole = {buffer_key(name): buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        whole[_RNG_CPU] = torch.get_rng_state()
        if torch.cuda.is_available():
            whole[_RNG_CUDA] = torch.cuda.get_rng_state()
        layout = zero3.state_layout(engine, named_parameters)
        specs = [TensorSpec(tensor_key(name, key), "F32", (count,)) for name, key, count in layout]
        specs += list_specs(whole)
        # Use the parameter's dtype: a partition that DeepSpeed holds on NVMe has a different one.
        dtype = next(iter(named_parameters.values())).dtype
        return cls(tuple(specs), whole, _DTYPES[dtype], tuple(named_parameters))

    @property
    def num_bytes(self) -> int:
        """Exact size of the file in bytes."""
        return safetensors_io.file_bytes(self.specs, self._metadata(dict.fromkeys(self.names, _NO_DIGEST)))

    def write(self, path: Path, states: Iterator[memoryview], digests: Mapping[str, str]) -> atomic_files.FileEntry:
        """Write and fsync the file; `states` yields the bytes of all fp32 states, split anywhere, `digests` by weight name."""
        blocks = itertools.chain(states, map(as_bytes, self.whole_tensors.values()))
        return safetensors_io.write(path, self.specs, blocks, self._metadata(digests))

    def _metadata(self, digests: Mapping[str, str]) -> dict[str, str]:
        buffers = {key: tensor for key, tensor in self.whole_tensors.items() if buffer_name(key) is not None}
        all_digests = {**digests, **{key: weight_digest(as_bytes(tensor)) for key, tensor in buffers.items()}}
        return {safetensors_io.DTYPE: self.dtype, safetensors_io.WEIGHTS: json.dumps(all_digests, separators=(",", ":"))}


def list_specs(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """Return how a safetensors file holds whole tensors, in their order."""
    return [TensorSpec(name, STORED_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def weight_digests(named_parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """Return a digest of this rank's part of every weight, in the dtype that the engine computes in."""
    return {name: weight_digest(as_bytes(part.cpu())) for name, part in zero3.local_weights(named_parameters)}


def build_state(engine: Any, named_parameters: Mapping[str, Parameter], extra_state: Mapping[str, Any]) -> State:
    """Build the content of state.json; the same on every rank."""
    return State(
        parameters={name: tuple(parameter.ds_shape) for name, parameter in named_parameters.items()},
        optimizer_step=zero3.optimizer_step(engine),
        optimizer_states=zero3.find_optimizer(engine).states,
        loss_scaler=zero3.loss_scale_state(engine),
        engine=zero3.read_counters(engine),
        extra=dict(extra_state),
    )


def load(
    engine: Any,
    named_parameters: Mapping[str, Parameter],
    checkpoint: Path,
    *,
    named_buffers: Mapping[str, torch.Tensor] | None = None,
    make_progress: MakeProgress = lambda activity, total: lambda num_bytes: None,
) -> dict[str, Any]:
    """Load a committed checkpoint into the engine and return its `extra_state`. Collective.

    The world size may differ from the save's; weights, buffers, optimizer states and step counts are restored bit for bit. Each
    rank reads only the byte ranges that it needs. Random-generator states are restored only if the world size is the same;
    otherwise they do not change.

    All files are verified first, each by one rank. Errors are raised on every rank, before the engine is changed.

    Raises:
        DamagedCheckpoint: if files differ from their digests; lists all of them.
        CheckpointError: if a file belongs to another user, or if the model's parameters or buffers or the optimizer's states are
            different.
    """
    buffers, rank, world_size = named_buffers or {}, dist.get_rank(), dist.get_world_size()
    manifest, state = run_on_all_ranks(
        engine.device,
        "the checkpoint cannot be loaded",
        lambda: _verify(engine, named_parameters, buffers, checkpoint, make_progress),
    )
    shard_bytes = sum(manifest.files[store.shard_name(saved)].size for saved in range(manifest.world_size))
    with ShardSet(checkpoint, manifest.world_size) as shards:
        advance = make_progress("reading the checkpoint", shard_bytes // world_size)

        def read(parameter: str, key: str, num_elements: int, start: int, out: torch.Tensor) -> None:
            content = as_bytes(out)
            shards.read_into(tensor_key(parameter, key), num_elements, start, content)
            advance(content.nbytes)

        def restore() -> None:
            zero3.load_states(engine, named_parameters, state.optimizer_step, read)
            for name, buffer in buffers.items():
                # A checkpoint without buffers leaves those that were read with the weights.
                if (spec := shards.shard(0).specs.get(buffer_key(name))) is not None:
                    saved = torch.empty(
                        spec.shape, dtype=next(one for one, stored in STORED_DTYPES.items() if stored == spec.dtype)
                    )
                    shards.shard(0).read_into(spec.name, 0, as_bytes(saved))
                    buffer.copy_(saved)

        run_on_all_ranks(engine.device, "the checkpoint could not be read", restore)
        zero3.publish_weights(engine)
        zero3.set_loss_scale_state(engine, state.loss_scaler)
        zero3.set_counters(engine, state.engine)
        if manifest.world_size == world_size:
            own = shards.shard(rank)
            for key, set_state in ((_RNG_CPU, torch.set_rng_state), (_RNG_CUDA, torch.cuda.set_rng_state)):
                if key in own.specs and (key == _RNG_CPU or torch.cuda.is_available()):
                    random_state = torch.empty(own.specs[key].shape, dtype=torch.uint8)
                    own.read_into(key, 0, as_bytes(random_state))
                    set_state(random_state)
    return state.extra


def _verify(
    engine: Any,
    named_parameters: Mapping[str, Parameter],
    named_buffers: Mapping[str, torch.Tensor],
    checkpoint: Path,
    make_progress: MakeProgress,
) -> tuple[Manifest, State]:
    """Verify this rank's share of the files, and that the checkpoint holds the states of this engine."""
    zero3.require_supported_engine(engine, named_parameters)
    manifest = store.open_checkpoint(checkpoint).manifest
    # With the same world size, sorted names put a rank's own shard first, so it is in the page cache when it is read.
    names = sorted(manifest.files, key=lambda name: (not name.startswith("rank-"), name))[
        dist.get_rank() :: dist.get_world_size()
    ]
    if problems := store.find_foreign_files(checkpoint, manifest):
        raise CheckpointError(problems)
    advance = make_progress("verifying the checkpoint", sum(manifest.files[name].size for name in names))
    if problems := store.verify_files(checkpoint, manifest, names, on_read=advance):
        raise DamagedCheckpoint(problems)
    state, states = read_state(checkpoint), zero3.find_optimizer(engine).states
    with ShardSet(checkpoint, manifest.world_size) as shards:
        saved_buffers = {spec.name: spec.shape for spec in shards.buffers()}
    parameters = {name: tuple(parameter.ds_shape) for name, parameter in named_parameters.items()}
    buffers = {name: tuple(buffer.shape) for name, buffer in named_buffers.items()}
    for kind, saved, own in (("parameters", state.parameters, parameters), ("buffers", saved_buffers, buffers)):
        if differing := sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name)):
            first = differing[0]
            raise CheckpointError(
                f"the model and the checkpoint differ in {len(differing)} {kind}",
                where=str(checkpoint),
                value=f"{first}: {saved.get(first, 'absent')} in the checkpoint, {own.get(first, 'absent')} in the model",
            )
    if state.optimizer_step and state.optimizer_states != states:
        raise CheckpointError(
            "the checkpoint holds the states of another optimizer",
            where=str(checkpoint),
            value=f"{', '.join(state.optimizer_states)} in the checkpoint, {', '.join(states)} in this run's optimizer",
            remedy="resume with the optimizer that saved it, or start a run from its exported weights",
        )
    return manifest, state


def require_known_dtypes(named_buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuse buffers that a shard cannot hold."""
    for name, buffer in named_buffers.items():
        if buffer.dtype not in STORED_DTYPES:
            raise CheckpointError("checkpoints cannot hold a buffer of this dtype", where=name, value=str(buffer.dtype))
