"""The probe with a reduced model: what it keeps of an architecture, its verdicts, and where they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import transformers

from launcher.config.schema import ModelSection
from launcher.models import isolation_verdicts
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import ModelFacts
from launcher.worker.checks import isolation_check, reduced_model

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
        ("llama", "auto", "sdpa", "isolated"),
        ("opt", "auto", "sdpa", "leaks"),
        ("cpmant", "auto", "eager", "leaks"),
        ("cpmant", "sdpa", "sdpa", "unsupported"),
        ("llama", "flash_attention_2", "flash_attention_2", "unknown"),
        ("no_such_type", "auto", "auto", "unknown"),
    ],
)
def test_a_verdict_is_stored_for_config_and_kernel(model_type: str, attention: Any, kernel: str, outcome: str) -> None:
    own = {"num_hidden_layers": 2}
    model, model_of_run = section(attention=attention), facts(model_type, **own)
    assert isolation_verdicts.load(model_of_run, model) is None
    verdict = isolation_check.check(model, model_of_run)
    assert (verdict.outcome, verdict.kernel, verdict.transformers) == (outcome, kernel, transformers.__version__)
    assert isolation_verdicts.load(model_of_run, model) == verdict
    assert isolation_verdicts.load(facts(model_type, num_hidden_layers=3), model) is None
    assert isolation_verdicts.load(model_of_run, section(attention="eager")) is None
    if outcome == "leaks":
        assert "changing a document moves the logits of the" in verdict.detail


def test_a_reduced_model_keeps_the_kinds_of_layers_and_the_windows() -> None:
    kinds = ["sliding_attention"] * 17 + ["full_attention"] * 3
    config = transformers.AutoConfig.for_model(
        "qwen3", **SIZES, head_dim=128, layer_types=kinds, sliding_window=512, use_sliding_window=True
    )
    short, narrow, _ = reduced_model.reductions(config)
    assert (short.layer_types, narrow.layer_types) == (kinds[:18], kinds)
    assert {(c.sliding_window, c.head_dim, c.num_attention_heads, c.num_key_value_heads) for c in (short, narrow)} == {
        (512, 128, 4, 2)
    }
    assert sum(parameter.numel() for parameter in reduced_model.build(short, "sdpa").parameters()) < 20e6
    assert config.hidden_size == 1024, "the config itself is not changed"


def test_plan_refuses_a_model_whose_packed_documents_affect_each_other(
    launch_here: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    cache = {"LAUNCHER_CACHE": str(tmp_path / "cache")}
    settings = ("model=tiny", "model.config.model_type=opt", "+model.config.ffn_dim=64", "model.attention=eager")
    refused = launch_here("plan", *settings, **cache)
    assert refused.returncode == 2
    first, problem, *rest = refused.stderr.splitlines()
    assert first == "checking that packed documents do not affect each other in this model (once)"
    assert problem.startswith("packed documents affect each other in this architecture, with attention by eager: changing a docu")
    assert rest[1:] == ["  value:  opt", "  remedy: set data.packing=false"]
    # The verdict is stored, and does not matter without packing.
    assert launch_here("plan", *settings, **cache).stderr.splitlines()[0] == problem
    assert launch_here("plan", *settings, "data.packing=false", **cache).returncode == 0
    (stored,) = (tmp_path / "cache/isolation-checks").iterdir()
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "outcome": "unknown", "detail": "no small model"}))
    note = "note       whether packed documents affect each other is measured on the loaded model, before step 1 (no small model)"
    assert note in launch_here("plan", *settings, **cache).stdout
