"""Sizes of the layers of published models without a preset, compared with transformers' own layers at real width."""

from __future__ import annotations

from typing import Any

import bare_memory
import moved_bytes
import pytest
import torch
from plan_fixtures import KINDS, preset
from real_layers import REAL_LAYERS
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.plan.architecture.facts import model_facts
from launcher.plan.architecture.flops import FAMILIES
from launcher.plan.architecture.layers import attention_sizes, experts_of, is_sparse, largest_weight
from launcher.plan.launch_plan import ModelFacts
from launcher.plan.sizing.activations import Kernels
from launcher.plan.sizing.elementwise import bytes_of_layers

# Layers that equal those of a preset's model, have no packed rows, or belong to models whose logits the loss does not support.
NOT_MEASURED = {"mistral", "ministral", "gemma", "gemma2", "olmo3", "gpt_oss"}
# Enough tokens that the weight gradients do not hide the activations.
TOKENS = 16_384
NO_LAYERS: dict[str, Any] = {"num_hidden_layers": 0, "layer_types": [], "mlp_layer_types": []}
each_model = pytest.mark.parametrize("config", REAL_LAYERS.values(), ids=REAL_LAYERS)


def facts(config: dict[str, Any]) -> ModelFacts:
    return model_facts(config, None, None, None)


def test_every_family_is_measured() -> None:
    measured = {config["model_type"] for config in (*REAL_LAYERS.values(), *(preset(name) for name in KINDS))}
    assert measured | NOT_MEASURED == set(FAMILIES)


@each_model
def test_parameters_are_those_of_the_model(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert facts(config).num_params == pytest.approx(sum(one.numel() for one in model.parameters()), rel=1e-4)
    assert largest_weight(facts(config)) == max(one.numel() for name, one in model.named_parameters() if ".layers." in name)


@pytest.mark.rest
@each_model
def test_the_activations_of_a_layer_are_those_that_a_pass_keeps(config: dict[str, Any]) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    for checkpointing in ("none", "every 2"):
        arguments = (config, TOKENS, checkpointing, "bf16", 64)
        assert bare_memory.predict(*arguments) == pytest.approx(bare_memory.measure(*arguments), rel=0.01)


@pytest.mark.rest
@each_model
def test_elementwise_operations_move_what_a_pass_reads_and_writes(config: dict[str, Any]) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    for checkpointing, share in (("none", 0.0), ("all", 1.0)):
        moved = moved_bytes.measure(config, 512, "bf16", checkpointing)
        without_layers = moved_bytes.measure(config | NO_LAYERS, 512, "bf16")
        planned = 512 * bytes_of_layers(facts(config), Kernels(2, "varlen", 512), share)
        assert planned == pytest.approx(moved - without_layers, rel=0.15)


def test_sizes_of_the_wrong_type_are_ignored() -> None:
    config = REAL_LAYERS["DeepSeek-V3"] | {"kv_lora_rank": "512", "n_routed_experts": [256], "first_k_dense_replace": None}
    assert experts_of(config) is None
    assert not is_sparse(config, 2)
    assert attention_sizes(facts(config)).latents == ()
