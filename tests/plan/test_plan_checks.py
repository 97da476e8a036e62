"""Settings that do not fit the model, data or cluster are refused, or cause a warning with a value that fits."""

from __future__ import annotations

from typing import Any

import pytest
from plan_fixtures import DATA, H100, ConfigOf, PlanOf, facts_for, plan_lines

from launcher.errors import ConfigError
from launcher.plan.architecture import context_tokens
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import plan

LLAMA_8B = ("model=llama3_1_8b", "train.global_batch_size=64")


def warnings_of(planned: LaunchPlan) -> list[str]:
    return [line.removeprefix("warning").strip() for line in plan_lines(planned) if line.startswith("warning")]


def test_a_usual_plan_has_no_warning(plan_of: PlanOf) -> None:
    assert warnings_of(plan_of("model=tiny")) == []
    assert warnings_of(plan_of(*LLAMA_8B, "optim.lr=1e-3", device=H100)) == []


@pytest.mark.parametrize("lr", ["1e5", "2"])
def test_a_learning_rate_that_destroys_trained_weights_is_refused(plan_of: PlanOf, lr: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(*LLAMA_8B, f"optim.lr={lr}", device=H100)
    (problem,) = error.value.problems
    assert problem.message == f"optim.lr={float(lr):g} would destroy the weights in the first step"
    assert (problem.where, problem.value) == ("optim.lr", f"{float(lr):g}")
    assert "usually takes 1e-06 to 0.0001: set optim.lr=1e-5" in problem.remedy


def test_a_high_learning_rate_is_warned_about(plan_of: PlanOf) -> None:
    message = "is high: fine-tuning with adamw usually takes 1e-06 to 0.0001"
    assert warnings_of(plan_of(*LLAMA_8B, "optim.lr=1e-2", device=H100)) == [f"optim.lr=0.01 {message}"]
    assert warnings_of(plan_of("optim.lr=1e5")) == [f"optim.lr=100000 {message}"]
    assert warnings_of(plan_of("optim.lr=1e-2")) == []


def test_rows_longer_than_the_positions_are_refused(plan_of: PlanOf) -> None:
    assert plan_of("data.max_length=2048").config.data.max_length == 2048
    with pytest.raises(ConfigError) as error:
        plan_of("data.max_length=2049")
    (problem,) = error.value.problems
    assert (problem.where, problem.value) == ("data.max_length", "2049")


def test_a_kernel_that_needs_gpus_is_refused_on_cpus(plan_of: PlanOf) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of("model.attention=flash_attention_2")
    assert [problem.where for problem in error.value.problems] == ["model.attention"]
    assert plan_of(*LLAMA_8B, "model.attention=flash_attention_2", device=H100).config.model.attention == "flash_attention_2"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        ({"max_position_embeddings": 8192, "rope_parameters": {"full_attention": {"factor": 8}, "sliding_attention": {}}}, 65536),
        ({"max_position_embeddings": 8192, "rope_scaling": None}, 8192),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        *(({}, None), ({"max_position_embeddings": "many"}, None), ({"max_position_embeddings": -1}, None)),
    ],
)
def test_the_context_of_a_model(config: dict[str, Any], tokens: int | None) -> None:
    assert context_tokens(config) == tokens


def test_a_batch_larger_than_the_data_is_warned_about_with_the_one_that_fits(plan_of: PlanOf) -> None:
    data = DATA.model_copy(update={"num_rows": 41})
    steps = ("train.global_batch_size=64", "train.max_steps=9", "train.epochs=null")
    (warning,) = warnings_of(plan_of(*steps, data=data))
    assert warning == (
        "a batch of 64 rows is more than the 41 rows of the data, so each step repeats rows: set train.global_batch_size=40"
    )
    (warning,) = warnings_of(plan_of(*steps, data=DATA.model_copy(update={"num_rows": 1})))
    assert warning.endswith(": lower it, and use at most 1 rank")


