"""Checkpoints for the export tests: the model of checkpoint_ranks.py, its plan, and shards with chosen header metadata."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hand_made
from safetensors.torch import load_file

from launcher.checkpoint import safetensors_io, store
from launcher.checkpoint.manifest import MANIFEST, read_manifest
from launcher.checkpoint.safetensors_io import TensorFile, as_bytes, weight_digest
from launcher.plan.launch_plan import LaunchPlan


def llama_config(kind: str) -> dict[str, Any]:
    """The config.json of checkpoint_ranks.py's model."""
    return {
        "model_type": "llama",
        "hidden_size": 27,
        "intermediate_size": 41,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": 511,
        "max_position_embeddings": 64,
        "tie_word_embeddings": kind != "fp32",
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "gguf"},
    }


def engine_metadata(dump: Path, dtype: str, world_size: int) -> list[dict[str, str]]:
    """Each rank's header metadata for the weights that the engine gathered when it saved (checkpoint_ranks.dump)."""
    weights = {name.removesuffix("|compute"): t for name, t in load_file(dump).items() if name.endswith("|compute")}
    metadata = []
    for rank in range(world_size):
        parts = {
            name: tensor.flatten()[slice(*store.partition(tensor.numel(), world_size, rank))] for name, tensor in weights.items()
        }
        digests = {name: weight_digest(as_bytes(part.contiguous())) for name, part in parts.items()}
        metadata.append({safetensors_io.DTYPE: dtype, safetensors_io.WEIGHTS: json.dumps(digests)})
    return metadata


def with_metadata(checkpoint: Path, folder: Path, metadata: list[dict[str, str]] | None = None) -> Path:
    """Copy a checkpoint to `folder` with `metadata` in its shards' headers, or without any."""
    target = folder / checkpoint.name
    shutil.copytree(checkpoint, target)
    manifest = read_manifest(checkpoint)
    files = dict(manifest.files)
    for rank in range(manifest.world_size):
        name = store.shard_name(rank)
        source = TensorFile(checkpoint / name)
        contents = [memoryview(bytearray(spec.num_bytes)) for spec in source.specs.values()]
        for key, content in zip(source.specs, contents, strict=True):
            source.read_into(key, 0, content)
        source.close()
        (target / name).unlink()
        said = metadata[rank] if metadata else {}
        files[name] = safetensors_io.write(target / name, list(source.specs.values()), contents, said)
    (target / MANIFEST).write_text(replace(manifest, files=files).to_json())
    return target


def flip_bit(checkpoint: Path, rank: int, key: str, bit: int) -> None:
    """Flip a bit in the first element of a tensor in a shard; the manifest does not change."""
    path = checkpoint / store.shard_name(rank)
    file = TensorFile(path)
    at = file._starts[key] + bit // 8
    file.close()
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit % 8
    path.write_bytes(content)


def plan_of(run_dir: Path, **parts: Any) -> LaunchPlan:
    """A plan for the bf16 model; `parts` override its own."""
    llama = llama_config("bf16")
    settings = {
        "model": {"init": "random", "config": llama, "tokenizer": "owner/name"},
        "data": {"sources": [{"path": "builtin:stdlib_docs"}]},
        "train": {"max_steps": 4},
    }
    names = ("hidden_size", "head_dim", "intermediate_size", "vocab_size")
    heads = {"num_layers": 2, "num_heads": 3, "num_kv_heads": 3}
    model = {**heads, **{name: llama[name] for name in names}, "config": llama}
    return hand_made.plan(run_dir, settings, model, **parts)
