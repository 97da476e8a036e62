from __future__ import annotations

from typing import Any

import pytest

from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts

# Two layers, two query heads and one key and value head of width 3, MLP of 8, 10 words, hidden size 4.
SMALL = {
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
    return model_facts({**SMALL, **changes}, None, None, None).num_params


def test_parameters_by_hand() -> None:
    # Queries and output 2 x 4 x 6, keys and values 2 x 4 x 3. MLP: 3 x 4 x 8. Three norms of 4.
    layer = 48 + 24 + 96 + 8
    assert parameters() == 2 * layer + 4 + 2 * 10 * 4
    assert parameters(tie_word_embeddings=True) == 2 * layer + 4 + 10 * 4
    # A norm of width 3 on queries and one on keys.
    assert parameters(model_type="qwen3") == parameters() + 2 * 6
    # Biases of 6, 3 and 3.
    assert parameters(model_type="qwen2") == parameters() + 2 * 12
    # Four experts of width 5 and a router instead of one MLP of width 8.
    assert parameters(num_experts=4, moe_intermediate_size=5) == parameters() + 2 * (4 * 3 * 4 * 5 + 4 * 4 - 96)


def test_what_a_config_leaves_out() -> None:
    facts = model_facts({k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}, None, None, None)
    assert (facts.num_kv_heads, facts.head_dim) == (2, 2)
    assert not facts.num_params_exact
    assert model_facts(SMALL, None, None, 123).num_params == 123
    assert model_facts({"text_config": SMALL}, None, None, None).num_params == parameters()


def test_a_config_that_is_no_language_model() -> None:
    with pytest.raises(ConfigError) as error:
        model_facts({"hidden_size": 4}, "/models/x", None, None)
    (problem,) = error.value.problems
    assert problem.what == "the model's config.json lacks num_hidden_layers, num_attention_heads, vocab_size"
    assert (problem.where, problem.remedy) == ("/models/x", "only decoder-only language models are served")
