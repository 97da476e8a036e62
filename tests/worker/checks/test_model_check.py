"""Weight files are compared with the model by transformers' own rules, from their headers only.

The isolation check with a reduced model, and DeepSpeed's check of the values of `deepspeed.extra`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from forked import Launch, require_exit
from plan_fixtures import ConfigOf
from safetensors.torch import load_file
from weight_tools import change_weights, save_model, without

from launcher import facts
from launcher.config.compose import conf_dir
from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, RunError
from launcher.models import stored_checks, weight_files
from launcher.models.found_model import find_model
from launcher.models.weight_files import WeightReport
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import ModelFacts
from launcher.worker.checks import deepspeed_check, model_check

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
# One preset of each architecture.
PRESETS = {
    settings["config"]["model_type"]: settings["config"]
    for file in sorted((conf_dir() / "model").glob("*.yaml"))
    if "config" in (settings := yaml.safe_load(file.read_text()))
}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compared(folder: Path, **settings: object) -> WeightReport:
    return model_check.compare_weights(folder, ModelSection(path=str(folder), **settings))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        model_check.require_weights(find_model(ModelSection(path=str(folder))), lambda line: None)
    assert all(problem.where == "model.path" and problem.remedy for problem in error.value.problems)
    return str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_of_every_preset_pass_and_a_missing_tensor_is_refused(preset: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", PRESETS[preset])
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.layers.1.self_attn.o_proj.weight"))
    assert "model.layers.1.self_attn.o_proj.weight" in refused(folder)


def test_a_missing_part_of_a_fused_tensor_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"model_type": "mixtral"})
    assert compared(folder) == WeightReport()
    change_weights(folder, without("model.layers.1.block_sparse_moe.experts.1.w1.weight"))
    assert "do not fit the model" in refused(folder)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_may_be_absent_where_it_is_tied_to_the_embedding(absent: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, without(absent))
    assert compared(folder) == WeightReport(missing=(absent,))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert compared(folder) == WeightReport()


def test_a_shape_mismatch_reports_both_shapes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(40, 16)}))
    assert "lm_head.weight is [40, 16] in the files and [48, 16] in the model" in refused(folder)


def test_unexpected_tensors_are_listed_and_accepted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    change_weights(folder, lambda tensors: tensors.update({f"vision.{i}": torch.zeros(2) for i in range(7)}))
    model = ModelSection(path=str(folder))
    model_check.require_weights(find_model(model), lambda line: None)
    report = weight_files.load_report(folder, model)
    assert report is not None
    assert report.problems(folder, model) == []
    assert "7 tensors" in str(report.note)


def test_pickled_weights_are_compared_where_they_are_allowed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert compared(folder, allow_pickled_weights=True) == WeightReport()
    torch.save({name: tensor for name, tensor in tensors.items() if "norm" not in name}, folder / "pytorch_model.bin")
    assert len(compared(folder, allow_pickled_weights=True).missing) == 5


def test_a_comparison_is_made_once_for_the_same_headers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    model, lines = ModelSection(path=str(folder)), []
    model_check.require_weights(find_model(model), lines.append)
    assert lines == ["comparing the weight files with the model (once)"]
    model_check.require_weights(find_model(model), lines.append)
    assert len(lines) == 1
    change_weights(folder, without("model.norm.weight"))
    for _ in range(2):
        assert "model.norm.weight" in refused(folder)


def test_a_failed_comparison_is_reported_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> WeightReport:
        raise ImportError("no such kernel")

    monkeypatch.setattr(model_check, "compare_weights", fail)
    folder = save_model(tmp_path / "model", LLAMA)
    model, lines = ModelSection(path=str(folder)), []
    model_check.require_weights(find_model(model), lines.append)
    assert "ImportError: no such kernel" in lines[1]
    assert weight_files.load_report(folder, model) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "from_the_future"}, "from_the_future"),
        ({"model_type": "clip"}, "Unrecognized configuration class"),
        ({"hidden_size": 21, "num_attention_heads": 2}, "hidden size (21)"),
    ],
)
def test_a_config_that_transformers_does_not_accept_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert reason in refused(folder)


def test_random_weights_need_no_files(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", LLAMA)
    (folder / "model.safetensors").unlink()
    model_check.require_weights(find_model(ModelSection(path=str(folder), init="random")), pytest.fail)


def test_a_hub_model_that_stays_incomplete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="incomplete after the download"):
        model_check.require_weights(find_model(ModelSection(path="owner/name")), pytest.fail)


SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 50000,
}


def section(**settings: Any) -> ModelSection:
    return ModelSection(init="random", config={"model_type": "any"}, tokenizer="/tokenizer", dtype="fp32", **settings)


def facts_of(model_type: str, **own: Any) -> ModelFacts:
    return model_facts({"model_type": model_type, **SIZES, **own}, None, None, None)


@pytest.mark.parametrize(
    ("model_type", "attention", "kernel", "outcome"),
    [
        ("llama", "auto", "varlen", "isolated"),
        ("olmoe", "auto", "varlen", "isolated"),
        ("opt", "sdpa", "sdpa", "leaks"),
        ("biogpt", "auto", "sdpa", "leaks"),
        ("gemma2", "varlen", "varlen", "unsupported"),
        ("bert", "auto", "varlen", "not_causal"),
        ("cohere", "auto", "varlen", "other_logits"),
        ("llama", "flash_attention_2", "flash_attention_2", "unknown"),
        ("no_such_type", "auto", "auto", "unknown"),
    ],
)
def test_a_verdict_is_stored_for_config_and_kernel(model_type: str, attention: Any, kernel: str, outcome: str) -> None:
    own = {"num_hidden_layers": 2}
    model, model_of_run = section(attention=attention), facts_of(model_type, **own)
    assert stored_checks.load_verdict(model_of_run, model) is None
    verdict = model_check.check_isolation(model, model_of_run)
    assert (verdict.outcome, verdict.kernel, verdict.transformers) == (outcome, kernel, transformers.__version__)
    assert stored_checks.load_verdict(model_of_run, model) == verdict
    assert stored_checks.load_verdict(facts_of(model_type, num_hidden_layers=3), model) is None
    assert stored_checks.load_verdict(model_of_run, section(attention="eager")) is None
    details = {
        "leaks": "changing a document moves the logits of the next one",
        "not_causal": "changing tokens moves the logits before",
    }
    assert verdict.detail.startswith(details.get(outcome, ""))


def test_the_parameters_of_an_architecture_are_counted_once(tmp_path: Path) -> None:
    """The plan does not know the layers of OPT, and takes its MLP for a gated one."""
    model = ModelSection(init="random", config={"model_type": "opt", **SIZES, "ffn_dim": 3072}, tokenizer=str(tmp_path))
    before = find_model(model).facts
    model_check.check_isolation(model, before)
    after = find_model(model).facts
    assert (before.num_params_exact, after.num_params_exact) == (False, True)
    layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 3072 + 3072 + 1024 + 2 * 2 * 1024
    # Tied embeddings, 2048 positions after an offset of 2, and the last norm.
    assert after.num_params == 50_000 * 1024 + 2050 * 1024 + 20 * layer + 2 * 1024
    assert before.num_params > 1.2 * after.num_params
    assert find_model(model.model_copy(update={"attention": "eager"})).facts.num_params == after.num_params


def test_a_reduced_model_keeps_the_kinds_of_layers_and_the_windows() -> None:
    kinds = ["sliding_attention"] * 17 + ["full_attention"] * 3
    config = transformers.AutoConfig.for_model(
        "qwen3", **SIZES, head_dim=128, layer_types=kinds, sliding_window=512, use_sliding_window=True
    )
    several, wide = model_check.reduce_config(config)
    assert several.layer_types == wide.layer_types == kinds[:18]
    assert (several.sliding_window, several.head_dim, several.num_attention_heads, several.num_key_value_heads) == (
        512,
        128,
        4,
        2,
    )
    assert wide.hidden_size == 1024
    assert sum(parameter.numel() for parameter in model_check.build_reduced_model(several, "sdpa").parameters()) < 20e6
    assert config.hidden_size == 1024, "the config itself is not changed"


# Layers are listed by number in one; get_decoder() returns the whole model in the other.
@pytest.mark.parametrize(("model_type", "outcome"), [("llama4", "isolated"), ("modernbert-decoder", "other_logits")])
def test_models_of_full_size_are_reduced_by_the_same_rule(model_type: str, outcome: str) -> None:
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    of_run = facts_of("llama").model_copy(update={"config": config})
    verdict = model_check.check_isolation(section(), of_run)
    assert verdict.outcome == outcome, verdict


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 GB")])
def test_a_probe_without_memory_has_no_verdict(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def build(*options: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(model_check, "build_reduced_model", build)
    with pytest.raises(RunError):
        model_check.check_isolation(section(), facts_of("llama"))
    assert stored_checks.load_verdict(facts_of("llama"), section()) is None


@pytest.mark.rest
def test_plan_refuses_a_model_whose_packed_documents_affect_each_other(launch_here: Launch, tmp_path: Path) -> None:
    cache = {"LAUNCHER_CACHE": str(tmp_path / "cache")}
    settings = ("model=tiny", "model.config.model_type=opt", "+model.config.ffn_dim=64", "model.attention=eager")
    refused = launch_here("plan", *settings, **cache)
    assert refused.returncode == 2
    first, problem, *rest = refused.stderr.splitlines()
    assert first == "checking that packed documents do not affect each other in this model (once)"
    assert problem.startswith("packed documents affect each other in this architecture, with the attention kernel eager: ")
    assert rest[1:] == ["  value:  opt", "  remedy: set data.packing=false"]
    # The verdict is stored, and does not matter without packing.
    assert launch_here("plan", *settings, **cache).stderr.splitlines()[0] == problem
    assert launch_here("plan", *settings, "data.packing=false", **cache).returncode == 0
    (stored,) = (tmp_path / "cache/isolation-checks").iterdir()
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "outcome": "unknown", "detail": "no small model"}))
    note = "note       whether packed documents affect each other is measured on the loaded model, before step 1 (no small model)"
    assert note in launch_here("plan", *settings, **cache).stdout


@pytest.mark.parametrize(
    ("extra", "start"),
    [
        ("zero_optimization: {reduce_scatter: 3.5}", "deepspeed.extra.reduce_scatter: "),
        ("tensorboard: {output_pth: x}", "deepspeed.extra.tensorboard.output_pth: "),
        ("communication_data_type: bf61", "DeepSpeed refuses these keys: "),
    ],
)
def test_a_value_that_deepspeed_refuses(config_of: ConfigOf, extra: str, start: str) -> None:
    (problem,) = deepspeed_check.check(config_of(f"deepspeed.extra={{{extra}}}"))
    assert problem.message.startswith(start)
    assert problem.where == "deepspeed.extra"


def test_keys_that_are_accepted_once_need_no_process_again(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(config: RunConfig) -> object:
        monkeypatch.setattr("sys.stdin", io.StringIO(config.model_dump_json()))
        assert deepspeed_check.main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert facts.is_extra_accepted(config_of())
    good = config_of("deepspeed.extra={zero_optimization: {round_robin_gradients: true}, wall_clock_breakdown: true}")
    assert not facts.is_extra_accepted(good)
    assert answer(good) == {"problems": []}
    assert facts.is_extra_accepted(good)
    bad = config_of("deepspeed.extra={zero_optimization: {reduce_scatter: 3.5}}")
    assert answer(bad) != {"problems": []}
    assert not facts.is_extra_accepted(bad)
    # Another version may have other keys.
    monkeypatch.setattr(facts, "_find_version", lambda name: "99.0")
    assert not facts.is_extra_accepted(good)


@pytest.mark.rest
def test_a_run_with_a_value_that_deepspeed_refuses_leaves_nothing(launch_here: Launch, tmp_path: Path) -> None:
    extra = "deepspeed.extra={zero_optimization: {reduce_scatter: 3.5}}"
    done = launch_here("model=tiny", "tracking=none", f"run.root={tmp_path}/runs", extra)
    require_exit(done, 2)
    assert "deepspeed.extra" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()
