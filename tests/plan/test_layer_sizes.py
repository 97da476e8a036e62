"""Sizes of the layers of published models without a preset, compared with transformers' own layers at real width."""

from __future__ import annotations

import json
from typing import Any

import bare_memory
import pytest
import torch
from plan_fixtures import KINDS, preset
from real_layers import REAL_LAYERS
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.plan.architecture import experts_by_layer, largest_weight, model_facts
from launcher.plan.flops import FAMILIES, train_flops
from launcher.plan.launch_plan import ModelFacts

NOT_MEASURED = {
    "mistral": "layers of Llama",
    "ministral": "layers of Llama",
    "olmo3": "layers of OLMo 2",
    "gemma": "has no published size below 2B that is still in use",
    "gemma2": "is refused, because it caps its logits",
}
# Enough tokens that the weight gradients do not hide the activations.
TOKENS = 16_384
# gpt-oss has attention sinks, which varlen does not compute.
PACKED = {name: config for name, config in REAL_LAYERS.items() if name != "gpt-oss-20b"}
PUBLISHED = REAL_LAYERS
PRESETS = {name: preset(name, num_hidden_layers=3, vocab_size=256, pad_token_id=0, bos_token_id=0) for name in KINDS}
each_packed_model = pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)


def facts(config: dict[str, Any]) -> ModelFacts:
    return model_facts(config, None, None, None)


def test_every_family_is_measured() -> None:
    measured = {config["model_type"] for config in (*REAL_LAYERS.values(), *(preset(name) for name in KINDS))}
    assert measured | set(NOT_MEASURED) == set(FAMILIES)


@pytest.mark.parametrize("config", (PUBLISHED | PRESETS).values(), ids=PUBLISHED | PRESETS)
def test_parameters_are_those_of_the_model(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    left_out = ("bias", "sinks") if config["model_type"] not in ("qwen2", "qwen2_moe", "seed_oss") else ("sinks",)
    num_params = sum(one.numel() for name, one in model.named_parameters() if not name.endswith(left_out))
    # A config that transformers has saved has other keys than the published one.
    for known in (facts(config), facts(json.loads(model.config.to_json_string(use_diff=False)))):
        assert known.num_params == num_params
        assert largest_weight(known) == max(one.numel() for name, one in model.named_parameters() if ".layers." in name)
        assert train_flops(known) is not None


@pytest.mark.rest
@each_packed_model
def test_the_activations_of_a_layer_are_those_that_a_pass_keeps(config: dict[str, Any]) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    for checkpointing in ("none", "every 2"):
        arguments = (config, TOKENS, checkpointing, "bf16", 64)
        assert bare_memory.predict(*arguments) == pytest.approx(bare_memory.measure(*arguments), rel=0.01)


@pytest.mark.rest
@pytest.mark.parametrize(("name", "dtype"), [("gpt-oss-20b", "bf16"), ("qwen3_0_6b", "bf16"), ("qwen3_0_6b", "fp32")])
def test_the_eager_kernel_keeps_the_softmax_of_every_layer(name: str, dtype: str) -> None:
    config = REAL_LAYERS[name] if name in REAL_LAYERS else preset(name, vocab_size=256)
    # So few experts that their gradients do not hide the activations.
    config = config | ({"num_local_experts": 4} if name == "gpt-oss-20b" else {})
    for checkpointing in ("none", "all"):
        changes = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6, "pad_token_id": 0}
        arguments = (config | changes | {"bos_token_id": 0, "eos_token_id": 0}, 4096, checkpointing, dtype, 64, "eager")
        assert bare_memory.predict(*arguments) == pytest.approx(bare_memory.measure(*arguments), rel=0.05)


def test_layers_with_experts_are_those_of_each_architecture() -> None:
    def sparse(name: str, **changes: Any) -> list[bool]:
        model = facts(REAL_LAYERS[name] | {"num_hidden_layers": 4} | changes)
        return [experts is not None for experts in experts_by_layer(model)]

    assert sparse("DeepSeek-V3", first_k_dense_replace=3) == [False, False, False, True]
    assert sparse("DeepSeek-V3", first_k_dense_replace=None) == [True] * 4
    # Its own keys alone count for each architecture.
    assert sparse("GLM-4.7-Flash", first_k_dense_replace=3) == [False, True, True, True]
    assert sparse("GLM-4.7-Flash", mlp_layer_types=["sparse", "dense"]) == [True, False, False, False]
    assert sparse("ERNIE-4.5-21B-A3B", moe_layer_start_index=0, moe_layer_end_index=0) == [True, False, False, False]
    assert sparse("ERNIE-4.5-21B-A3B", moe_layer_end_index=-1, moe_layer_interval=2) == [False, True, False, True]
    assert sparse("Qwen1.5-MoE-A2.7B", mlp_only_layers=[2], decoder_sparse_step=1) == [True, True, False, True]
    assert sparse("Mixtral-8x7B", mlp_only_layers=[2], first_k_dense_replace=2) == [True] * 4
    assert sparse("Hunyuan-7B", num_experts=1) == [False] * 4