def test_data_of_a_single_step_is_one_warning_with_the_batch_and_the_epochs_of_more(plan_of: PlanOf) -> None:
    data = DATA.model_copy(update={"num_rows": 41})
    planned = plan_of("train.global_batch_size=64", "train.epochs=1", "optim.warmup_steps=20", data=data)
    ranks = planned.topology.world_size
    batch = max(ranks, 4 // ranks * ranks)
    assert planned.batch.max_steps == 1
    assert warnings_of(planned) == [
        f"the run has 1 step: 1 epoch of 41 rows is no more than one batch of 64: set train.global_batch_size={batch} for "
        f"{-(-41 // batch)} steps, or set train.epochs=16 for 10 steps, or add documents"
    ]
    assert not any("warm-up" in line for line in plan_lines(planned) if line.startswith("note"))
    more = ("train.epochs=1", f"train.global_batch_size={batch}", "optim.warmup_steps=20")
    assert plan_of(*more, data=data).batch.max_steps == -(-41 // batch)
    assert warnings_of(plan_of(*more, data=data)) == []
    assert plan_of("train.global_batch_size=64", "train.epochs=16", data=data).batch.max_steps == 11
    (warning,) = warnings_of(
        plan_of("train.global_batch_size=64", "train.epochs=1", data=DATA.model_copy(update={"num_rows": 64}))
    )
    assert "64 rows is no more than one batch of 64" in warning
    assert (
        warnings_of(plan_of("train.global_batch_size=64", "train.epochs=1", data=DATA.model_copy(update={"num_rows": 65}))) == []
    )
    (warning,) = warnings_of(
        plan_of("train.global_batch_size=64", "train.epochs=1", data=DATA.model_copy(update={"num_rows": 1}))
    )
    assert warning.endswith("no more than one batch of 64: set train.epochs=640 for 10 steps, or add documents")


def test_a_signal_lead_shorter_than_a_save_is_warned_about_with_the_one_that_fits(plan_of: PlanOf) -> None:
    tokens = ("experiment=llama3_70b_four_nodes", "data.path=rows.jsonl")
    (warning,) = warnings_of(plan_of(*tokens, "cluster.signal_lead_seconds=5", device=H100))
    assert warning == (
        "cluster.signal_lead_seconds=5 is less than a save may take: 788 GiB at an assumed 1 GiB/s per node need 198 s "
        "on 4 nodes, and the step in progress ends first: set cluster.signal_lead_seconds=297"
    )
    assert warnings_of(plan_of(*tokens, "cluster.signal_lead_seconds=297", device=H100)) == []


def test_a_small_checkpoint_fits_into_any_lead(plan_of: PlanOf) -> None:
    assert warnings_of(plan_of("cluster=slurm", "cluster.signal_lead_seconds=1")) == []


def test_a_grace_period_shorter_than_a_save_is_warned_about(plan_of: PlanOf) -> None:
    (warning,) = warnings_of(plan_of(*LLAMA_8B, "cluster.stop_grace_seconds=60", device=H100))
    assert warning.startswith("cluster.stop_grace_seconds=60 is less than a save may take: 90 GiB at an assumed 1 GiB/s per node")
    assert "set cluster.stop_grace_seconds=135" in warning


def test_early_stopping_without_evaluations_while_training_is_refused(config_of: ConfigOf) -> None:
    for settings in (("eval.every=0",), ("eval.every=5", "eval.sets=[{name: a, path: a, every: 0}]", "checkpoint.best_set=a")):
        config = config_of("model=tiny", "eval.stop_after=2", *settings)
        with pytest.raises(ConfigError) as error:
            plan(config, facts_for(config))
        (problem,) = error.value.problems
        name = config.checkpoint.best_set
        assert problem.message == f"eval.stop_after needs evaluations during training; {name} is evaluated before and after it"
        assert (problem.where, problem.value, problem.remedy) == ("eval.stop_after", "2", "set eval.every to a number of steps")


def test_the_best_checkpoint_needs_held_out_rows_and_evaluations(plan_of: PlanOf) -> None:
    nothing = DATA.model_copy(update={"num_eval_rows": 0})
    best = ("checkpoint.keep_best=1", "eval.every=5")
    assert warnings_of(plan_of(*best)) == []
    assert warnings_of(plan_of(*best, "eval.stop_after=2", data=nothing)) == [
        "eval.stop_after and checkpoint.keep_best need held-out rows, and there are none: set data.eval_fraction=0.05"
    ]
    assert warnings_of(plan_of("checkpoint.keep_best=1", "eval.every=0")) == [
        "checkpoint.keep_best needs evaluations while training: set eval.every to a number of steps"
    ]


SAVES = ("checkpoint.save_every=20", "eval.answers_every=40")


@pytest.mark.parametrize(
    ("settings", "num_held_out", "message", "remedy"),
    [
        (("eval.answers_every=50",), 8, "not a multiple of checkpoint.save_every=20", "set checkpoint.save_every=50"),
        (("checkpoint.save_every=0",), 8, "not a multiple of checkpoint.save_every=0", "set checkpoint.save_every=40"),
        ((), 0, "there are no held-out rows and no eval.sets", "data.eval_fraction=0.05"),
    ],
)
def test_answers_that_cannot_be_had_while_training_are_refused(
    config_of: ConfigOf, settings: tuple[str, ...], num_held_out: int, message: str, remedy: str
) -> None:
    config = config_of("model=tiny", *SAVES, *settings)
    data = DATA.model_copy(update={"num_eval_rows": num_held_out})
    with pytest.raises(ConfigError) as error:
        plan(config, facts_for(config, data=data))
    (problem,) = error.value.problems
    assert message in problem.message
    assert remedy in problem.remedy
    assert problem.where == ("eval.answers_every")


def test_a_plan_says_what_answers_while_training_cost(plan_of: PlanOf) -> None:
    def row(*settings: str, **facts: Any) -> list[str]:
        planned = plan_of(*SAVES, "train.max_steps=100", *settings, **facts)
        return [line.removeprefix("answers").strip() for line in plan_lines(planned) if line.startswith("answers")]

    assert row("eval.answers_every=0") == []
    prompts = "every 40 steps (2 times): up to 200 prompts of each set, of up to 256 tokens"
    (here,) = row()
    assert here.startswith(prompts)
    assert here.endswith("on this machine at low priority beside training; what is left, before the run ends")
    nothing = DATA.model_copy(update={"num_eval_rows": 0})
    (sets,) = row("eval.sets=[{name: support, path: support.jsonl}]", data=nothing)
    assert "up to 200 prompts of each set" in sets
    assert row(device=H100)[0].endswith("on the GPUs of this machine after the last step, before the run ends")
    on_ray = ("cluster=ray", "cluster.address=10.0.0.1:6379")
    assert row(*on_ray)[0].endswith("on idle GPUs of the cluster during training; no more after the last step")
