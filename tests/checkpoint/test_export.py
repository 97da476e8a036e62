from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.checkpoint import export as exporting
from launcher.checkpoint import store
from launcher.checkpoint.export import check_parity, export, read_probe, require_parity
from launcher.config.schema import RunConfig
from launcher.errors import CheckpointError
from launcher.plan.launch_plan import Batch, LaunchPlan, Limits, Memory, ModelFacts, Provenance, Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def llama_config(kind: str) -> dict:
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


def exported(runs, kind, out, **options):
    checkpoint = store.latest(runs.checkpoints(kind)).path
    return export(checkpoint, **{"model": llama_config(kind), "tokenizer": None, "out": out, "dtype": kind} | options)


def trained(runs, kind, state):
    """What the engine itself gathered when it saved: `fp32`, or `compute` for the weights in its own dtype."""
    tensors = load_file(runs.dump(kind, "saved"))
    return {name.removesuffix(f"|{state}"): tensor for name, tensor in tensors.items() if name.endswith(f"|{state}")}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("kind", "state"), [("fp32", "fp32"), ("bf16", "compute")])
def test_the_folder_holds_the_engines_weights_bit_for_bit(runs, tmp_path, kind, state):
    result = exported(runs, kind, tmp_path / "export")
    assert result.files == ("model.safetensors",)
    weights = load_file(result.path / "model.safetensors")
    assert_same(weights, trained(runs, kind, state))
    assert ("lm_head.weight" in weights) == (kind == "fp32")
    assert result.num_parameters == sum(t.numel() for t in weights.values())
    assert result.num_bytes == sum(t.nbytes for t in weights.values())
    with safe_open(result.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    model, info = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert model.dtype == DTYPES[kind]
    assert_same({name: p.data for name, p in model.named_parameters()}, weights)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind == "bf16")


def test_a_master_copy_can_be_written_of_a_bf16_run(runs, tmp_path):
    result = exported(runs, "bf16", tmp_path / "export", dtype="fp32")
    assert_same(load_file(result.path / "model.safetensors"), trained(runs, "bf16", "fp32"))


