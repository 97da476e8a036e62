"""An optimizer is a row of OPTIMIZERS and a builder; the plan sizes it, and real ranks train, save and resume with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from extension_ranks import MOMENTUM_SGD
from forked_ranks import RankServer
from plan_fixtures import config_of, facts_for, plan_of

from launcher.checkpoint.state import State
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.planner import plan

__all__ = ["config_of", "plan_of"]
PlanOf = Callable[..., LaunchPlan]


def test_memory_disk_and_deepspeed_settings_follow_from_the_states(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", MOMENTUM_SGD)
    adamw, sgd = plan_of("optim.name=adamw"), plan_of("optim.name=sgd")
    num_params = adamw.model.num_params
    # Master weights and one optimizer state, instead of two.
    assert (adamw.checkpoint_bytes, sgd.checkpoint_bytes) == (12 * num_params, 8 * num_params)
    assert sgd.memory.optimizer_gib == pytest.approx(adamw.memory.optimizer_gib * 8 / 12, abs=1e-3)
    assert sgd.saving.host_gib_per_node == pytest.approx(adamw.saving.host_gib_per_node * 8 / 12, abs=1e-3)
    assert sgd.deepspeed == adamw.deepspeed | {"zero_allow_untested_optimizer": True}


def test_an_optimizer_with_more_states_gets_more_buffers_on_nvme(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "three", OPTIMIZERS["adamw"].__class__(("a", "b", "c"), "m:f", ("m.C",)))
    on_nvme = ("deepspeed=zero3_nvme", "deepspeed.nvme_path=/nvme")
    offload = plan_of("optim.name=three", *on_nvme).deepspeed["zero_optimization"]["offload_optimizer"]
    assert offload["buffer_count"] == 5
    assert "buffer_count" not in plan_of(*on_nvme).deepspeed["zero_optimization"]["offload_optimizer"]


def test_a_plan_refuses_an_unknown_optimizer_and_one_that_cannot_be_offloaded(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", MOMENTUM_SGD)
    with pytest.raises(ConfigError) as unknown:
        plan_of("optim.name=adam")
    (problem,) = unknown.value.problems
    assert (problem.where, problem.value, problem.remedy) == ("optim.name", "adam", "choose one of: adamw, sgd")
    with pytest.raises(ConfigError, match="the states of sgd cannot be offloaded"):
        plan_of("optim.name=sgd", "deepspeed=zero3_offload")


def test_a_state_file_that_names_no_optimizer_states_has_those_of_adamw() -> None:
    file = {"parameters": {}, "optimizer_step": 1, "loss_scaler": {}, "engine": {}, "extra": {}}
    assert State.model_validate(file).optimizer_states == ("exp_avg", "exp_avg_sq")


@pytest.mark.rest
def test_two_ranks_train_with_it_and_one_resumes_with_the_same_losses(
    config_of: Callable[..., RunConfig], rank_server: RankServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", MOMENTUM_SGD)

    def write_plan(num_ranks: int) -> str:
        settings = ("optim.name=sgd", "optim.lr=0.5", "model.dtype=fp32", "run.name=sgd", "train.global_batch_size=2")
        config = config_of("model=tiny", *settings, f"cluster.ranks_per_node={num_ranks}")
        path = tmp_path / f"plan-{num_ranks}.json"
        path.write_text(plan(config, facts_for(config, working_dir=str(tmp_path), vocab_size=1000)).to_json())
        return str(path)

    def train(num_ranks: int, *steps: int) -> list[dict[str, Any]]:
        arguments = [(write_plan(num_ranks), *steps)] * num_ranks
        return rank_server.values("extension_ranks:train_with_momentum_sgd", arguments, tmp_path / f"ranks-{num_ranks}")

    straight, _ = train(2, 0, 2, 4)
    (resumed,) = train(1, 2, 0, 4)
    assert straight["tensors"] == ["fp32", "momentum_buffer"]
    states = "momentum_buffer in the checkpoint, velocity in this run's optimizer"
    assert straight["refusal"] == resumed["refusal"] == f"the checkpoint holds the states of another optimizer: {states}"
    assert straight["losses"][0] > straight["losses"][2]
    assert resumed["losses"] == pytest.approx(straight["losses"][2:], rel=1e-6)
