"""Weights are read from shards, cast, compared with the engine's digests, and written to Hugging Face files, or refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from forked_ranks import RankServer
from safetensors.torch import load_file
from shard_tools import engine_metadata, flip_bit, llama_config, with_metadata
from transformers.core_model_loading import WeightConverter
from weight_tools import EXPERTS, ROUTER_BUFFER, SIZES, change_weights, save_model

from launcher.checkpoint import initial_weights, safetensors_io, store
from launcher.checkpoint.manifest import STATE
from launcher.checkpoint.safetensors_io import buffer_key
from launcher.checkpoint.state import read_state
from launcher.errors import CheckpointError
from launcher.export import weights
from launcher.export.hf_folder import ExportTask, describe_names, export, verify_checkpoint
from launcher.export.parity import require_same_tensors
from launcher.export.weights import find_stored_tensors
from launcher.models.weight_files import read_header


def digested(runs, kind, folder):
    """A checkpoint whose shards hold digests of the weights that the engine gathered when it saved."""
    checkpoint = store.get_latest(runs.checkpoints(kind))
    said = engine_metadata(runs.dump(kind, "saved"), kind, checkpoint.manifest.world_size)
    return with_metadata(checkpoint.path, folder, said)


def task(checkpoint, kind, out, **options):
    return ExportTask(
        **{"checkpoint": checkpoint, "model": llama_config(kind), "tokenizer": None, "out": out, "dtype": kind} | options
    )


@pytest.mark.parametrize("kind", ["fp32", "bf16", "hpz"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_tensor_is_compared_in_the_engines_dtype(runs, tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1000)  # every part of a tensor spans several blocks
    checkpoint = store.get_latest(runs.checkpoints(kind))
    said = engine_metadata(runs.dump(kind, "saved"), "fp32" if kind == "fp32" else "bf16", 2)
    made = export(task(with_metadata(checkpoint.path, tmp_path, said), kind, tmp_path / "out", dtype=dtype, check=kind != "hpz"))
    assert made.num_compared == made.num_tensors == len(read_state(checkpoint.path).parameters)
    assert json.loads((made.path / "export.json").read_text())["tensors_compared"] == made.num_tensors
    for name, tensor in load_file(made.path / "model.safetensors").items():
        master = load_file(runs.dump(kind, "saved"))[f"{name}|fp32"]
        assert torch.equal(tensor, master.to(tensor.dtype)), name


def test_a_checkpoint_without_digests_is_not_compared(runs, tmp_path):
    checkpoint = with_metadata(store.get_latest(runs.checkpoints("bf16")).path, tmp_path)
    made = export(task(checkpoint, "bf16", tmp_path / "out"))
    assert made.num_compared == 0
    assert made.num_tensors > 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_weight_is_reported_with_its_rank_and_leaves_no_folder(runs, tmp_path, rank):
    checkpoint = digested(runs, "bf16", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    flip_bit(checkpoint, rank, f"{name}|fp32", bit=20)
    with pytest.raises(CheckpointError) as refused:
        export(task(checkpoint, "bf16", tmp_path / "out"))
    (problem,) = refused.value.problems
    assert "differs from the engine's" in problem.message
    assert f"{name}, part of rank {rank}" in problem.where
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.name]


def test_a_weight_without_digest_is_refused(runs, tmp_path):
    checkpoint = store.get_latest(runs.checkpoints("bf16")).path
    said = engine_metadata(runs.dump("bf16", "saved"), "bf16", 2)
    known = json.loads(said[1]["weights"])
    del known["model.norm.weight"]
    said[1]["weights"] = json.dumps(known)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight, part of rank 1(.|\n)*the engine's is absent"):
        export(task(with_metadata(checkpoint, tmp_path, said), "bf16", tmp_path / "out"))


@pytest.mark.parametrize("said", [{"weights": "{"}, {"weights": "[]", "dtype": "bf16"}, {"weights": "{}", "dtype": "int4"}])
def test_unreadable_digests_are_an_error(runs, tmp_path, said):
    checkpoint = with_metadata(store.get_latest(runs.checkpoints("bf16")).path, tmp_path, [said, said])
    with pytest.raises(CheckpointError, match="digests of a checkpoint's weights cannot be read"):
        export(task(checkpoint, "bf16", tmp_path / "out"))


def test_files_that_the_digests_do_not_cover_are_verified(runs, tmp_path):
    checkpoint = digested(runs, "bf16", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    verify_checkpoint(task(checkpoint, "bf16", tmp_path / "out"))
    flip_bit(checkpoint, 1, f"{name}|exp_avg", bit=20)
    verify_checkpoint(task(checkpoint, "bf16", tmp_path / "out"))  # the damage is in a moment, which no export contains
    # The lowest bit of a master weight does not affect the bf16 digest.
    flip_bit(checkpoint, 1, f"{name}|fp32", bit=0)
    with pytest.raises(CheckpointError, match="digest differs"):
        verify_checkpoint(task(checkpoint, "bf16", tmp_path / "out", dtype="fp32"))
    state = checkpoint / STATE
    state.write_text(state.read_text().replace('"seen": 2', '"seen": 3'))
    with pytest.raises(CheckpointError, match=r"digest differs(.|\n)*state\.json"):
        verify_checkpoint(task(checkpoint, "bf16", tmp_path / "out"))


@pytest.mark.parametrize("at", [3, 400])
def test_a_damaged_header_is_reported(runs, tmp_path, at):
    checkpoint = digested(runs, "bf16", tmp_path)
    shard = checkpoint / store.shard_name(1)
    content = bytearray(shard.read_bytes())
    content[at] ^= 0x80
    shard.write_bytes(content)
    with pytest.raises(CheckpointError):
        export(task(checkpoint, "bf16", tmp_path / "out"))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_casts_equal_torchs_for_all_values(dtype, torch_dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, weights._BLOCK_ELEMENTS, dtype=np.uint32)
    # Ties, the largest finite number, infinities, zeros, and a NaN whose upper half equals that of infinity.
    bits[:10] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0, 0x80000000, 0x7F800001, 0xFFFFFFFF, 1]
    block = bits.view(np.float32)
    ours = torch.frombuffer(bytearray(weights._Cast(dtype)(block)), dtype=torch_dtype)
    theirs = torch.from_numpy(block).to(torch_dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    signed = torch.int32 if dtype == "fp32" else torch.int16
    assert torch.equal(ours[~ours.isnan()].view(signed), theirs[~ours.isnan()].view(signed))


def test_an_incremental_digest_equals_the_digest_of_the_tensor():
    content = memoryview(b"0123456789" * 1000)
    pieces = safetensors_io.WeightDigest()
    for start in range(0, len(content), 777):
        pieces.update(content[start : start + 777])
    assert pieces.hexdigest() == safetensors_io.weight_digest(content)
    assert len(safetensors_io.weight_digest(memoryview(b""))) == 16


def test_weights_are_written_without_torch():
    code = "import sys, launcher.worker.export; print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def build(model_type: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**{"model_type": model_type, **SIZES, **EXPERTS.get(model_type, {})})
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", ["llama", *EXPERTS])
def test_parameters_are_split_and_named_as_transformers_saves_them(tmp_path: Path, model_type: str) -> None:
    model = build(model_type)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    with torch.device("meta"):
        empty = build(model_type)
    found = find_stored_tensors(empty, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert bool(found) == (model_type in EXPERTS)
    stored = {}
    for name, tensor in tensors.items():
        parts = found.get(name, [(name, tuple(tensor.shape))])
        elements = tensor.reshape(-1).split([math.prod(shape) for _, shape in parts])
        stored |= {part: own.view(shape) for (part, shape), own in zip(parts, elements, strict=True)}
    expected = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, stored[name])] == []


def refuse(*_: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    "place, replacement",
    [(initial_weights, {"can_fuse": lambda converter: False}), (WeightConverter, {"reverse_transform": refuse})],
)
def test_a_conversion_that_cannot_be_undone_is_none(
    monkeypatch: pytest.MonkeyPatch, place: object, replacement: dict[str, object]
) -> None:
    model = build("mixtral")
    ((name, value),) = replacement.items()
    monkeypatch.setattr(place, name, value)
    assert find_stored_tensors(model, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}) is None


def test_a_checkpoint_without_the_buffers_of_the_model_is_refused() -> None:
    model = build("deepseek_v3")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        require_same_tensors(model, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


@pytest.mark.rest
def test_trained_models_have_the_tensors_of_their_original_files(rank_server: RankServer, tmp_path: Path) -> None:
    """Experts, buffers, a frozen parameter (ERNIE 4.5), and an architecture that only eager attention computes (gpt-oss)."""
    with_buffers = ("deepseek_v3", "ernie4_5_moe")
    folders = [
        save_model(tmp_path / model_type, {"model_type": model_type, "dtype": torch.bfloat16})
        for model_type in (*with_buffers, "gpt_oss")
    ]
    for name in with_buffers:
        change_weights(
            tmp_path / name, lambda tensors: [tensors[one].normal_() for one in tensors if one.endswith(ROUTER_BUFFER)]
        )
    saved = tmp_path / "saved"
    saved.mkdir()
    arguments = [[[str(folder) for folder in folders], str(saved)]] * 2
    first, second = rank_server.values("export_ranks:save_trained", arguments, tmp_path / "ranks")
    assert first == second
    for base, buffers in zip(folders, first, strict=True):
        checkpoint = store.get_latest(saved / base.name).path
        made = export(ExportTask(checkpoint=checkpoint, model=base, tokenizer=None, out=tmp_path / "export" / base.name))
        assert made.parity is not None
        assert made.num_compared == len(read_state(checkpoint).parameters)
        exported, original = load_file(made.path / "model.safetensors"), load_file(base / "model.safetensors")
        assert {name: one.shape for name, one in exported.items()} == {name: one.shape for name, one in original.items()}
        assert len(buffers) == (base.name in with_buffers)
        corrections = {name for name in original if name.endswith(ROUTER_BUFFER)}
        assert len(corrections) == len(buffers)
        unchanged = {name for name in original if torch.equal(exported[name], original[name])}
        assert corrections <= unchanged
        assert len(unchanged) < len(original) / 2
        assert made.num_parameters == sum(one.numel() for name, one in exported.items() if name not in corrections)
        assert made.num_bytes == sum(one.nbytes for one in exported.values())
    # Without a model that transformers can build, the tensors keep their names in the model.
    task = ExportTask(store.get_latest(saved / "gpt_oss").path, folders[2], None, tmp_path / "unknown", check=False)
    assert export(task).has_original_names
    made = export(replace(task, model={"model_type": "unknown", "architectures": ["Unknown"]}, out=tmp_path / "other"))
    assert not made.has_original_names
    assert describe_names(made)
    # Several files, in a wider and in the same dtype; without a check, the names are the same.
    base = folders[0]
    original = load_file(base / "model.safetensors")
    (buffer,) = first[0]
    for dtype in ("fp32", "bf16"):
        task = ExportTask(store.get_latest(saved / base.name).path, base, None, tmp_path / dtype, dtype=dtype, check=False)
        parts = export(replace(task, max_file_bytes=4000))
        assert len(parts.files) > 2
        assert sorted(name for file in parts.files for name in read_header(parts.path / file)) == sorted(original)
        assert torch.equal(load_file(parts.path / parts.files[0])[buffer], original[buffer])
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(parts.path, output_loading_info=True)
        assert {kind: keys for kind, keys in info.items() if keys} == {}
        assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    # A damaged buffer, which hardly changes the logits of a random model.
    damaged = tmp_path / "damaged" / task.checkpoint.name
    shutil.copytree(task.checkpoint, damaged)
    flip_bit(damaged, 0, buffer_key(buffer), bit=20)
    with pytest.raises(CheckpointError, match="differs from the engine's") as refused:
        export(replace(task, checkpoint=damaged, out=tmp_path / "from-damaged"))
    assert refused.value.problems[0].where.startswith(f"{buffer}, in ")
