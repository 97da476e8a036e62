from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from launcher.config.sections.data import DataSection, Source
from launcher.config.sections.train import TrainSection
from launcher.errors import ConfigError
from launcher.plan.launch_plan import Batch, DataFacts, LaunchPlan
from launcher.plan.steps import divisors, split_batch

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
