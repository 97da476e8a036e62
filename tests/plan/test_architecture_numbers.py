from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher.errors import ConfigError
from launcher.plan.architecture import architecture_problems, model_facts
from launcher.plan.launch_plan import IsolationVerdict, LaunchPlan

# Small enough to calculate by hand.
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


def test_parameter_counts_match_hand_calculations() -> None:
    # Query and output projections: 2 x 4 x 6. Keys and values: 2 x 4 x 3. MLP: 3 x 4 x 8. Two norms of 4.
    layer = 48 + 24 + 96 + 8
    assert parameters() == 2 * layer + 4 + 2 * 10 * 4
    assert parameters(tie_word_embeddings=True) == 2 * layer + 4 + 10 * 4
    # One norm of width 3 on queries and one on keys.
    assert parameters(model_type="qwen3") == parameters() + 2 * 6
    # Biases of 6, 3 and 3.
    assert parameters(model_type="qwen2") == parameters() + 2 * 12
    # Four experts of width 5 and a router instead of one MLP of width 8.
    assert parameters(num_experts=4, moe_intermediate_size=5) == parameters() + 2 * (4 * 3 * 4 * 5 + 4 * 4 - 96)


def test_defaults_for_missing_config_keys() -> None:
    facts = model_facts({k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}, None, None, None)
    assert (facts.num_kv_heads, facts.head_dim) == (2, 2)
    assert not facts.num_params_exact
    assert model_facts(SMALL, None, None, 123).num_params == 123
    assert model_facts({"text_config": SMALL}, None, None, None).num_params == parameters()


def test_a_config_without_a_language_model_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        model_facts({"hidden_size": 4}, "/models/x", None, None)
    (problem,) = error.value.problems
    assert problem.message == "the model's config.json lacks num_hidden_layers, num_attention_heads, vocab_size"
    assert problem.where == "/models/x"
    assert problem.remedy.startswith("choose a decoder-only language model with attention layers")


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
    facts = model_facts({**SMALL, **config}, None, None, None).model_copy(update={"isolation": verdict})
    for packing in (True, False):
        problems = [problem.message for problem in architecture_problems(facts, packing)]
        # Documents can affect each other only if a row contains several.
        expected = [] if message is None or (outcome == "leaks" and not packing) else [message]
        assert len(problems) == len(expected)
        assert all(words in problem for words, problem in zip(expected, problems, strict=True))


def test_the_plan_refuses_such_an_architecture(plan_of: Callable[..., LaunchPlan]) -> None:
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        plan_of("model=tiny", "+model.config.final_logit_softcapping=30.0")
