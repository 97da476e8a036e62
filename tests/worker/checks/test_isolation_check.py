"""The isolation check with a reduced model: what it keeps of an architecture, its verdicts, and where they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import transformers

from launcher.config.sections.model import ModelSection
from launcher.errors import RunError
from launcher.models import stored_checks
from launcher.models.found_model import find_model
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import ModelFacts
from launcher.worker.checks import model_check

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 50000,
}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))


def section(**settings: Any) -> ModelSection:
    return ModelSection(init="random", config={"model_type": "any"}, tokenizer="/tokenizer", dtype="fp32", **settings)


def facts(model_type: str, **own: Any) -> ModelFacts:
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
    model, model_of_run = section(attention=attention), facts(model_type, **own)
    assert stored_checks.load_verdict(model_of_run, model) is None
    verdict = model_check.check_isolation(model, model_of_run)
    assert (verdict.outcome, verdict.kernel, verdict.transformers) == (outcome, kernel, transformers.__version__)
    assert stored_checks.load_verdict(model_of_run, model) == verdict
    assert stored_checks.load_verdict(facts(model_type, num_hidden_layers=3), model) is None
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
    of_run = facts("llama").model_copy(update={"config": config})
    verdict = model_check.check_isolation(section(), of_run)
    assert verdict.outcome == outcome, verdict


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 GB")])
def test_a_probe_without_memory_has_no_verdict(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def build(*options: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(model_check, "build_reduced_model", build)
    with pytest.raises(RunError):
        model_check.check_isolation(section(), facts("llama"))
    assert stored_checks.load_verdict(facts("llama"), section()) is None


@pytest.mark.rest
def test_plan_refuses_a_model_whose_packed_documents_affect_each_other(
    launch_here: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
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