def test_large_models_are_split_into_several_files(runs, tmp_path):
    result = exported(runs, "fp32", tmp_path / "export", max_shard_bytes=60_000)
    count = len(result.files)
    assert count > 2
    assert result.files == tuple(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    parts = {file: load_file(result.path / file) for file in result.files}
    assert_same({name: parts[file][name] for name, file in index["weight_map"].items()}, trained(runs, "fp32", "fp32"))
    assert sum(len(part) for part in parts.values()) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == result.num_bytes
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert_same({name: p.data for name, p in model.named_parameters()}, trained(runs, "fp32", "fp32"))


def test_the_config_and_the_files_beside_it(runs, tmp_path):
    base, tokenizer = tmp_path / "base", tmp_path / "tokenizer"
    for folder in (base, tokenizer / "additional_chat_templates"):
        folder.mkdir(parents=True)
    (base / "config.json").write_text(
        json.dumps(llama_config("bf16") | {"architectures": ["LlamaForCausalLM"], "eos_token_id": 3})
    )
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    (base / "model.safetensors").write_text("the base model's weights")
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    for name in kept:
        (tokenizer / name).write_text(f"content of {name}")
    result = exported(runs, "bf16", tmp_path / "export", model=base, tokenizer=tokenizer)
    config = json.loads((result.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == 3
    assert not {"quantization_config", "torch_dtype"} & config.keys()
    assert (result.path / "generation_config.json").read_text() == '{"temperature": 0.6}'
    for name in kept:
        assert (result.path / name).read_text() == f"content of {name}"
    assert_same(load_file(result.path / "model.safetensors"), trained(runs, "bf16", "compute"))


def test_architectures_are_added_where_the_config_has_none(runs, tmp_path):
    result = exported(runs, "fp32", tmp_path / "export")
    assert json.loads((result.path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_parity_passes_and_one_wrong_weight_fails(runs, tmp_path, kind):
    result = exported(runs, kind, tmp_path / "export")
    parity = result.parity
    assert parity.num_tokens == 24
    assert parity.max_mean_kl == {"fp32": 1e-5, "bf16": 1e-2}[kind]
    assert abs(parity.mean_kl) < parity.max_mean_kl / 5
    assert parity.top1_agreement >= 0.9

    file = result.path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    tampered = check_parity(result.path, read_probe(store.latest(runs.checkpoints(kind)).path), dtype=kind)
    with pytest.raises(CheckpointError, match="mean KL"):
        require_parity(tampered)


def test_a_failed_export_leaves_the_earlier_one(runs, tmp_path, monkeypatch):
    out = tmp_path / "export"
    exported(runs, "fp32", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(CheckpointError, match=r"differ in 1 tensors\n.*lm_head.weight: \(511, 27\) in the checkpoint, absent"):
        exported(runs, "fp32", out, model=llama_config("fp32") | {"tie_word_embeddings": True})
    monkeypatch.setattr(exporting, "MAX_MEAN_KL_FP32", -1.0)
    with pytest.raises(CheckpointError, match="does not compute what the trained one"):
        exported(runs, "fp32", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    monkeypatch.undo()
    assert exported(runs, "fp32", out, max_shard_bytes=60_000).path == out
    assert not (out / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_no_export_is_never_replaced(runs, tmp_path):
    (tmp_path / "config.json").write_text("the only copy of something")
    with pytest.raises(CheckpointError, match="something else than an export"):
        exported(runs, "fp32", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def plan_json(run_dir: Path) -> Path:
    llama = llama_config("bf16")
    plan = LaunchPlan(
        run_name="tiny",
        run_dir=str(run_dir),
        wandb_id="w",
        config=RunConfig.model_validate(
            {
                "model": {"init": "random", "config": llama, "tokenizer": "owner/name"},
                "data": {"sources": [{"path": "builtin:stdlib_docs"}]},
                "train": {"max_steps": 4},
            }
        ),
        topology=Topology(nodes=1, ranks_per_node=2, world_size=2, device="cpu", backend="gloo"),
        batch=Batch(
            global_batch_size=4,
            micro_batch_size=2,
            accumulation=1,
            max_tokens_per_step=64,
            tokens_per_step=64,
            max_steps=4,
            epochs=None,
        ),
        deepspeed={},
        memory=Memory(weights_gib=0, gradients_gib=0, optimizer_gib=0, per_rank_gib=0, host_per_node_gib=0, device_gib=None),
        checkpoint_bytes=0,
        limits=Limits(max_seconds=None),
        model=ModelFacts(
            path=None,
            tokenizer_path=None,
            num_params=1,
            num_params_exact=True,
            hidden_size=27,
            num_layers=2,
            num_heads=3,
            num_kv_heads=3,
            head_dim=8,
            intermediate_size=41,
            vocab_size=511,
            tie_word_embeddings=True,
            config=llama,
        ),
        data=None,
        provenance=Provenance(created_at="2026-01-31T09:15:00Z", launcher_version="0", python="3", packages={}),
    )
    path = run_dir / "plan.json"
    path.write_text(plan.to_json())
    return path


def test_the_command(runs, tmp_path, capsys):
    shutil.copytree(runs.checkpoints("bf16"), tmp_path / "checkpoints")
    plan = plan_json(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "launcher.checkpoint.export", str(plan)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"exported step 2 to {tmp_path / 'export'}" in result.stdout
    assert "over 24 tokens: mean KL" in result.stdout
    assert_same(load_file(tmp_path / "export" / "model.safetensors"), trained(runs, "bf16", "compute"))

    assert exporting.main([str(plan), "--step", "3"]) == 1
    assert "choose one of: 0, 2" in capsys.readouterr().err
    shard = tmp_path / "checkpoints" / "step-00000002" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9000] ^= 1
    shard.write_bytes(content)
    assert exporting.main([str(plan), "--out", str(tmp_path / "elsewhere")]) == 1
    assert "digest differs" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    assert exporting.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
