"""Batches and the learning rate of each step, and the note on a rate that a resumed run changes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from launcher.config.sections.data import DataSection, Source
from launcher.config.sections.train import OptimSection, TrainSection
from launcher.errors import ConfigError
from launcher.plan.launch_plan import Batch, DataFacts, LaunchPlan
from launcher.plan.steps import compute_learning_rate, describe_changed_rate, divisors, split_batch

GLOBALS = (1, 2, 6, 7, 8, 12, 30, 64, 96, 100, 127, 128, 1024)
WORLDS = (1, 2, 3, 4, 6, 7, 8, 16, 24, 32, 100)
LENGTHS = (16, 256, 1024, 8192, 131072)


def divide(global_batch: int, world: int, length: int = 256, micro: int | None = None, device: str = "cpu") -> Batch:
    train = TrainSection(max_steps=1, global_batch_size=global_batch, micro_batch_size=micro)
    data = DataSection(sources=(Source(path="rows.jsonl"),), max_length=length)
    return split_batch(train, data, world, device, None)


@pytest.mark.parametrize("n", range(1, 200))
def test_divisors(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


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
    assert [int(n) for n in re.findall(r"\d+", problem.remedy)] == [96, 104, *divisors(100)]


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
def test_epochs_become_steps(plan_of: Callable[..., LaunchPlan], rows: int, epochs: float, batch: int, steps: int) -> None:
    data = DataFacts(
        cache_dir="/c",
        num_rows=rows,
        num_docs=rows,
        num_tokens=rows * 200,
        num_trained_tokens=rows,
        num_eval_rows=0,
        num_eval_tokens=0,
        truncated_docs=0,
        truncated_tokens=0,
        padding_frac=0.0,
    )
    planned = plan_of(f"train.epochs={epochs}", f"train.global_batch_size={batch}", data=data).batch
    assert planned.max_steps == steps == max(1, math.ceil(rows * epochs / batch))
    assert planned.epochs == pytest.approx(steps * batch / rows, abs=1e-4)
    # Tokens per step exclude padding: they use the mean tokens of a row.
    assert planned.tokens_per_step == batch * 200


def test_without_data_the_number_of_steps_is_unknown(plan_of: Callable[..., LaunchPlan]) -> None:
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
def of_steps(plan_of: Callable[..., LaunchPlan]) -> Any:
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
