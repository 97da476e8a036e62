"""The exported folder: the engine's weights bit for bit, written by one process or by all ranks, and the `export` command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from forked import require_exit
from forked_ranks import RankServer
from plan_fixtures import DATA
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shard_tools import engine_metadata, flip_bit, llama_config, plan_of, with_metadata

from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST, REFERENCE_LOGITS, read_manifest
from launcher.errors import CheckpointError
from launcher.export import hf_folder as exporting
from launcher.export import parity as proving
from launcher.export.hf_folder import ExportTask, export
from launcher.export.parity import check_parity, load_exported, read_reference_logits, require_finite, require_parity
from launcher.models.found_model import read_stop_ids
from launcher.worker import export as command

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def task(runs, kind, out, **options):
    checkpoint = store.get_latest(runs.checkpoints(kind)).path
    return ExportTask(
        **{"checkpoint": checkpoint, "model": llama_config(kind), "tokenizer": None, "out": out, "dtype": kind} | options
    )


def exported(runs, kind, out, **options):
    return export(task(runs, kind, out, **options))


def trained(runs, kind, state):
    """The weights that the engine gathered when it saved: `fp32`, or `compute` for its own dtype."""
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

    model, info = transformers.AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert model.dtype == DTYPES[kind]
    assert_same({name: p.data for name, p in model.named_parameters()}, weights)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind == "bf16")


def test_a_bf16_run_can_be_exported_in_fp32(runs, tmp_path):
    result = exported(runs, "bf16", tmp_path / "export", dtype="fp32")
    assert_same(load_file(result.path / "model.safetensors"), trained(runs, "bf16", "fp32"))


def test_large_models_are_split_into_several_files(runs, tmp_path):
    result = exported(runs, "fp32", tmp_path / "export", max_file_bytes=60_000)
    count = len(result.files)
    assert count > 2
    assert result.files == tuple(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    parts = {file: load_file(result.path / file) for file in result.files}
    assert_same({name: parts[file][name] for name, file in index["weight_map"].items()}, trained(runs, "fp32", "fp32"))
    assert sum(len(part) for part in parts.values()) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == result.num_bytes
    model = transformers.AutoModelForCausalLM.from_pretrained(result.path)
    assert_same({name: p.data for name, p in model.named_parameters()}, trained(runs, "fp32", "fp32"))


def test_config_and_tokenizer_files_are_exported(runs, tmp_path):
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


def test_what_does_not_apply_to_the_exported_files_is_left_out(runs, tmp_path):
    base, tokenizer = tmp_path / "base", tmp_path / "tokenizer"
    base.mkdir()
    tokenizer.mkdir()
    of_files = {
        "transformers_weights": "weights-hf.safetensors",
        "auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"},
        "architectures": ["LlamaForSequenceClassification"],
        "num_nextn_predict_layers": 1,
    }
    (base / "config.json").write_text(json.dumps(llama_config("bf16") | of_files))
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "_from_model_config": true}')
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tekken.json").write_text("{}")
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<s>", "auto_map": {"AutoTokenizer": ["code.T", null]}}')
    result = exported(runs, "bf16", tmp_path / "export", model=base, tokenizer=tokenizer, turn_end_ids=(3,))
    config = json.loads((result.path / "config.json").read_text())
    assert not {"transformers_weights", "auto_map"} & config.keys()
    assert (config["architectures"], config["num_nextn_predict_layers"]) == (["LlamaForCausalLM"], 0)
    assert json.loads((result.path / "generation_config.json").read_text()) == {"eos_token_id": [0, 3]}
    assert json.loads((result.path / "tokenizer_config.json").read_text()) == {"eos_token": "<s>"}
    # Where mistral-common is installed, it takes precedence over tokenizer.json and the chat template.
    assert not (result.path / "tekken.json").exists()


def test_a_removed_tokenizer_is_named(runs, tmp_path):
    with pytest.raises(CheckpointError, match="no longer exists") as error:
        exported(runs, "bf16", tmp_path / "export", tokenizer=tmp_path / "removed")
    assert str(tmp_path / "removed") in str(error.value)
    assert not (tmp_path / "export").exists()


def test_a_chat_template_replaces_the_tokenizers_own(runs, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    (tokenizer / "additional_chat_templates").mkdir(parents=True)
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "chat_template": "old"}')
    for name in ("tokenizer.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"):
        (tokenizer / name).write_text("old")
    text = "{% for m in messages %}{{ m.content }} – é{% endfor %}\n"
    result = exported(runs, "bf16", tmp_path / "export", tokenizer=tokenizer, chat_template=text)
    assert (result.path / "chat_template.jinja").read_text() == text
    assert json.loads((result.path / "tokenizer_config.json").read_text()) == {"eos_token": "<|im_end|>"}
    assert [path.name for path in result.path.iterdir() if "template" in path.name] == ["chat_template.jinja"]
    assert (result.path / "tokenizer.json").read_text() == "old"


@pytest.mark.parametrize(
    ("of_config", "of_generation", "expected"),
    [
        (0, None, {"bos_token_id": 1, "eos_token_id": [0, 3, 5]}),
        (None, None, {"bos_token_id": 1, "eos_token_id": [3, 5]}),
        (0, {"temperature": 0.6, "eos_token_id": 5}, {"temperature": 0.6, "eos_token_id": [5, 3]}),
        (0, {"eos_token_id": [7, 3, 5]}, {"eos_token_id": [7, 3, 5]}),
    ],
)
def test_generation_stops_at_the_datas_end_of_turn(runs, tmp_path, of_config, of_generation, expected):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(llama_config("bf16") | {"bos_token_id": 1, "eos_token_id": of_config}))
    if of_generation is not None:
        (base / "generation_config.json").write_text(json.dumps(of_generation))
    result = exported(runs, "bf16", tmp_path / "export", model=base, turn_end_ids=(3, 5))
    assert json.loads((result.path / "generation_config.json").read_text()) == expected
    assert result.added_stop_ids == tuple(i for i in (3, 5) if i not in read_stop_ids(base))
    assert read_stop_ids(result.path) == expected["eos_token_id"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.path).generation_config
    assert loaded.eos_token_id == expected["eos_token_id"]


def test_an_export_that_rounds_less_than_the_engine_is_compared_in_the_engines_dtype(runs, tmp_path):
    """Weights in fp32 have other logits than the trained model, whose weights are rounded to bf16."""
    result = exported(runs, "bf16", tmp_path / "export", dtype="fp32")
    assert load_file(result.path / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert result.parity == exported(runs, "bf16", tmp_path / "same").parity
    in_fp32 = load_exported(result.path, dtype="fp32")
    reference_logits = read_reference_logits(store.get_latest(runs.checkpoints("bf16")).path)
    assert check_parity(in_fp32, reference_logits, dtype="fp32").mean_kl > 3 * result.parity.mean_kl


def test_missing_architectures_are_added_to_the_config(runs, tmp_path):
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
    reference_logits = read_reference_logits(store.get_latest(runs.checkpoints(kind)).path)
    tampered = check_parity(load_exported(result.path, dtype=kind), reference_logits, dtype=kind)
    with pytest.raises(CheckpointError, match="mean KL"):
        require_parity(tampered)


def test_a_failed_export_keeps_the_earlier_one(runs, tmp_path, monkeypatch):
    out = tmp_path / "export"
    exported(runs, "fp32", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(CheckpointError, match=r"differ in 1 tensors\n.*lm_head.weight: \(511, 27\) in the checkpoint, absent"):
        exported(runs, "fp32", out, model=llama_config("fp32") | {"tie_word_embeddings": True})
    monkeypatch.setattr(proving, "MAX_MEAN_KL_FP32", -1.0)
    with pytest.raises(CheckpointError, match="logits differ from the trained model's"):
        exported(runs, "fp32", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    monkeypatch.undo()
    assert exported(runs, "fp32", out, max_file_bytes=60_000).path == out
    assert not (out / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_not_an_export_is_never_replaced(runs, tmp_path):
    (tmp_path / "config.json").write_text("the only copy of something")
    with pytest.raises(CheckpointError, match="holds files that are not an export"):
        exported(runs, "fp32", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def without_reference_logits(runs, kind, folder):
    """Copy a checkpoint without the engine's reference logits, as one that was not the run's last."""
    checkpoint = with_metadata(store.get_latest(runs.checkpoints(kind)).path, folder)
    manifest = read_manifest(checkpoint)
    files = {name: entry for name, entry in manifest.files.items() if name != REFERENCE_LOGITS}
    (checkpoint / MANIFEST).write_text(replace(manifest, files=files).to_json())
    (checkpoint / REFERENCE_LOGITS).unlink()
    return checkpoint


def test_without_reference_logits_the_folder_is_still_loaded(runs, tmp_path):
    result = exported(runs, "bf16", tmp_path / "export", checkpoint=without_reference_logits(runs, "bf16", tmp_path))
    assert result.loaded
    assert result.parity is None
    assert_same(load_file(result.path / "model.safetensors"), trained(runs, "bf16", "compute"))


def test_loading_detects_missing_unused_and_non_finite_weights(runs, tmp_path):
    file = exported(runs, "bf16", tmp_path / "export").path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing_keys: {name}"):
        load_exported(file.parent, dtype="bf16")
    save_file(weights | {"model.layers.9.odd": weights[name].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys: model\.layers\.9\.odd"):
        load_exported(file.parent, dtype="bf16")
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        require_finite(load_exported(file.parent, dtype="bf16"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        load_exported(file.parent, dtype="bf16")


def test_a_model_that_does_not_fit_in_memory_is_exported_and_not_loaded(runs, tmp_path, monkeypatch):
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    result = exported(runs, "bf16", tmp_path / "export")
    assert not result.loaded
    assert "GiB are free" in result.not_loaded
    assert (result.path / "model.safetensors").is_file()


def test_several_ranks_write_the_same_folder_as_one(runs, tmp_path):
    alone = exported(runs, "fp32", tmp_path / "alone", max_file_bytes=60_000)
    shared = task(runs, "fp32", tmp_path / "shared", max_file_bytes=60_000)
    exporting.begin_export(shared)
    for rank in (2, 0, 1):
        before = {p.name for p in shared.partial.glob("*.safetensors")}
        exporting.write_rank_files(shared, rank, 3)
        assert {p.name for p in shared.partial.glob("*.safetensors")} - before == set(alone.files[rank::3])
    result = exporting.complete_export(shared, lambda made: f"{made.num_tensors} tensors")
    assert result.loaded
    assert (result.path / "README.md").read_text() == f"{len(trained(runs, 'fp32', 'fp32'))} tensors"
    for path in alone.path.iterdir():
        assert (result.path / path.name).read_bytes() == path.read_bytes(), path.name


def test_licenses_are_copied(runs, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(llama_config("bf16")))
    for name in ("LICENSE", "NOTICE.txt", "README.md"):
        (base / name).write_text(name)
    result = exported(runs, "bf16", tmp_path / "export", model=base)
    assert (result.path / "LICENSE").read_text() == "LICENSE"
    assert (result.path / "NOTICE.txt").read_text() == "NOTICE.txt"
    assert not (result.path / "README.md").exists(), "another model's card"


@pytest.fixture
def checkpoint(runs, tmp_path: Path) -> Path:
    newest = store.get_latest(runs.checkpoints("bf16")).path
    return with_metadata(newest, tmp_path / "checkpoints", engine_metadata(runs.dump("bf16", "saved"), "bf16", 2))


def exported_by_ranks(
    rank_server: RankServer, run: Path, checkpoint: Path, limited: int = -1, push_to_hub: str | None = None
) -> list[tuple[int, str]]:
    """The exit code and output of two ranks that export the checkpoint of `run`."""
    plan = plan_of(run)
    export = plan.config.export.model_copy(update={"push_to_hub": push_to_hub})
    config = plan.config.model_copy(update={"export": export})
    (run / "plan.json").write_text(plan.model_copy(update={"config": config}).to_json())
    arguments = [(str(run / "plan.json"), str(checkpoint), limited)] * 2
    return [(rank.code, rank.output) for rank in rank_server.run("export_ranks:main", arguments, run / "ranks")]


@pytest.mark.parametrize("limited", [0, 1])
def test_a_failing_rank_fails_the_export_on_all_ranks(rank_server, checkpoint, tmp_path, limited):
    for code, output in exported_by_ranks(rank_server, tmp_path, checkpoint, limited=limited):
        assert code == 3, output
        assert "training is complete and saved, but the Hugging Face folder could not be written" in output
        assert f"rank {limited}, {tmp_path}" in output
        assert f"then: python -m launcher export {tmp_path}" in output
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / ".export.partial").exists()
    assert store.verify(checkpoint) == []


def test_a_wrong_weight_raises_on_all_ranks(rank_server, checkpoint, tmp_path):
    flip_bit(checkpoint, 1, "model.layers.0.mlp.up_proj.weight|fp32", bit=30)
    for code, output in exported_by_ranks(rank_server, tmp_path, checkpoint):
        assert code == 3, output
        assert "differs from the engine's" in output
        assert "model.layers.0.mlp.up_proj.weight, part of rank 1" in output
    assert not (tmp_path / "export").exists()


def test_a_failed_push_is_an_alert_and_keeps_the_folder(rank_server, checkpoint, tmp_path):
    (code, output), _ = exported_by_ranks(rank_server, tmp_path, checkpoint, push_to_hub="owner/name")
    assert code == 0, output
    assert "alert: a push to the Hub needs HF_TOKEN" in output
    assert f"python -m launcher export {tmp_path} --push owner/name" in output
    assert (tmp_path / "export" / "config.json").is_file()


@pytest.fixture
def run(runs, tmp_path: Path) -> Path:
    """A run directory with checkpoints of the bf16 engine; the newest has the engine's digests."""
    path = tmp_path / "run"
    shutil.copytree(store.get_at_step(runs.checkpoints("bf16"), 0).path, path / "checkpoints" / "step-00000000")
    newest = store.get_at_step(runs.checkpoints("bf16"), 2).path
    with_metadata(newest, path / "checkpoints", engine_metadata(runs.dump("bf16", "saved"), "bf16", 2))
    (path / "plan.json").write_text(plan_of(path).to_json())
    return path


