"""Isolation of packed documents in real transformers architectures, and how a rank reacts if they affect each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from forked_ranks import RankServer
from plan_fixtures import ConfigOf, facts_for

from launcher.errors import ConfigError
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import IsolationVerdict
from launcher.plan.planner import plan as make_plan
from launcher.train.isolation import measure_isolation, require_isolation
from launcher.train.model import CausalLMLoss

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def build(family: str, **own: Any) -> CausalLMLoss:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **own})
    return CausalLMLoss(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), flatten=False).eval()


@pytest.mark.parametrize(
    ("family", "own", "outcome"),
    [
        ("llama", {"num_key_value_heads": 2}, "isolated"),
        # The router groups tokens differently when one token changes.
        ("qwen3_moe", {"num_key_value_heads": 2, "head_dim": 8, **EXPERTS}, "isolated"),
        ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "leaks"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "leaks"),
        ("bert", {}, "not_causal"),
        ("bert", {"is_decoder": True}, "leaks"),
    ],
)
def test_documents_that_affect_each_other_are_found(family: str, own: dict[str, Any], outcome: str) -> None:
    assert measure_isolation(build(family, **own), 97, CPU)[0] == outcome


def test_a_model_without_finite_or_varying_logits_is_not_measurable() -> None:
    for value, reason in ((float("nan"), "not finite"), (1.0, "do not depend on the tokens")):
        outcome, detail = measure_isolation(lambda ids, positions, value=value: torch.full((1, ids.shape[1], 5), value), 97, CPU)
        assert outcome == "unknown"
        assert reason in detail


def plan(verdict: IsolationVerdict | None, packing: bool = True, family: str = "opt") -> Any:
    config = SimpleNamespace(data=SimpleNamespace(packing=packing))
    facts = model_facts({"model_type": family, **SIZES}, None, None, None).model_copy(update={"isolation": verdict})
    return SimpleNamespace(config=config, model=facts)


def verdict(kernel: str = "sdpa", outcome: Any = "isolated", version: str = transformers.__version__) -> IsolationVerdict:
    return IsolationVerdict(outcome=outcome, kernel=kernel, transformers=version)


def test_the_ranks_measure_what_the_plan_does_not_know() -> None:
    model = build("opt", ffn_dim=64, word_embed_proj_dim=32).train()
    for known in (plan(verdict()), plan(verdict(), packing=False), plan(verdict(outcome="leaks"), packing=False)):
        assert require_isolation(known, None, model, CPU) is None
    for unknown in (None, verdict("eager"), verdict(outcome="unknown"), verdict(version="4.0")):
        with pytest.raises(ConfigError) as error:
            require_isolation(plan(unknown), model, model, CPU)
        (problem,) = error.value.problems
        assert (problem.value, problem.remedy) == ("opt", "set data.packing=false")
    assert model.training
    llama = build("llama", num_key_value_heads=2)
    message = require_isolation(plan(None), llama, llama, CPU)
    assert message == "packed documents do not affect each other with the attention kernel sdpa"


def test_the_ranks_refuse_a_model_with_other_logits_than_training_computes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cohere, llama = (build(family, num_key_value_heads=2).to(dtype) for family in ("cohere", "llama"))
        for packing in (True, False):
            with pytest.raises(ConfigError) as error:
                require_isolation(plan(verdict(outcome="unknown"), packing, "cohere"), cohere, cohere, CPU)
            assert error.value.problems[0].value == "cohere"
            assert require_isolation(plan(None, packing), llama, llama, CPU) is not None


def test_the_ranks_refuse_a_model_that_sees_later_tokens_packed_or_not() -> None:
    opt, bert = build("opt", ffn_dim=64, word_embed_proj_dim=32), build("bert")
    no_leak = require_isolation(plan(None, packing=False), opt, opt, CPU)
    assert no_leak == "the model sees no later tokens with the attention kernel sdpa"
    for packing in (True, False):
        with pytest.raises(ConfigError) as error:
            require_isolation(plan(None, packing, "bert"), bert, bert, CPU)
        (problem,) = error.value.problems
        assert (problem.value, problem.remedy) == ("bert", "choose a decoder-only language model")


@pytest.mark.rest
def test_training_goes_on_after_a_model_whose_own_forward_pass_failed_in_the_middle(
    config_of: ConfigOf, rank_server: RankServer, tmp_path: Path
) -> None:
    settings = ("model.dtype=fp32", "run.name=probed", "train.global_batch_size=2", "cluster.ranks_per_node=2")
    config = config_of("model=tiny", *settings)
    file = tmp_path / "plan.json"
    file.write_text(make_plan(config, facts_for(config, working_dir=str(tmp_path), vocab_size=1000)).to_json())

    def train(failing: str) -> list[dict[str, Any]]:
        arguments = [(str(file), failing, 0)] * 2
        return rank_server.values("train_ranks:train_after_probe", arguments, tmp_path / f"ranks-{failing}")

    expected = train("")
    for failing in ("model.layers.1.mlp.down_proj", "lm_head"):
        for after_failure, usual in zip(train(failing), expected, strict=True):
            assert len(after_failure["errors"]) == 1, "in the pass of the whole model alone"
            assert (
                after_failure["message"]
                == usual["message"]
                == "packed documents do not affect each other with the attention kernel varlen"
            )
            assert after_failure["num_gathered"] == usual["num_gathered"] == 0
            assert after_failure["losses"] == usual["losses"]
