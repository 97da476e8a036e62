"""The FLOP formula compared with torch's FlopCounterMode, on the model that the loop trains, forward and backward.

FlopCounterMode (torch/utils/flop_counter.py) counts 2mkn for every dispatched matrix product, regardless of masks. It thus
counts attention over the full [T, T] square of a row: twice the causal part, across packed documents and beyond windows. For
fused SDPA on a GPU, it adds the scores that the backward pass recomputes (14 instead of 12 products of heads x head_dim x T^2).
It counts nothing for fused SDPA on a CPU, for grouped products of experts, and for in-place `addmm_`.

These tests do not correct the count by a formula. Instead, they replace the attention kernel with one that multiplies each
query only with the keys that the model's own mask allows; its logits equal those of the model's own kernel. Experts run one
after the other, and `addmm_`, with which the loss head sums its gradient, is registered with its real cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from plan_fixtures import PlanOf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError
from launcher.plan.architecture import architecture_problems, model_facts
from launcher.plan.flops import FAMILIES, TrainFlops, train_flops
from launcher.plan.launch_plan import IsolationVerdict, ModelFacts
from launcher.train.model import CausalLMLoss, build_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
HEADS: dict[str, Any] = {"head_dim": 24}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_group": 2,
    "topk_group": 1,
}
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 36,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", **HEADS, "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 9},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", **HEADS, "tie_word_embeddings": True},
    "qwen3, window": {"model_type": "qwen3", **HEADS, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gemma": {"model_type": "gemma", **HEADS},
    "gemma2": {"model_type": "gemma2", **HEADS, "sliding_window": 9, "final_logit_softcapping": None},
    "gemma3": {"model_type": "gemma3_text", **HEADS, "sliding_window": 9, "num_hidden_layers": 7},
    "gemma3, pattern": {"model_type": "gemma3_text", **HEADS, "sliding_window": 9, "sliding_window_pattern": 2},
    "gemma3, layer types": {
        "model_type": "gemma3_text",
        **HEADS,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 9, "num_hidden_layers": 5},
    "phi3": {"model_type": "phi3", "sliding_window": 9},
    "ministral": {"model_type": "ministral", **HEADS, "sliding_window": 9},
    "ministral3": {"model_type": "ministral3", **HEADS},
    "glm": {"model_type": "glm", **HEADS},
    "glm4": {"model_type": "glm4", **HEADS},
    "ernie4_5": {"model_type": "ernie4_5", **HEADS},
    "exaone4": {
        "model_type": "exaone4",
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "cwm": {"model_type": "cwm", **HEADS, "sliding_window": 9, "num_hidden_layers": 5},
    "hunyuan": {"model_type": "hunyuan_v1_dense", **HEADS},
    "internlm3": {"model_type": "internlm3", **HEADS},
    "seed_oss": {"model_type": "seed_oss", **HEADS, "residual_dropout": 0.0},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3, window": {"model_type": "smollm3", "num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 9},
    "olmoe": {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **HEADS,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "glm4_moe": {"model_type": "glm4_moe", **HEADS, **ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True},
    "dots1": {"model_type": "dots1", **ROUTED, "first_k_dense_replace": 2, "sliding_window": 9, "max_window_layers": 1},
    "minimax_m2": {"model_type": "minimax_m2", **HEADS, "num_local_experts": 6, "num_experts_per_tok": 3},
    "gpt_oss": {"model_type": "gpt_oss", **HEADS, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 9},
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 6,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 40,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": 4,
        "moe_layer_interval": 2,
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **ROUTED, **LATENTS, "first_k_dense_replace": 1},
    "deepseek_v3, one latent": {
        "model_type": "deepseek_v3",
        **ROUTED,
        **LATENTS,
        "q_lora_rank": None,
        "first_k_dense_replace": 2,
    },
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", **ROUTED, **LATENTS, "mlp_layer_types": ["dense", "sparse", "sparse"]},
}
ROWS = {"packed": [[19, 3, 10]], "unpacked": [[24], [24]]}
# gpt-oss makes its masks without positions, so it cannot be trained on packed rows.
CASES = {
    f"{name}, {kind}": (config, rows)
    for name, config in MODELS.items()
    for kind, rows in ROWS.items()
    if (name, kind) != ("gpt_oss", "packed")
}


def pairs_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention on [B, heads, T, width], multiplying each query only with the keys its mask [B, 1, T, T] allows."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    rows = []
    for b in range(query.shape[0]):
        outputs = []
        for t in range(query.shape[2]):
            seen = attention_mask[b, 0, t].nonzero().squeeze(1)
            scores = query[b, :, t : t + 1] @ key[b][:, seen].transpose(1, 2) * scaling
            if kwargs.get("softcap") is not None:
                scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
            if (sinks := kwargs.get("s_aux")) is not None:
                scores = torch.cat((scores, sinks[:, None, None]), dim=-1)
            outputs.append(scores.softmax(-1)[..., : len(seen)] @ value[b][:, seen])
        rows.append(torch.cat(outputs, dim=1).transpose(0, 1))
    return torch.stack(rows), None


def whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return transformers.masking_utils.sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


@pytest.fixture(autouse=True, scope="module")
def _pairs_kernel() -> Iterator[None]:
    transformers.AttentionInterface.register("pairs", pairs_attention)
    transformers.AttentionMaskInterface.register("pairs", whole_mask)
    yield
    transformers.AttentionInterface._global_mapping.pop("pairs")
    transformers.AttentionMaskInterface._global_mapping.pop("pairs")


def build(config: dict[str, Any]) -> tuple[CausalLMLoss, ModelFacts]:
    torch.manual_seed(0)
    section = ModelSection(init="random", dtype="fp32", attention="eager", config=SMALL | config, tokenizer="/none")
    facts = model_facts(SMALL | config, None, None, None)
    return build_model(section, facts, "cpu", chunk_tokens=16), facts


def addmm_flops(total: torch.Size, left: torch.Size, right: torch.Size, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: CausalLMLoss, rows: list[list[int]], labels: Tensor) -> int:
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    ids = torch.randint(1, SMALL["vocab_size"], positions.shape)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with counter:
        model(ids, positions, labels).backward()
    return counter.get_total_flops()


def some_labels(rows: list[list[int]]) -> tuple[Tensor, int]:
    """Return labels that train the second half of each row, and their number."""
    shape = (len(rows), sum(rows[0]))
    labels = torch.full(shape, -100)
    labels[:, shape[1] // 2 :] = 7
    return labels, int((labels >= 0).sum())


def deviation(config: dict[str, Any], rows: list[list[int]]) -> float:
    """Return the relative error of the formula against the count."""
    model, facts = build(config)
    model.hf.set_attn_implementation("pairs")
    if hasattr(model.hf.config, "num_experts_per_tok"):
        model.hf.set_experts_implementation("eager")
    labels, num_labels = some_labels(rows)
    flops = train_flops(facts)
    assert flops is not None
    return flops.of([length for row in rows for length in row], num_labels) / counted(model, rows, labels) - 1


@pytest.mark.rest
@pytest.mark.parametrize(("config", "rows"), CASES.values(), ids=CASES)
def test_flops_equal_those_that_torch_counts(config: dict[str, Any], rows: list[list[int]]) -> None:
    assert abs(deviation(config, rows)) < 1e-4


def test_every_family_is_counted() -> None:
    assert {config["model_type"] for config in MODELS.values()} == set(FAMILIES)


def of(**config: Any) -> TrainFlops | None:
    return train_flops(model_facts(SMALL | config, None, None, None))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_next"},
        {},
        # These configs omit keys for which transformers uses defaults that the config does not show.
        {"model_type": "qwen3"},
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "mixtral", "num_experts_per_tok": 2},
        {"model_type": "deepseek_v3", **ROUTED, **LATENTS},
        {"model_type": "gemma3_text", "head_dim": 24, "use_bidirectional_attention": True},
        {"model_type": "qwen3", "head_dim": 24, "layer_types": ["full_attention", "linear_attention", "full_attention"]},
        {"model_type": "qwen3", "head_dim": 24, "layer_types": ["full_attention"]},
    ],
)
def test_unknown_architectures_have_no_flops(config: dict[str, Any]) -> None:
    assert of(**config) is None


def test_flops_match_hand_calculations() -> None:
    config = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3}
    config |= {"intermediate_size": 8, "vocab_size": 10, "model_type": "mistral", "sliding_window": 3}
    flops = of(**config)
    # Weights in each of 2 layers: queries and output 2 x 4 x 6, keys and values 2 x 4 x 3, MLP 3 x 4 x 8. Head: 10 x 4.
    # A pair: 2 layers x width 6, once for its score and once for its value.
    assert flops == TrainFlops(per_token=6 * 336, per_label=6 * 40, per_pair=((3, 12 * 12),))
    # The first token attends to 1 token, the second to 2, all others to 3.
    assert flops.of([5, 2], 4) == 6 * 336 * 7 + 6 * 40 * 4 + 144 * ((1 + 2 + 3 + 3 + 3) + (1 + 2))
    assert flops.of([], 0) == 0


# Small enough to calculate by hand.
BY_HAND = {
    "model_type": "llama",
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 3,
    "intermediate_size": 8,
    "vocab_size": 10,
}


def parameters(**changes: Any) -> int:
    return model_facts({**BY_HAND, **changes}, None, None, None).num_params


def test_defaults_for_missing_config_keys() -> None:
    facts = model_facts({k: v for k, v in BY_HAND.items() if k not in ("num_key_value_heads", "head_dim")}, None, None, None)
    assert (facts.num_kv_heads, facts.head_dim) == (2, 2)
    assert not facts.num_params_exact
    assert model_facts(BY_HAND, None, None, 123).num_params == 123
    assert model_facts({"text_config": BY_HAND}, None, None, None).num_params == parameters()


def test_a_config_without_a_language_model_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        model_facts({"hidden_size": 4}, "/models/x", None, None)
    (problem,) = error.value.problems
    assert problem.message == "the model's config.json lacks num_hidden_layers, num_attention_heads, vocab_size"
    assert problem.where == "/models/x"
    assert problem.remedy.startswith("choose a decoder-only language model whose config.json has hidden_size")


@pytest.mark.parametrize(
    "config, outcome, message",
    [
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, None, "final_logit_softcapping=30.0"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "isolated", "logits_scaling=8.0"),
        ({"model_type": "opt"}, "leaks", "in this architecture, with the attention kernel sdpa: by 1 and not 0"),
        ({"model_type": "bert"}, "not_causal", "sees later tokens, with the attention kernel sdpa: by 1 and not 0"),
        (
            {"model_type": "xlstm"},
            "other_logits",
            "of the last hidden states, and this architecture does not: by",
        ),
        ({"model_type": "opt"}, "unsupported", "transformers 5.24.0 has no attention kernel sdpa for this architecture"),
        ({"model_type": "opt"}, "unknown", None),
        ({"model_type": "llama", "logit_scale": 1.0}, "isolated", None),
    ],
)
def test_architectures_that_cannot_be_trained_correctly_are_problems(
    config: dict[str, Any], outcome: Any, message: str | None
) -> None:
    verdict = outcome and IsolationVerdict(outcome=outcome, kernel="sdpa", transformers="5.24.0", detail="by 1 and not 0")
    facts = model_facts({**BY_HAND, **config}, None, None, None).model_copy(update={"isolation": verdict})
    for packing in (True, False):
        problems = [problem.message for problem in architecture_problems(facts, packing)]
        # Documents can affect each other only if a row contains several.
        expected = [] if message is None or (outcome == "leaks" and not packing) else [message]
        assert len(problems) == len(expected)
        assert all(words in problem for words, problem in zip(expected, problems, strict=True))


def test_the_plan_refuses_such_an_architecture(plan_of: PlanOf) -> None:
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        plan_of("model=tiny", "+model.config.final_logit_softcapping=30.0")
