"""Configs of published models without a preset, of every family whose layers differ from those of the presets.

The numbers of layers and, for DeepSeek-V3, of experts are smaller, so that weights do not hide activations.
"""

from __future__ import annotations

import json
from typing import Any

import bare_memory
import pytest
import torch
from plan_fixtures import KINDS, preset
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.plan.architecture import experts_by_layer, largest_weight, model_facts
from launcher.plan.flops import FAMILIES, train_flops
from launcher.plan.launch_plan import ModelFacts

_SMALL = {
    "num_hidden_layers": 3,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
# Enough tokens that the weight gradients do not hide the activations.
TOKENS = 16_384


def _config(model_type: str, hidden: int, heads: tuple[int, int], intermediate: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return {"model_type": model_type, **sizes, "intermediate_size": intermediate, **_SMALL, **more}


def _routed(number: int, chosen: int, size: int, shared: int) -> dict[str, Any]:
    sizes = {"n_routed_experts": number, "num_experts_per_tok": chosen, "moe_intermediate_size": size, "n_shared_experts": shared}
    return {**sizes, "n_group": 1, "topk_group": 1}


def _latents(query: int, plain: int, value: int) -> dict[str, Any]:
    heads = {"qk_nope_head_dim": plain, "qk_rope_head_dim": 64, "v_head_dim": value}
    return {"q_lora_rank": query, "kv_lora_rank": 512, **heads}


REAL_LAYERS = {
    "GLM-4.5-Air": _config(
        *("glm4_moe", 4096, (96, 8), 10944),
        **{"head_dim": 128, "attention_bias": True, "first_k_dense_replace": 1, **_routed(128, 8, 1408, 1)},
    ),
    "GLM-4.7-Flash": _config(
        *("glm4_moe_lite", 2048, (20, 20), 10240),
        **{"first_k_dense_replace": 1, **_routed(64, 4, 1536, 1), **_latents(768, 192, 256)},
    ),
    "DeepSeek-V3": _config(
        *("deepseek_v3", 7168, (128, 128), 18432),
        **{"first_k_dense_replace": 1, **_routed(32, 8, 2048, 1), **_latents(1536, 128, 128)},
    ),
    "dots.llm1": _config("dots1", 4096, (32, 32), 10944, first_k_dense_replace=1, **_routed(128, 6, 1408, 2)),
    "MiniMax-M2": _config(
        "minimax_m2", 3072, (48, 8), 1536, head_dim=128, rotary_dim=64, num_local_experts=256, num_experts_per_tok=8
    ),
    "ERNIE-4.5-21B-A3B": _config(
        *("ernie4_5_moe", 2560, (20, 4), 12288),
        **{"moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2},
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
    ),
    "ERNIE-4.5-0.3B": _config("ernie4_5", 1024, (16, 2), 3072, head_dim=128),
    "EXAONE-4.0-32B": _config(
        "exaone4", 5120, (40, 8), 27392, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    ),
    "GLM-4-9B-0414": _config("glm4", 4096, (32, 2), 13696, head_dim=128),
    "glm-4-9b": _config("glm", 4096, (32, 2), 13696, head_dim=128),
    "Hunyuan-7B": _config("hunyuan_v1_dense", 4096, (32, 8), 14336, head_dim=128),
    "InternLM3-8B": _config("internlm3", 4096, (32, 2), 10240, head_dim=128),
    "Ministral-3-8B": _config("ministral3", 4096, (32, 8), 14336, head_dim=128),
    "Mixtral-8x7B": _config("mixtral", 4096, (32, 8), 14336, num_local_experts=8, num_experts_per_tok=2),
    "Qwen1.5-MoE-A2.7B": _config(
        *("qwen2_moe", 2048, (16, 16), 5632),
        **{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "Phi-4-mini": _config("phi3", 3072, (24, 8), 8192, partial_rotary_factor=0.75, sliding_window=None),
    "Seed-OSS-36B": _config("seed_oss", 5120, (80, 8), 27648, head_dim=128),
    "gpt-oss-20b": _config(
        *("gpt_oss", 2880, (64, 8), 2880),
        **{"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "layer_types": ["full_attention"] * 3},
    ),
    "cwm": _config("cwm", 6144, (48, 8), 21504, head_dim=128, layer_types=["full_attention"] * 3, sliding_window=8192),
}
NOT_MEASURED = {
    "mistral": "layers of Llama",
    "ministral": "layers of Llama",
    "olmo3": "layers of OLMo 2",
    "gemma": "has no published size below 2B that is still in use",
    "gemma2": "is refused, because it caps its logits",
}
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