def test_the_command(runs, run, tmp_path, capsys):
    command_line = [sys.executable, "-m", "launcher.worker.export", str(run / "plan.json")]
    result = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False)
    require_exit(result)
    assert f"exported step 2 to {run / 'export'}" in result.stdout
    assert "over 24 tokens: mean KL" in result.stdout
    weights = load_file(run / "export" / "model.safetensors")
    assert f"all {len(weights)} tensors equal the engine's" in result.stdout
    trained = load_file(runs.dump("bf16", "saved"))
    assert all((tensor == trained[f"{name}|compute"]).all() for name, tensor in weights.items())

    plan = str(run / "plan.json")
    assert command.main([plan, "--step", "3"]) == 1
    assert "choose one of: 0, 2" in capsys.readouterr().err
    assert command.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_skipped_checks_are_reported(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step-00000002"
    plain = with_metadata(checkpoint, tmp_path)
    shutil.rmtree(checkpoint)
    plain.rename(checkpoint)
    assert command.main([str(run / "plan.json"), "--no-check"]) == 0
    said = capsys.readouterr().out
    assert "digests: not compared" in said
    assert "not loaded by transformers: not asked for" in said


def test_an_export_elsewhere_is_readable_for_its_user_alone(run, tmp_path):
    mask = os.umask(0o022)
    try:
        assert command.main([str(run / "plan.json"), "--no-check", "--out", str(tmp_path / "elsewhere")]) == 0
    finally:
        assert os.umask(mask) == 0o022
    folder = tmp_path / "elsewhere"
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert (folder.stat().st_mode & 0o777, modes) == (0o700, {0o600})


def test_a_damaged_checkpoint_is_refused_before_writing(run, tmp_path, capsys):
    flip_bit(run / "checkpoints" / "step-00000002", 1, "model.norm.weight|exp_avg", bit=3)
    arguments = [str(run / "plan.json"), "--no-check", "--out", str(tmp_path / "elsewhere")]
    assert command.main([*arguments, "--dtype", "fp32"]) == 1
    assert "digest differs" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_the_exported_template_is_the_one_that_rendered_the_data(run, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("of the file")
    plan = plan_of(run)
    config = plan.config.model_copy(update={"data": plan.config.data.model_copy(update={"chat_template": str(file)})})
    data = DATA.model_copy(update={"chat_template": "of the plan"})
    (run / "plan.json").write_text(plan.model_copy(update={"config": config, "data": data}).to_json())
    made = command.export_run(run / "plan.json", step=2, dtype="bf16", out=None, check=False)
    assert (made.path / "chat_template.jinja").read_text() == "of the plan"


def test_the_card_describes_the_attempt_that_saved(run):
    attempt = run / "attempts" / "001"
    attempt.mkdir(parents=True)
    plan = plan_of(run)
    changed = plan.config.model_copy(update={"optim": plan.config.optim.model_copy(update={"lr": 7e-6})})
    (attempt / "plan.json").write_text(plan.model_copy(update={"config": changed}).to_json())
    lines = [{"trainer/step": step, "attempt": 1, "train/loss": 3.0 - step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = command.export_run(run / "plan.json", step=2, dtype="bf16", out=None, check=False)
    card = (made.path / "README.md").read_text()
    assert "7e-06 at its peak" in card
    assert "settings of optim differed in earlier attempts" in card
    assert "| training, step 2 | 1.0000 |" in card
