"""Batches and the learning rate of each step, checkpoints and their disk space, and the settings that `init` suggests."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from plan_fixtures import DATA, PlanOf, plan_lines

from launcher.config.sections.data import DataSection, Source
from launcher.config.sections.train import OptimSection, TrainSection
from launcher.errors import ConfigError
from launcher.plan.checkpoints import checkpoints_at_once, describe_low_room, find_room_problem, needed_bytes
from launcher.plan.launch_plan import Batch, LaunchPlan
from launcher.plan.quantities import format_size
from launcher.plan.steps import compute_learning_rate, describe_changed_rate, list_divisors, split_batch
from launcher.plan.suggested_settings import DataSample, Machine, learning_rate, needs_offload, suggest, suggest_held_out

GLOBALS = (1, 2, 6, 7, 8, 12, 30, 64, 96, 100, 127, 128, 1024)
WORLDS = (1, 2, 3, 4, 6, 7, 8, 16, 24, 32, 100)
LENGTHS = (16, 256, 1024, 8192, 131072)
GPUS = Machine(data_ranks=16, device="cuda", memory_gib=79.1)


def divide(global_batch: int, world: int, length: int = 256, micro: int | None = None, device: str = "cpu") -> Batch:
    train = TrainSection(max_steps=1, global_batch_size=global_batch, micro_batch_size=micro)
    data = DataSection(sources=(Source(path="rows.jsonl"),), max_length=length)
    return split_batch(train, data, world, device, None)


@pytest.mark.parametrize("n", range(1, 200))
def test_divisors(n: int) -> None:
    assert list_divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_micro_batch_accumulation_and_ranks_multiply_to_the_global_batch(device: str) -> None:
    divided = 0
    for total in GLOBALS:
        for world in WORLDS:
            if total % world:
                continue
            for length in LENGTHS:
                batch = divide(total, world, length, device=device)
                assert batch.micro_batch_size * batch.accumulation * world == total == batch.global_batch_size
                # A micro-batch has several rows only if they fit into the tokens of one forward pass.
                assert batch.micro_batch_size == 1 or batch.micro_batch_size * length <= {"cpu": 1024, "cuda": 8192}[device]
                assert batch.max_tokens_per_step == total * length
                divided += 1
    assert divided > 100


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    assert divide(64, 2, 256).micro_batch_size == 4
    assert divide(64, 2, 64).micro_batch_size == 16
    assert divide(6, 2, 256).micro_batch_size == 3
    assert divide(64, 2, 8192).micro_batch_size == 1
    assert divide(64, 2, 1024, device="cuda").micro_batch_size == 8


def test_an_indivisible_batch_is_refused_with_the_sizes_and_ranks_that_divide() -> None:
    with pytest.raises(ConfigError) as error:
        divide(100, 8)
    (problem,) = error.value.problems
    assert (problem.where, problem.value) == ("train.global_batch_size", "100")
    assert [int(n) for n in re.findall(r"\d+", problem.remedy)] == [96, 104, *list_divisors(100)]


def test_a_micro_batch_that_is_set() -> None:
    batch = divide(64, 4, micro=8)
    assert (batch.micro_batch_size, batch.accumulation) == (8, 2)
    with pytest.raises(ConfigError) as error:
        divide(64, 4, micro=5)
    (problem,) = error.value.problems
    assert problem.where == "train.micro_batch_size"
    for micro in (1, 2, 4, 8, 16):
        assert str(micro) in re.findall(r"\d+", problem.remedy)
        assert divide(64, 4, micro=micro).micro_batch_size == micro


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "steps"),
    [(1000, 1, 8, 125), (1000, 1, 64, 16), (1000, 2, 64, 32), (1000, 0.5, 100, 5), (3, 1, 64, 1), (1, 0.01, 2, 1)],
)
def test_epochs_become_steps(plan_of: PlanOf, rows: int, epochs: float, batch: int, steps: int) -> None:
    data = DATA.model_copy(update={"num_rows": rows, "num_docs": rows, "num_tokens": rows * 200})
    planned = plan_of(f"train.epochs={epochs}", f"train.global_batch_size={batch}", data=data).batch
    assert planned.max_steps == steps == max(1, math.ceil(rows * epochs / batch))
    assert planned.epochs == pytest.approx(steps * batch / rows, abs=1e-4)
    # Tokens per step exclude padding: they use the mean tokens of a row.
    assert planned.tokens_per_step == batch * 200


def test_without_data_the_number_of_steps_is_unknown(plan_of: PlanOf) -> None:
    planned = plan_of("train.epochs=2", data=None).batch
    assert (planned.max_steps, planned.epochs, planned.tokens_per_step) == (None, 2, None)
    assert plan_of("train.max_steps=5", data=None).batch.max_steps == 5


def rates(max_steps: int, **settings: object) -> list[float]:
    optim = OptimSection(lr=1.0, **settings)
    return [compute_learning_rate(optim, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(100, schedule=schedule, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_lowest_rate(schedule: str) -> None:
    lrs = rates(50, schedule=schedule, warmup_steps=5, min_lr_ratio=0.1)
    assert lrs[-1] == pytest.approx(0.1)
    assert lrs[5:] == sorted(lrs[5:], reverse=True)


def test_shapes_of_the_schedules() -> None:
    assert rates(10, schedule="constant", warmup_steps=0) == [1.0] * 10
    assert rates(11, schedule="linear", warmup_steps=0, min_lr_ratio=0.0)[5] == pytest.approx(0.5)
    assert rates(11, schedule="cosine", warmup_steps=0, min_lr_ratio=0.0)[5] == pytest.approx(0.5)
    wsd = rates(100, schedule="wsd", warmup_steps=0, decay_fraction=0.2, min_lr_ratio=0.0)
    assert wsd[:80] == [1.0] * 80
    assert wsd[80] < 1.0
    assert wsd[89] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_runs_have_a_rate_in_range(schedule: str, max_steps: int) -> None:
    for warmup in (0, 1, 5):
        assert all(0 < rate <= 1 for rate in rates(max_steps, schedule=schedule, warmup_steps=warmup))


@pytest.fixture
def of_steps(plan_of: PlanOf) -> Any:
    """Return a plan of a number of steps, with settings of optim."""
    plan = plan_of()

    def change(max_steps: int | None, **optim: Any) -> LaunchPlan:
        section = plan.config.optim.model_copy(update={"lr": 1e-5, "schedule": "cosine", "warmup_steps": 0, **optim})
        config = plan.config.model_copy(update={"optim": section})
        return plan.model_copy(update={"config": config, "batch": plan.batch.model_copy(update={"max_steps": max_steps})})

    return change


def test_a_rate_that_a_longer_run_raises_is_noted(of_steps: Any) -> None:
    note = describe_changed_rate(of_steps(100), of_steps(200), 100)
    assert note is not None
    assert "after 1e-06 in step 100" in note
    assert describe_changed_rate(of_steps(100), of_steps(200, weight_decay=0.5), 100) == note, "the rate does not depend on it"


def test_a_rate_that_continues_needs_no_note(of_steps: Any) -> None:
    assert describe_changed_rate(of_steps(100), of_steps(100), 50) is None
    assert describe_changed_rate(of_steps(100, schedule="constant"), of_steps(200, schedule="constant"), 100) is None
    # Before either decay begins, wsd has the same rate.
    assert describe_changed_rate(of_steps(100, schedule="wsd"), of_steps(200, schedule="wsd"), 60) is None
    assert describe_changed_rate(of_steps(100, schedule="wsd"), of_steps(200, schedule="wsd"), 100) is not None
    assert describe_changed_rate(of_steps(100), of_steps(200), 0) is None, "nothing was trained"
    assert describe_changed_rate(of_steps(None), of_steps(200), 50) is None
    assert describe_changed_rate(of_steps(100), of_steps(50), 50) is None, "no step follows"


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2"], 3),
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=1"], 2),
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2", "checkpoint.keep_every=50"], 5),
        (["train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2", "checkpoint.keep_best=3"], 6),
        # The number of saves limits the number of checkpoints.
        (["train.max_steps=100"], 1),
        (["train.max_steps=100", "checkpoint.save_every=60", "checkpoint.keep_last=9"], 2),
        (["train.max_steps=100", "checkpoint.save_every=50", "checkpoint.keep_last=9"], 2),
    ],
)
def test_kept_checkpoints_and_the_one_being_written_need_room(plan_of: PlanOf, tokens: list[str], count: int) -> None:
    assert checkpoints_at_once(plan_of(*tokens)) == count


def test_unknown_steps_do_not_limit_the_number_of_checkpoints(plan_of: PlanOf) -> None:
    plan = plan_of("train.epochs=1", "train.max_steps=null", "checkpoint.keep_last=2", data=None)
    assert plan.batch.max_steps is None
    assert checkpoints_at_once(plan) == 3


def test_too_little_room_is_refused_or_noted_with_numbers(plan_of: PlanOf) -> None:
    plan = plan_of("train.max_steps=100", "checkpoint.save_every=10", "checkpoint.keep_last=2")
    one = needed_bytes(plan)
    assert one > plan.checkpoint_bytes + 64 * plan.model.vocab_size * 2, "the logits for the check of the export count"
    refused = find_room_problem(plan, one - 1)
    assert refused is not None
    assert refused.value == f"needed {format_size(one)}, available {format_size(one - 1)}"
    assert find_room_problem(plan, one) is None
    three = needed_bytes(plan, 3)
    note = describe_low_room(plan, three - 1, present=0)
    assert note is not None
    assert f"has {format_size(three - 1)} free and needs {format_size(three)} for 3 checkpoints" in note
    assert describe_low_room(plan, three, present=0) is None
    # Existing checkpoints need no additional space.
    assert describe_low_room(plan, one, present=2) is None
    assert f"needs {format_size(needed_bytes(plan, 2))} for 2 more checkpoints" in (describe_low_room(plan, one, present=1) or "")
    assert f"needs {format_size(one)} for 1 more checkpoint:" in (describe_low_room(plan, one - 1, present=9) or "")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["checkpoint.keep_last=1"], "each, the newest is kept;"),
        (["checkpoint.keep_last=3"], "each, the newest 3 are kept;"),
        (["checkpoint.keep_last=1", "checkpoint.keep_every=100"], "each, the newest and every 100 steps are kept;"),
        (
            ["checkpoint.keep_last=2", "checkpoint.keep_every=100", "checkpoint.keep_best=2"],
            "each, the newest 2 and the best 2 and every 100 steps are kept;",
        ),
    ],
)
def test_the_plan_shows_which_checkpoints_are_kept(plan_of: PlanOf, tokens: list[str], text: str) -> None:
    (line,) = [line for line in plan_lines(plan_of(*tokens)) if line.startswith("checkpoint")]
    assert text in line


def sample(num_documents: int = 20_000, mean: float = 400.0, p99: int = 1500, measured: bool = True) -> DataSample:
    return DataSample(num_documents, mean, p99, p99 * 3, measured)


def values(
    data: DataSample, machine: Machine = GPUS, num_params: int = 8_000_000_000, positions: int | None = 32768
) -> dict[str, Any]:
    suggestions = suggest(num_params, positions, data, machine, {})
    assert all(one.reason for one in suggestions)
    return {one.key: one.value for one in suggestions}


@pytest.mark.parametrize(("num_params", "published"), [(1e9, 3e-5), (7e9, 2e-5), (8e9, 5e-6), (13e9, 5e-6), (70e9, 2e-6)])
def test_the_learning_rate_is_within_a_factor_of_three_of_published_ones(num_params: float, published: float) -> None:
    assert published / 3 <= learning_rate(int(num_params)) <= published * 3


def test_the_learning_rate_falls_with_the_size_and_is_a_round_number() -> None:
    sizes = [10**exponent for exponent in range(6, 13)]
    rates = [learning_rate(size) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-4
    assert (learning_rate(1_000_000_000), learning_rate(70_000_000_000)) == (3e-5, 2e-6)


@pytest.mark.parametrize(("num_documents", "share"), [(10, 0.1), (300, 0.1), (1_000, 0.1), (1_100, 0.1), (2_500, 0.04)])
def test_an_evaluation_gets_a_hundred_documents_of_small_data_but_at_most_a_tenth(num_documents: int, share: float) -> None:
    suggestion = suggest_held_out(num_documents, 0.02)
    assert suggestion is not None
    assert (suggestion.key, suggestion.value) == ("data.eval_fraction", share)


def test_a_share_that_holds_out_enough_documents_stays() -> None:
    assert suggest_held_out(5_000, 0.02) is None
    assert suggest_held_out(300, 0.2) is None
    assert suggest_held_out(9, 0.02) is None, "a tenth is less than a document"


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 8, 24, 64])
@pytest.mark.parametrize("num_documents", [1, 100, 20_000, 5_000_000])
def test_the_batch_divides_over_the_ranks(num_documents: int, world_size: int) -> None:
    machine = Machine(world_size, "cuda", 79.1)
    found = values(sample(num_documents), machine)
    assert found["train.global_batch_size"] % world_size == 0
    assert found["train.global_batch_size"] * found["data.max_length"] <= max(128 * 4096, world_size * found["data.max_length"])
    assert found["optim.warmup_steps"] >= 1


def test_little_data_has_many_steps_and_much_data_the_batch_of_published_runs() -> None:
    few, many = values(sample(2_000)), values(sample(5_000_000))
    assert (few["train.epochs"], few["train.global_batch_size"]) == (3, 16)
    assert (many["train.epochs"], many["train.global_batch_size"] * many["data.max_length"]) == (1, 128 * 4096)
    assert (few["checkpoint.save_every"], few["eval.every"]) == (14, 7)


def test_the_length_holds_99_of_100_documents_within_what_the_model_takes() -> None:
    assert values(sample(p99=3000))["data.max_length"] == 4096
    assert values(sample(p99=3500, measured=False))["data.max_length"] == 8192
    assert values(sample(p99=100))["data.max_length"] == 2048
    assert values(sample(p99=9000), positions=8192)["data.max_length"] == 8192
    assert values(sample(p99=9000), positions=None)["data.max_length"] == 16384
    assert values(sample(p99=100), Machine(2, "cpu", None))["data.max_length"] == 256


def test_memory_decides_about_offload() -> None:
    assert "model.activation_checkpointing" not in values(sample()), "the plan decides"
    assert needs_offload(60.0, GPUS)
    assert not needs_offload(40.0, GPUS)
    assert not needs_offload(60.0, Machine(2, "cpu", None))


def test_what_is_chosen_is_not_suggested_and_the_rest_follows_it() -> None:
    chosen = {"train.epochs": 6, "data.max_length": 4096, "train.global_batch_size": 16}
    found = {one.key: one.value for one in suggest(8_000_000_000, None, sample(), GPUS, chosen)}
    assert not set(chosen) & set(found)
    assert found["checkpoint.save_every"] == math.ceil(400 * 20_000 / 4096 * 6 / 16) // 5
    found = {one.key: one.value for one in suggest(8_000_000_000, None, sample(), GPUS, {"train.max_steps": 50})}
    assert ("train.epochs" in found, found["checkpoint.save_every"]) == (False, 10)
