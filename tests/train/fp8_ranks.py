"""Functions for ranks that build a model in FP8, over gloo; tests/forked_ranks.py runs them."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch._dynamo  # noqa: F401  (a lazy import of it inside zero.Init fails)
from train_ranks import meet
from transformers import LlamaConfig
from transformers.integrations import HfDeepSpeedConfig

from launcher.config.schema import ModelSection
from launcher.errors import ConfigError
from launcher.plan.architecture.facts import model_facts
from launcher.train.model import build_model


def build_in_fp8(torchao: str | None) -> dict[str, Any]:
    """Build a model in FP8 under ZeRO-3, with or without torchao's folder; return the layers that use FP8, or the problem."""
    meet()
    if torchao is not None:
        sys.path.insert(0, torchao)
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
            del sys.modules[name]
        sys.modules["torchao"] = None  # type: ignore[assignment]
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    settings = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    partitioned = HfDeepSpeedConfig(settings)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64, num_attention_heads=4)
    section = ModelSection(init="random", config=config.to_dict(), tokenizer="./tokenizer", dtype="bf16", fp8=True)
    facts = model_facts(config.to_dict(), None, None, None)
    try:
        model = build_model(section, facts, "cpu", chunk_tokens=16, uses_fp8=True)
    except ConfigError as error:
        (problem,) = error.problems
        return {"message": problem.message, "where": problem.where, "value": problem.value, "remedy": problem.remedy}
    finally:
        del partitioned
    return {"use": model.fp8_use}
